// The matcher on graphs made by hand: which nodes are a block, and that nothing is ever left out.
#include "check.h"
#include "graph_by_hand.h"
#include "match.h"

#include <cstdio>
#include <cstring>
#include <iterator>
#include <random>
#include <vector>

using namespace hybrimoe;
using namespace graph_by_hand;

namespace {

std::vector<segment> match(graph & g) {
    std::vector<segment> found;
    find_segments(g.nodes.data(), static_cast<int>(g.nodes.size()), found);
    int at = 0;
    for (const segment & one : found) {
        CHECK(one.block.begin == at);
        CHECK(one.block.end > one.block.begin);
        if (one.is_block) {
            CHECK(one.block.begin <= one.block.experts && one.block.experts < one.block.merge);
            CHECK(one.block.merge <= one.block.end);
        }
        at = one.block.end;
    }
    CHECK(at == static_cast<int>(g.nodes.size()));
    return found;
}

struct parts {
    ggml_tensor * ids  = nullptr;
    ggml_tensor * gate = nullptr;
    ggml_tensor * up   = nullptr;
    ggml_tensor * glu  = nullptr;
    ggml_tensor * down = nullptr;
    ggml_tensor * sum  = nullptr;
};

// Router, top-k, gated experts, weighted sum: what llama.cpp builds for qwen3moe and many others.
parts add_block(graph & g, int layer, int64_t n_tokens) {
    ggml_tensor * x  = g.input("x", n_embd, n_tokens);
    ggml_tensor * x3 = g.input("x (reshaped)", n_embd, 1, n_tokens);
    ggml_tensor * router =
        g.node(GGML_OP_MUL_MAT, {n_expert, n_tokens}, {g.input("blk.0.ffn_gate_inp.weight", n_embd, n_expert), x});
    ggml_tensor * scores = g.node(GGML_OP_SOFT_MAX, {n_expert, n_tokens}, {router});
    parts p;
    p.ids                 = g.ids(scores, n_tokens);
    ggml_tensor * weights = g.node(GGML_OP_GET_ROWS, {1, top_k, n_tokens}, {scores, p.ids});
    p.gate                = g.experts(layer, "gate", n_embd, n_ff, x3, p.ids);
    p.up                  = g.experts(layer, "up", n_embd, n_ff, x3, p.ids);
    p.glu                 = g.node(GGML_OP_GLU, {n_ff, top_k, n_tokens}, {p.gate, p.up});
    p.down                = g.experts(layer, "down", n_ff, n_embd, p.glu, p.ids);
    ggml_tensor * scaled  = g.node(GGML_OP_MUL, {n_embd, top_k, n_tokens}, {p.down, weights});
    ggml_tensor * first   = g.node(GGML_OP_VIEW, {n_embd, n_tokens}, {scaled});
    ggml_tensor * second  = g.node(GGML_OP_VIEW, {n_embd, n_tokens}, {scaled});
    p.sum                 = g.node(GGML_OP_ADD, {n_embd, n_tokens}, {first, second});
    return p;
}

void test_whole_block() {
    for (const int64_t n_tokens : {1, 7, 512}) {
        graph g;
        const parts p    = add_block(g, 3, n_tokens);
        const auto found = match(g);
        CHECK(found.size() == 1 && found[0].is_block && found[0].has_experts);
        const moe_block & block = found[0].block;
        CHECK(block.layer == 3 && block.n_expert == n_expert && block.ids == p.ids);
        CHECK(block.top_k() == top_k && block.n_tokens() == n_tokens);
        CHECK(block.router != nullptr && std::strstr(block.router->name, "ffn_gate_inp") != nullptr);
        CHECK(g.nodes[static_cast<size_t>(block.experts)] == p.gate);
        CHECK(g.nodes[static_cast<size_t>(block.merge) - 1] == p.down);
    }
}

void test_two_blocks() {
    graph g;
    add_block(g, 0, 4);
    add_block(g, 1, 4);
    const auto found = match(g);
    CHECK(found.size() == 2 && found[0].is_block && found[1].is_block);
    CHECK(found[0].block.layer == 0 && found[1].block.layer == 1);
}

void test_router_elsewhere() {
    graph g;
    ggml_tensor * ids = g.input("ffn_moe_topk-2", top_k, 5);
    ids->type         = GGML_TYPE_I32;
    ggml_tensor * x   = g.input("x", n_embd, 1, 5);
    ggml_tensor * up  = g.experts(2, "up", n_embd, n_ff, x, ids);
    ggml_tensor * act = g.node(GGML_OP_UNARY, {n_ff, top_k, 5}, {up});
    g.experts(2, "down", n_ff, n_embd, act, ids);
    const auto found = match(g);
    CHECK(found.size() == 1 && found[0].is_block && found[0].block.router == nullptr);
    CHECK(found[0].block.begin == found[0].block.experts);
}

// Cut anywhere, as an evaluation callback does: the pieces that do not hold all expert products are no blocks.
void test_cut_blocks() {
    graph g;
    const parts p     = add_block(g, 0, 3);
    const auto n      = g.nodes.size();
    const auto nodes  = g.nodes;
    const auto is_end = [&](size_t at, const ggml_tensor * t) { return at > 0 && nodes[at - 1] == t; };
    for (size_t cut = 1; cut < n; cut++) {
        for (const bool head : {true, false}) {
            g.nodes.assign(head ? nodes.begin() : nodes.begin() + static_cast<std::ptrdiff_t>(cut),
                           head ? nodes.begin() + static_cast<std::ptrdiff_t>(cut) : nodes.end());
            for (const segment & one : match(g)) {
                int n_products = 0;
                for (int i = one.block.begin; i < one.block.end; i++) {
                    n_products += g.nodes[static_cast<size_t>(i)]->op == GGML_OP_MUL_MAT_ID ? 1 : 0;
                }
                CHECK(one.has_experts == (n_products > 0));
                CHECK(!one.is_block || n_products == 3 || (!head && n_products == 2));
            }
        }
    }
    g.nodes.assign(nodes.begin(), nodes.begin() + 7); // up to the first two products
    CHECK(is_end(7, p.up) || is_end(7, p.gate));
    for (const segment & one : match(g)) {
        CHECK(!one.is_block);
    }
}

void test_not_blocks() {
    { // experts of two different choices
        graph g;
        const parts p = add_block(g, 0, 3);
        auto other    = *p.ids;
        p.up->src[2]  = &other;
        for (const segment & one : match(g)) {
            CHECK(!one.is_block);
        }
    }
    { // an operation between the experts that mixes (token, expert) pairs
        graph g;
        const parts p = add_block(g, 0, 3);
        p.glu->op     = GGML_OP_SOFT_MAX;
        for (const segment & one : match(g)) {
            CHECK(!one.is_block);
        }
    }
    for (const char * name : {"ffn_gate_exps.weight", "blk.x.ffn_gate_exps.weight", "", "blk."}) { // no layer
        graph g;
        const parts p = add_block(g, 0, 3);
        std::snprintf(p.gate->src[0]->name, sizeof(p.gate->src[0]->name), "%s", name);
        for (const segment & one : match(g)) {
            CHECK(!one.is_block);
        }
    }
    { // ids of another type
        graph g;
        const parts p = add_block(g, 0, 3);
        p.ids->type   = GGML_TYPE_F32;
        for (const segment & one : match(g)) {
            CHECK(!one.is_block);
        }
    }
    { // no node, and no expert
        graph g;
        CHECK(match(g).empty());
        g.node(GGML_OP_ADD, {n_embd, 1}, {g.input("a", n_embd), g.input("b", n_embd)});
        const auto found = match(g);
        CHECK(found.size() == 1 && !found[0].is_block && !found[0].has_experts);
    }
}

// Whatever the operations and however blocks are torn, the segments cover the nodes in order.
void test_random_graphs() {
    std::mt19937 random(7);
    const ggml_op ops[] = {GGML_OP_ADD,  GGML_OP_MUL,     GGML_OP_GLU,      GGML_OP_MUL_MAT, GGML_OP_MUL_MAT_ID,
                           GGML_OP_CONT, GGML_OP_ARGSORT, GGML_OP_GET_ROWS, GGML_OP_RESHAPE, GGML_OP_SOFT_MAX};
    for (int round = 0; round < 2000; round++) {
        graph g;
        const int n_blocks = static_cast<int>(random() % 4);
        for (int i = 0; i < n_blocks; i++) {
            add_block(g, i, 1 + static_cast<int64_t>(random() % 5));
        }
        for (unsigned n = random() % 6; n > 0 && !g.nodes.empty(); n--) {
            const size_t at = random() % g.nodes.size();
            if (random() % 2 == 0) {
                g.nodes.erase(g.nodes.begin() + static_cast<std::ptrdiff_t>(at));
            } else if (g.nodes[at]->src[2] != nullptr) {
                g.nodes[at]->op = ops[random() % std::size(ops)];
            }
        }
        match(g);
    }
}

} // namespace

int main() {
    test_whole_block();
    test_two_blocks();
    test_router_elsewhere();
    test_cut_blocks();
    test_not_blocks();
    test_random_graphs();
    return check::report();
}
