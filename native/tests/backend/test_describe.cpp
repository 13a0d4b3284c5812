// Blocks on graphs made by hand, read as calls of the CPU kernels: which are understood, as what, and which are
// refused.
#include "check.h"
#include "describe.h"
#include "graph_by_hand.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <optional>
#include <vector>

using namespace hybrimoe;
using namespace graph_by_hand;
using kernels::ffn_op;

namespace {

constexpr int64_t n_tokens = 5;

void set_param(ggml_tensor * t, int index, float value) {
    std::memcpy(&t->op_params[index], &value, sizeof(value));
}

ggml_tensor * like(graph & g, ggml_op op, ggml_tensor * t, std::vector<ggml_tensor *> more = {}) {
    more.insert(more.begin(), t);
    return g.node(op, {t->ne[0], t->ne[1], t->ne[2]}, more);
}

ggml_tensor * unary(graph & g, ggml_unary_op op, ggml_tensor * t) {
    ggml_tensor * made = like(g, GGML_OP_UNARY, t);
    made->op_params[0] = op;
    return made;
}

ggml_tensor * scale(graph & g, ggml_tensor * t, float by, float plus = 0.0f) {
    ggml_tensor * made = like(g, GGML_OP_SCALE, t);
    set_param(made, 0, by);
    set_param(made, 1, plus);
    return made;
}

ggml_tensor * bound(graph & g, ggml_tensor * t, float beta) {
    return scale(g, unary(g, GGML_UNARY_OP_TANH, scale(g, t, 1.0f / beta)), beta);
}

ggml_tensor * row(graph & g, ggml_tensor * pairs, int64_t k) {
    ggml_tensor * view = g.node(GGML_OP_VIEW, {pairs->ne[0], pairs->ne[2]}, {pairs});
    view->view_src     = pairs;
    view->view_offs    = static_cast<size_t>(k) * pairs->nb[1];
    view->nb[1]        = pairs->nb[2];
    return view;
}

// How llama.cpp builds a layer, and what differs between architectures.
struct block_maker {
    int64_t k             = 2; // experts a token
    bool weighs_input     = false;
    bool is_situ          = false;
    float linear_beta     = 0.0f;  // of situ
    bool has_cont         = false; // of one expert a token
    graph g               = {};
    ggml_tensor * ids     = nullptr;
    ggml_tensor * weights = nullptr;
    ggml_tensor * x       = nullptr; // what gate and up read
    ggml_tensor * gate    = nullptr;
    ggml_tensor * hidden  = nullptr;
    ggml_tensor * pairs   = nullptr;
    ggml_tensor * sum     = nullptr;

    void make() {
        ids       = g.input("ids", k, n_tokens);
        ids->type = GGML_TYPE_I32;
        weights   = g.input("weights", 1, k, n_tokens);
        x         = g.input("x", n_embd, 1, n_tokens);
        if (weighs_input) {
            ggml_tensor * repeated = g.node(GGML_OP_REPEAT, {n_embd, k, n_tokens}, {x});
            x                      = like(g, GGML_OP_MUL, repeated, {weights});
        }
        ggml_tensor * up = g.experts(0, "up", n_embd, n_ff, x, ids);
        gate             = g.experts(0, "gate", n_embd, n_ff, x, ids);
        hidden           = is_situ ? situ(up) : swiglu(up);
        pairs            = g.experts(0, "down", n_ff, n_embd, hidden, ids);
        for (ggml_tensor * t : g.nodes) {
            if (t->op == GGML_OP_MUL_MAT_ID) {
                t->src[0]->data = &weight_of_[n_weights_++];
            }
        }
        if (!weighs_input) {
            pairs = like(g, GGML_OP_MUL, pairs, {weights});
        }
        std::vector<ggml_tensor *> rows;
        for (int64_t i = 0; i < k; i++) {
            rows.push_back(row(g, pairs, i));
        }
        for (int64_t i = 1; i < k; i++) {
            sum = g.node(GGML_OP_ADD, {n_embd, n_tokens}, {i == 1 ? rows[0] : sum, rows[static_cast<size_t>(i)]});
        }
        if (has_cont) {
            sum = g.node(GGML_OP_CONT, {n_embd, n_tokens}, {rows[0]});
        }
    }

