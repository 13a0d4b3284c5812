#include "graph_front/expert_cuts.h"

#include "kernel_executor.h"

#include <algorithm>
#include <unordered_set>

namespace hybrimoe {

namespace {

const ggml_tensor * owner_of_memory(const ggml_tensor * t) {
    return t->view_src != nullptr ? t->view_src : t;
}

bool is_view(const ggml_tensor * t) {
    return t->op == GGML_OP_NONE || t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_PERMUTE ||
           t->op == GGML_OP_TRANSPOSE;
}

// The router's product behind the ids; its index, or -1 when the graph does not have it.
int find_router(ggml_tensor ** nodes, int end, const ggml_tensor * ids) {
    constexpr int most_steps = 32;
    const ggml_tensor * t    = ids;
    for (int step = 0; t != nullptr && step < most_steps; step++) {
        if (t->op == GGML_OP_MUL_MAT) {
            for (int i = end - 1; i >= 0; i--) {
                if (nodes[i] == t) {
                    return i;
                }
            }
            return -1;
        }
        t = t->src[0];
    }
    return -1;
}

bool overlaps(const ggml_tensor * a, const ggml_tensor * b) {
    const char * a_begin = static_cast<const char *>(a->data);
    const char * b_begin = static_cast<const char *>(b->data);
    return a_begin < b_begin + ggml_nbytes(b) && b_begin < a_begin + ggml_nbytes(a);
}

// Whether a node after `node` and before `end` writes over its memory.
bool is_overwritten(ggml_tensor ** nodes, int node, int end) {
    for (int i = node + 1; i < end; i++) {
        if (!is_view(nodes[i]) && overlaps(nodes[i], nodes[node])) {
            return true;
        }
    }
    return false;
}

// Whether somebody outside the nodes [begin, end] reads what one of them computes, other than the last.
bool is_wanted_outside(ggml_tensor ** nodes, int n_nodes, int begin, int end) {
    std::unordered_set<const ggml_tensor *> inside(nodes + begin, nodes + end);
    for (int i = end + 1; i < n_nodes; i++) {
        for (const ggml_tensor * src : nodes[i]->src) {
            if (src != nullptr && (inside.count(src) != 0 || inside.count(owner_of_memory(src)) != 0)) {
                return true;
            }
        }
    }
    return false;
}

void read_block(ggml_tensor ** nodes, int n_nodes, small_weights & small, expert_cut & cut) {
    const auto in_block = [&](int i) { return i >= cut.block.experts && i < cut.block.merge; };
    if (!std::all_of(cut.products.begin(), cut.products.end(), in_block)) {
        return;
    }
    std::optional<described_block> described =
        describe(nodes, cut.block, kernel_executor::external_of, nullptr, &small);
    if (!described || !ggml_is_contiguous(described->y)) {
        return;
    }
    const auto at = std::find(nodes + cut.block.experts, nodes + cut.block.end, described->y);
    const int sum = static_cast<int>(at - nodes);
    if (sum == cut.block.end || is_wanted_outside(nodes, n_nodes, cut.block.experts, sum)) {
        return;
    }
    cut.described    = std::move(described);
    cut.sum          = sum;
    const int router = find_router(nodes, cut.block.experts, cut.block.ids);
    if (router >= 0) {
        cut.block.router = nodes[router]->src[0];
        moe_block routed = cut.block;
        routed.begin     = router;
        cut.scores       = find_scores(nodes, routed);
        cut.scores_are_kept =
            cut.scores.tensor == nullptr || !is_overwritten(nodes, cut.scores.node, cut.block.experts);
    }
}

} // namespace

std::vector<expert_cut> find_cuts(ggml_tensor ** nodes, int n_nodes, is_expert_weight is_ours, small_weights & small) {
    std::vector<expert_cut> cuts;
    for (int i = 0; i < n_nodes; i++) {
        if (nodes[i]->op != GGML_OP_MUL_MAT_ID || !is_ours(nodes[i]->src[0])) {
            continue;
        }
        const ggml_tensor * ids = nodes[i]->src[2];
        if (!cuts.empty() && cuts.back().block.ids == ids && i < cuts.back().block.end) {
            cuts.back().products.push_back(i);
            continue;
        }
        expert_cut cut;
        cut.is_block = find_block(nodes, n_nodes, i, cut.block);
        cut.has_rows = ids->ne[1] > 0;
        cut.products.push_back(i);
        cuts.push_back(std::move(cut));
    }
    for (expert_cut & cut : cuts) {
        if (cut.is_block && cut.has_rows) {
            read_block(nodes, n_nodes, small, cut);
        }
    }
    return cuts;
}

} // namespace hybrimoe
