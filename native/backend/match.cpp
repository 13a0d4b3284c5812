#include "match.h"

#include <cctype>
#include <cstdlib>
#include <cstring>

namespace hybrimoe {

namespace {

bool is_view(const ggml_tensor * t) {
    return t->op == GGML_OP_NONE || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_VIEW || t->op == GGML_OP_PERMUTE ||
           t->op == GGML_OP_TRANSPOSE;
}

const ggml_tensor * without_views(const ggml_tensor * t) {
    while (t->op != GGML_OP_NONE && is_view(t)) {
        t = t->src[0];
    }
    return t;
}

// "blk.7.ffn_up_exps.weight" -> 7; -1 for any other name.
int layer_of(const ggml_tensor * weight) {
    if (std::strncmp(weight->name, "blk.", 4) != 0 || std::isdigit(static_cast<unsigned char>(weight->name[4])) == 0) {
        return -1;
    }
    return std::atoi(weight->name + 4);
}

// Between the first and the last expert product everything must act on each (token, expert) pair alone.
bool is_pairwise(const ggml_tensor * t, const ggml_tensor * ids) {
    switch (t->op) {
    case GGML_OP_MUL_MAT_ID:
        return t->src[2] == ids;
    case GGML_OP_ADD_ID:
        return t->src[2] == ids;
    case GGML_OP_GET_ROWS: // per-expert scales, gathered by expert id
        return t->src[1] == ids;
    case GGML_OP_GLU:
    case GGML_OP_UNARY:
    case GGML_OP_CLAMP:
    case GGML_OP_SCALE:
    case GGML_OP_SQR:
    case GGML_OP_MUL:
    case GGML_OP_REPEAT:
        return true;
    default:
        return is_view(t);
    }
}

// The operations that may follow the last expert product: bias, scale, router weight, and the sum over experts.
bool is_merge_op(const ggml_tensor * t, const ggml_tensor * ids) {
    return t->op == GGML_OP_ADD || t->op == GGML_OP_CONT || is_pairwise(t, ids);
}

// True when the block ends in one row per token, [n, n_tokens], or hands on all its pairs, [n, top_k, n_tokens].
bool ends_whole(ggml_tensor ** nodes, const moe_block & block) {
    const int64_t top_k    = block.top_k();
    const int64_t n_tokens = block.n_tokens();
    for (int i = block.end - 1; i >= block.merge; i--) {
        const ggml_tensor * t = nodes[i];
        if (is_view(t)) {
            continue;
        }
        const bool is_sum   = t->ne[1] == n_tokens && t->ne[2] == 1;
        const bool is_pairs = t->ne[1] == top_k && t->ne[2] == n_tokens;
        return is_sum || is_pairs;
    }
    return true;
}

const ggml_tensor * find_router(ggml_tensor ** nodes, int begin, int end) {
    for (int i = begin; i < end; i++) {
        if (nodes[i]->op == GGML_OP_MUL_MAT) {
            return nodes[i]->src[0];
        }
    }
    return nullptr;
}

class finder {
public:
    finder(ggml_tensor ** nodes, int n_nodes, std::vector<segment> & out) : nodes_(nodes), n_(n_nodes), out_(out) {}

    bool find(int first, moe_block & block) const {
        measure(first, first, block);
        return is_block(block);
    }

    void run() {
        int begin = 0;
        while (begin < n_) {
            const int first = next_product(begin);
            if (first == n_) {
                push_rest(begin, n_);
                return;
            }
            segment found;
            const int end = measure(begin, first, found.block);
            if (is_block(found.block)) {
                found.is_block    = true;
                found.has_experts = true;
                out_.push_back(found);
            } else {
                push_rest(begin, end);
            }
            begin = end;
        }
    }

private:
    int next_product(int from) const {
        while (from < n_ && nodes_[from]->op != GGML_OP_MUL_MAT_ID) {
            from++;
        }
        return from;
    }

    // Fills in the ranges of the block whose first expert product is `first`; returns where it ends.
    int measure(int begin, int first, moe_block & block) const {
        block.begin    = begin;
        block.experts  = first;
        block.ids      = nodes_[first]->src[2];
        block.n_expert = nodes_[first]->src[0]->ne[2];
        block.layer    = layer_of(nodes_[first]->src[0]);
        block.router   = find_router(nodes_, begin, first);
        block.merge    = first + 1;
        for (int i = first + 1; i < n_ && nodes_[i]->op != GGML_OP_MUL_MAT; i++) {
            if (nodes_[i]->op == GGML_OP_MUL_MAT_ID) {
                if (nodes_[i]->src[2] != block.ids) {
                    break;
                }
                block.merge = i + 1;
            }
        }
        block.end = block.merge;
        while (block.end < n_ && is_merge_op(nodes_[block.end], block.ids)) {
            block.end++;
        }
        return block.end;
    }

    bool is_block(const moe_block & block) const {
        const ggml_tensor * ids = block.ids;
        if (block.layer < 0 || ids->type != GGML_TYPE_I32 || ids->nb[0] != sizeof(int32_t) || ids->ne[2] != 1) {
            return false;
        }
        int n_products = 0;
        for (int i = block.experts; i < block.merge; i++) {
            if (!is_pairwise(nodes_[i], ids)) {
                return false;
            }
            n_products += nodes_[i]->op == GGML_OP_MUL_MAT_ID ? 1 : 0;
        }
        const ggml_tensor * down = nodes_[block.merge - 1];
        return n_products >= 2 && without_views(down->src[1])->op != GGML_OP_NONE && ends_whole(nodes_, block);
    }

    void push_rest(int begin, int end) {
        segment rest;
        rest.block.begin = begin;
        rest.block.end   = end;
        for (int i = begin; i < end; i++) {
            if (nodes_[i]->op == GGML_OP_MUL_MAT_ID) {
                rest.has_experts = true;
                rest.block.layer = layer_of(nodes_[i]->src[0]);
            }
        }
        out_.push_back(rest);
    }

    ggml_tensor ** nodes_;
    int n_;
    std::vector<segment> & out_;
};

} // namespace

void find_segments(ggml_tensor ** nodes, int n_nodes, std::vector<segment> & out) {
    out.clear();
    finder(nodes, n_nodes, out).run();
}

bool find_block(ggml_tensor ** nodes, int n_nodes, int first, moe_block & out) {
    std::vector<segment> none;
    return finder(nodes, n_nodes, none).find(first, out);
}

} // namespace hybrimoe