    // Empty where the graph is no block at all or cannot be read.
    std::optional<described_block> read() {
        std::vector<segment> found;
        find_segments(g.nodes.data(), static_cast<int>(g.nodes.size()), found);
        if (found.size() != 1 || !found[0].is_block) {
            return std::nullopt;
        }
        end = found[0].block.end;
        return describe(
            g.nodes.data(), found[0].block, [](ggml_type, void *) -> const kernels::external_type * { return nullptr; },
            nullptr);
    }

    int end = 0; // of the block, after read()

private:
    ggml_tensor * swiglu(ggml_tensor * up) {
        ggml_tensor * made = like(g, GGML_OP_GLU, gate, {up});
        made->op_params[0] = GGML_GLU_OP_SWIGLU;
        return made;
    }

    ggml_tensor * situ(ggml_tensor * up) {
        ggml_tensor * act = like(g, GGML_OP_MUL, bound(g, gate, 4.0f), {unary(g, GGML_UNARY_OP_SIGMOID, gate)});
        return like(g, GGML_OP_MUL, act, {linear_beta > 0.0f ? bound(g, up, linear_beta) : up});
    }

    float weight_of_[3] = {};
    int n_weights_      = 0;
};

void test_plain() {
    block_maker b;
    b.make();
    const auto read = b.read();
    CHECK(read.has_value());
    if (!read) {
        return;
    }
    CHECK(read->x == b.x && read->weights == b.weights && read->y == b.sum && read->tail == b.end);
    CHECK(read->layer.op == ffn_op::swiglu && !read->layer.weights_on_input && read->x_rows_per_token() == 1);
    CHECK(read->layer.n_embd == n_embd && read->layer.n_ff == n_ff && read->layer.n_expert == n_expert);
    CHECK(read->y_token_bytes == n_embd * sizeof(float));
}

void test_one_expert_a_token() {
    for (const bool has_cont : {false, true}) {
        block_maker b;
        b.k        = 1;
        b.has_cont = has_cont;
        b.make();
        const auto read = b.read();
        CHECK(read && read->y == (has_cont ? b.sum : b.pairs) && read->weights == b.weights && read->tail == b.end);
        CHECK(read && read->y_token_bytes == n_embd * sizeof(float));
    }
    { // the pairs of several experts are no sum
        block_maker b;
        b.make();
        b.g.nodes.pop_back();
        CHECK(!b.read());
    }
}

void test_weighted_input() {
    for (const int64_t k : {1, 3}) {
        block_maker b;
        b.k            = k;
        b.weighs_input = true;
        b.make();
        const auto read = b.read();
        CHECK(read && read->layer.weights_on_input && read->weights == nullptr && read->x == b.x);
        CHECK(read && read->x_rows_per_token() == k && read->y == (k == 1 ? b.pairs : b.sum));
        float ones[3] = {};
        if (read) {
            read->take_weights(n_tokens - 1, static_cast<int32_t>(k), ones);
        }
        CHECK(ones[0] == 1.0f && ones[k - 1] == 1.0f);
    }
    { // neither weighted before nor after
        block_maker b;
        b.make();
        ggml_tensor * down = b.pairs->src[0];
        for (ggml_tensor * t : b.g.nodes) {
            if (t->op == GGML_OP_VIEW) {
                t->src[0] = t->view_src = down;
            }
        }
        b.pairs->op = GGML_OP_RESHAPE;
        CHECK(!b.read());
    }
    { // weighted after, though every pair has a row of x
        block_maker b;
        b.make();
        b.x->ne[1] = b.k;
        CHECK(!b.read());
    }
    { // rows that are not next to each other
        block_maker b;
        b.weighs_input = true;
        b.make();
        b.x->nb[1] *= 2;
        CHECK(!b.read());
    }
}

// The kernels take the router's weights before the experts run: a graph that computes them later is left to ggml.
void test_weights_of_the_block() {
    const auto reads = [](size_t before) {
        block_maker b;
        b.make();
        ggml_tensor * probs       = b.g.input("probs", 1, n_expert, n_tokens);
        ggml_tensor * gathered    = b.g.node(GGML_OP_GET_ROWS, {1, b.k, n_tokens}, {probs, b.ids});
        b.pairs->src[1]           = b.g.node(GGML_OP_RESHAPE, {1, b.k, n_tokens}, {gathered});
        b.pairs->src[1]->view_src = gathered;
        std::rotate(b.g.nodes.begin() + static_cast<std::ptrdiff_t>(before), b.g.nodes.end() - 2, b.g.nodes.end());
        const auto read = b.read();
        return read && read->weights == b.pairs->src[1];
    };
    CHECK(reads(0));
    CHECK(!reads(1)); // between up and gate
    CHECK(!reads(4)); // after the last product
}

void test_situ() {
    for (const float linear_beta : {0.0f, 25.0f}) {
        block_maker b;
        b.is_situ     = true;
        b.linear_beta = linear_beta;
        b.make();
        const auto read = b.read();
        CHECK(read && read->layer.op == ffn_op::situ && read->layer.alpha == 4.0f);
        CHECK(read && read->layer.limit == linear_beta && read->layer.gate.data == b.gate->src[0]->data);
    }
    const auto refused = [](auto && change) {
        block_maker b;
        b.is_situ = true;
        b.make();
        ggml_tensor * act = b.hidden->src[0];
        change(act->src[0], act->src[1]); // the outer scale, the sigmoid
        return !b.read().has_value();
    };
    CHECK(!refused([](ggml_tensor *, ggml_tensor *) {}));
    CHECK(refused([](ggml_tensor * outer, ggml_tensor *) { set_param(outer, 0, 3.0f); }));
    CHECK(refused([](ggml_tensor * outer, ggml_tensor *) { set_param(outer, 1, 0.5f); }));
    CHECK(refused([](ggml_tensor * outer, ggml_tensor *) { set_param(outer->src[0]->src[0], 1, 0.5f); }));
    CHECK(refused([](ggml_tensor * outer, ggml_tensor *) { outer->src[0]->op_params[0] = GGML_UNARY_OP_SILU; }));
    CHECK(refused([](ggml_tensor *, ggml_tensor * sigmoid) { sigmoid->op_params[0] = GGML_UNARY_OP_SILU; }));
    CHECK(refused([](ggml_tensor * outer, ggml_tensor * sigmoid) { sigmoid->src[0] = outer; }));
}

void test_tail() {
    for (const int64_t k : {1, 2}) {
        block_maker b;
        b.k        = k;
        b.has_cont = k == 1;
        b.make();
        const auto n = static_cast<int>(b.g.nodes.size());
        scale(b.g, scale(b.g, b.sum, 0.3f), 2.0f);
        const auto read = b.read();
        CHECK(read && read->y == b.sum && read->tail == n && b.end == n + 2);
    }
    { // it reads pairs, which the kernels do not write
        block_maker b;
        b.make();
        ggml_tensor * other = row(b.g, b.pairs, 1);
        scale(b.g, b.sum, 0.3f);
        b.g.node(GGML_OP_ADD, {n_embd, n_tokens}, {b.g.nodes.back(), other});
        CHECK(!b.read());
    }
    { // the sum itself is wanted outside, the scaled one too
        block_maker b;
        b.make();
        scale(b.g, b.sum, 0.3f);
        b.sum->flags |= GGML_TENSOR_FLAG_OUTPUT;
        b.g.nodes.back()->flags |= GGML_TENSOR_FLAG_OUTPUT;
        CHECK(b.read().has_value());
        b.hidden->flags |= GGML_TENSOR_FLAG_OUTPUT;
        CHECK(!b.read());
    }
}

} // namespace

int main() {
    test_plain();
    test_one_expert_a_token();
    test_weighted_input();
    test_weights_of_the_block();
    test_situ();
    test_tail();
    return check::report();
}
