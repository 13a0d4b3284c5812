#include "describe.h"

#include <algorithm>
#include <cmath>

namespace hybrimoe {

namespace {

using kernels::expert_matrix;
using kernels::ffn_op;

const ggml_tensor * without_views(const ggml_tensor * t) {
    return t->view_src != nullptr ? t->view_src : t;
}

const ggml_tensor * without_reshape(const ggml_tensor * t) {
    while (t->op == GGML_OP_RESHAPE) {
        t = t->src[0];
    }
    return t;
}

// One of the block's linear maps: an expert product with its scale and bias, or one half of a merged gate_up.
struct linear_map {
    expert_matrix matrix;
    const ggml_tensor * input = nullptr;
    int64_t n_in              = 0;
    int64_t n_out             = 0;
};

class reader {
public:
    reader(ggml_tensor ** nodes, const moe_block & block, external_types external, void * context,
           small_weights & small)
        : nodes_(nodes), block_(block), external_(external), context_(context), small_(small) {}

    std::optional<described_block> read() {
        described_block out;
        linear_map down;
        out.layer.n_expert = static_cast<int32_t>(block_.n_expert);
        if (!read_merge(out, down) || !read_hidden(without_reshape(down.input), out)) {
            return std::nullopt;
        }
        out.layer.down   = down.matrix;
        out.layer.n_ff   = down.n_in;
        out.layer.n_embd = down.n_out;
        if (!is_consistent(out) || kernels::check_layer(out.layer) != nullptr) {
            return std::nullopt;
        }
        return out;
    }

private:
    // From the last expert product to the block's end: scale, bias, router weights, the sum in ggml's order, and what
    // is done to the sum alone.
    bool read_merge(described_block & out, linear_map & down) {
        ggml_tensor * pairs = nodes_[block_.merge - 1];
        ggml_tensor * sum   = nullptr;
        int64_t n_adds      = 0;
        last_pairs_         = pairs;
        out.tail            = block_.merge;
        for (; out.tail < block_.end; out.tail++) {
            ggml_tensor * t = nodes_[out.tail];
            if (t->op == GGML_OP_MUL && sum == nullptr && t->src[0] == pairs && is_router_weight(t->src[1])) {
                if (out.weights != nullptr) {
                    return false;
                }
                out.weights = t->src[1];
                pairs       = t;
            } else if ((t->op == GGML_OP_MUL || t->op == GGML_OP_ADD_ID) && sum == nullptr && t->src[0] == pairs &&
                       out.weights == nullptr) {
                pairs = t;
                down_ = t;
            } else if (t->op == GGML_OP_ADD && adds_next(t, sum, n_adds + 1)) {
                sum = t;
                n_adds++;
            } else if (t->op == GGML_OP_CONT && block_.top_k() == 1 && sum == nullptr && is_row(t->src[0], 0)) {
                sum = t; // of one expert a token: llama.cpp copies the pairs
            } else if (!is_passive(t)) {
                break;
            }
            last_pairs_ = pairs;
        }
        if (n_adds != block_.top_k() - 1) {
            return false;
        }
        // Without a node of its own the sum of single pairs is the pairs, [n_embd, 1, n_tokens].
        out.y                      = sum != nullptr ? sum : pairs;
        out.y_token_bytes          = sum != nullptr ? sum->nb[1] : pairs->nb[2];
        out.layer.weights_on_input = out.weights == nullptr;
        const ggml_tensor * mapped = down_ != nullptr ? down_ : nodes_[block_.merge - 1];
        return is_tail(out) && read_linear(mapped, down);
    }

    // Whether the nodes from the tail on read nothing that the kernels do not compute.
    bool is_tail(const described_block & out) const {
        for (int i = out.tail; i < block_.end; i++) {
            for (const ggml_tensor * src : nodes_[i]->src) {
                if (src != nullptr && without_views(src) != out.y && is_between(without_views(src), out.tail)) {
                    return false;
                }
            }
        }
        return true;
    }

    bool is_between(const ggml_tensor * t, int end) const {
        return std::find(nodes_ + block_.experts, nodes_ + end, t) != nodes_ + end;
    }

    static bool is_passive(const ggml_tensor * t) {
        return t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_NONE ||
               t->op == GGML_OP_GET_ROWS || t->op == GGML_OP_REPEAT;
    }

    bool is_router_weight(const ggml_tensor * t) const {
        return t->type == GGML_TYPE_F32 && t->ne[0] == 1 && t->ne[1] == block_.top_k() &&
               t->ne[2] == block_.n_tokens() && t->nb[1] == sizeof(float) && read_scale(t) == nullptr;
    }

    // The per-expert factor behind MUL(product, GET_ROWS(REPEAT(scale), ids)); null for anything else.
    const ggml_tensor * read_scale(const ggml_tensor * factor) const {
        const ggml_tensor * rows = without_reshape(factor);
        if (rows->op != GGML_OP_GET_ROWS || rows->src[1] != block_.ids || rows->src[0]->op != GGML_OP_REPEAT) {
            return nullptr;
        }
        const ggml_tensor * scale = without_reshape(rows->src[0]->src[0]);
        const bool usable         = scale->op == GGML_OP_NONE && scale->type == GGML_TYPE_F32 &&
                                    scale->ne[0] == block_.n_expert && ggml_nelements(scale) == block_.n_expert &&
                                    ggml_is_contiguous(scale);
        return usable ? scale : nullptr;
    }

    // The sum adds the pairs' rows one after the other, k = 0 first.
    bool adds_next(const ggml_tensor * add, const ggml_tensor * sum, int64_t k) const {
        const bool starts = sum == nullptr && is_row(add->src[0], 0);
        return (starts || (sum != nullptr && add->src[0] == sum)) && is_row(add->src[1], k);
    }

    bool is_row(const ggml_tensor * view, int64_t k) const {
        return view->op == GGML_OP_VIEW && view->src[0] == last_pairs_ &&
               view->view_offs == static_cast<size_t>(k) * last_pairs_->nb[1] && view->ne[0] == last_pairs_->ne[0] &&
               view->ne[1] == block_.n_tokens();
    }

    bool read_linear(const ggml_tensor * t, linear_map & out) const {
        t = without_reshape(t);
        if (t->op == GGML_OP_ADD_ID) {
            const ggml_tensor * bias = t->src[1];
            if (t->src[2] != block_.ids || bias->type != GGML_TYPE_F32 || bias->nb[0] != sizeof(float)) {
                return false;
            }
            out.matrix.bias       = small_.of(bias);
            out.matrix.bias_bytes = bias->nb[1];
            t                     = t->src[0];
        }
        if (t->op == GGML_OP_MUL) {
            const ggml_tensor * scale = read_scale(t->src[1]);
            if (scale == nullptr) {
                return false;
            }
            out.matrix.scale = small_.of(scale);
            t                = t->src[0];
        }
        if (t->op != GGML_OP_MUL_MAT_ID || t->src[2] != block_.ids) {
            return false;
        }
        const ggml_tensor * w   = t->src[0];
        out.matrix.data         = w->data;
        out.matrix.type         = static_cast<int32_t>(w->type);
        out.matrix.row_bytes    = w->nb[1];
        out.matrix.expert_bytes = w->nb[2];
        out.input               = t->src[1];
        out.n_in                = w->ne[0];
        out.n_out               = w->ne[1];
        if (kernels::find_type(out.matrix.type) == nullptr) {
            out.matrix.external = external_(w->type, context_);
            return out.matrix.external != nullptr;
        }
        return true;
    }

    // Gate or up: a product of its own, or a view of one half of a merged product (gate rows first).
    bool read_half(const ggml_tensor * t, bool is_gate, linear_map & out) const {
        if (t->op != GGML_OP_VIEW) {
            return read_linear(t, out);
        }
        if (!read_linear(t->src[0], out) || t->ne[0] * 2 != out.n_out) {
            return false;
        }
        expert_matrix gate;
        expert_matrix up;
        kernels::split_gate_up(out.matrix, t->ne[0], &gate, &up);
        out.matrix = is_gate ? gate : up;
        out.n_out  = t->ne[0];
        return t->view_offs == (is_gate ? 0 : static_cast<size_t>(t->ne[0]) * t->nb[0]);
    }

    bool read_hidden(const ggml_tensor * h, described_block & out) {
        switch (h->op) {
        case GGML_OP_GLU:
            return read_glu(h, out);
        case GGML_OP_MUL:
            return h->src[0]->op == GGML_OP_CLAMP ? read_clamped_swiglu(h, out) : read_situ(h, out);
        case GGML_OP_SQR:
            return read_ungated(h->src[0], true, out);
        case GGML_OP_UNARY:
            return read_ungated(h, false, out);
        default:
            return false;
        }
    }

    bool read_glu(const ggml_tensor * h, described_block & out) {
        constexpr int swapped = 1; // index of ggml's "halves swapped" flag in op_params
        if (h->src[1] == nullptr || h->op_params[swapped] != 0) {
            return false;
        }
        const auto * params = reinterpret_cast<const float *>(h->op_params);
        switch (ggml_get_glu_op(h)) {
        case GGML_GLU_OP_SWIGLU_OAI:
            out.layer.alpha = params[2];
            out.layer.limit = params[3];
            break;
        case GGML_GLU_OP_SWIGLU_CLAMP:
            out.layer.limit = params[3];
            break;
        default:
            break;
        }
        out.layer.op = static_cast<ffn_op>(ggml_get_glu_op(h));
        return read_gated(h->src[0], h->src[1], out);
    }

    // MUL(CLAMP(silu(gate), -inf, limit), CLAMP(up, -limit, limit)): the unfused form that some architectures build.
    bool read_clamped_swiglu(const ggml_tensor * h, described_block & out) {
        const ggml_tensor * act = h->src[0];
        const ggml_tensor * up  = h->src[1];
        if (act->op != GGML_OP_CLAMP || up->op != GGML_OP_CLAMP || act->src[0]->op != GGML_OP_UNARY ||
            ggml_get_unary_op(act->src[0]) != GGML_UNARY_OP_SILU) {
            return false;
        }
        const auto * act_range = reinterpret_cast<const float *>(act->op_params);
        const auto * up_range  = reinterpret_cast<const float *>(up->op_params);
        if (!std::isinf(act_range[0]) || act_range[1] != up_range[1] || up_range[0] != -up_range[1]) {
            return false;
        }
        out.layer.op    = ffn_op::swiglu_limit;
        out.layer.limit = up_range[1];
        return read_gated(act->src[0]->src[0], up->src[0], out);
    }

    // SCALE(TANH(SCALE(inner, 1 / beta)), beta): returns inner, null for anything else.
    static const ggml_tensor * read_bounded(const ggml_tensor * t, float & beta) {
        if (t->op != GGML_OP_SCALE || !is_unary(t->src[0], GGML_UNARY_OP_TANH) ||
            t->src[0]->src[0]->op != GGML_OP_SCALE) {
            return nullptr;
        }
        const ggml_tensor * inner = t->src[0]->src[0];
        const auto * by           = reinterpret_cast<const float *>(t->op_params);
        const auto * inner_by     = reinterpret_cast<const float *>(inner->op_params);
        const bool is_plain       = by[1] == 0.0f && inner_by[1] == 0.0f; // op_params: factor, then summand
        if (!is_plain || !(by[0] > 0.0f) || inner_by[0] != 1.0f / by[0]) {
            return nullptr;
        }
        beta = by[0];
        return inner->src[0];
    }

    static bool is_unary(const ggml_tensor * t, ggml_unary_op op) {
        return t->op == GGML_OP_UNARY && ggml_get_unary_op(t) == op;
    }

    // MUL(MUL(bounded gate, sigmoid(gate)), up), up bounded or as it is: what llama.cpp builds for kimi-k3.
    bool read_situ(const ggml_tensor * h, described_block & out) {
        const ggml_tensor * act = h->src[0];
        if (act->op != GGML_OP_MUL || !is_unary(act->src[1], GGML_UNARY_OP_SIGMOID)) {
            return false;
        }
        const ggml_tensor * gate = read_bounded(act->src[0], out.layer.alpha);
        if (gate == nullptr || act->src[1]->src[0] != gate) {
            return false;
        }
        const ggml_tensor * up = read_bounded(h->src[1], out.layer.limit);
        out.layer.op           = ffn_op::situ;
        return read_gated(gate, up != nullptr ? up : h->src[1], out);
    }

    bool read_gated(const ggml_tensor * gate, const ggml_tensor * up, described_block & out) {
        linear_map gate_map;
        linear_map up_map;
        if (!read_half(gate, true, gate_map) || !read_half(up, false, up_map) ||
            without_reshape(gate_map.input) != without_reshape(up_map.input) || gate_map.n_out != up_map.n_out) {
            return false;
        }
        out.layer.gate = gate_map.matrix;
        out.layer.up   = up_map.matrix;
        out.x          = up_map.input;
        return true;
    }

    bool read_ungated(const ggml_tensor * act, bool squared, described_block & out) {
        if (act->op != GGML_OP_UNARY) {
            return false;
        }
        switch (ggml_get_unary_op(act)) {
        case GGML_UNARY_OP_SILU:
            out.layer.op = ffn_op::silu;
            break;
        case GGML_UNARY_OP_GELU:
            out.layer.op = ffn_op::gelu;
            break;
        case GGML_UNARY_OP_GELU_ERF:
            out.layer.op = ffn_op::gelu_erf;
            break;
        case GGML_UNARY_OP_GELU_QUICK:
            out.layer.op = ffn_op::gelu_quick;
            break;
        case GGML_UNARY_OP_RELU:
            out.layer.op = squared ? ffn_op::relu_sqr : ffn_op::relu;
            break;
        default:
            return false;
        }
        linear_map up;
        if ((squared && out.layer.op != ffn_op::relu_sqr) || !read_linear(act->src[0], up)) {
            return false;
        }
        out.layer.up = up.matrix;
        out.x        = up.input;
        return true;
    }

    // Whether the tensor holds its values before the first expert product: only what stands there is computed before
    // the kernels run. A view in the block of what was computed before it counts as computed.
    bool is_ready(const ggml_tensor * t) const {
        for (int i = block_.experts; t != nullptr && i < block_.end; i++) {
            const ggml_op op   = nodes_[i]->op;
            const bool is_view = op == GGML_OP_VIEW || op == GGML_OP_RESHAPE || op == GGML_OP_NONE;
            if (!is_view && without_views(nodes_[i]) == without_views(t)) {
                return false;
            }
        }
        return true;
    }

    // The kernels read one row of x per token or pair and write one row of y, and nothing in between may be wanted
    // outside.
    bool is_consistent(const described_block & out) const {
        const ggml_tensor * x = out.x;
        const ggml_tensor * y = out.y;
        if (!is_ready(x) || !is_ready(out.weights)) {
            return false;
        }
        for (int i = block_.experts; i < out.tail; i++) {
            if (nodes_[i] != y && (nodes_[i]->flags & GGML_TENSOR_FLAG_OUTPUT) != 0) {
                return false;
            }
        }
        const size_t row_bytes = static_cast<size_t>(out.layer.n_embd) * sizeof(float);
        const bool has_rows =
            out.layer.weights_on_input ? x->ne[1] == block_.top_k() && x->nb[1] == row_bytes : x->ne[1] == 1;
        return has_rows && x->type == GGML_TYPE_F32 && x->ne[0] == out.layer.n_embd && x->ne[2] == block_.n_tokens() &&
               x->nb[0] == sizeof(float) && y->type == GGML_TYPE_F32 && y->ne[0] == out.layer.n_embd &&
               y->nb[0] == sizeof(float) && is_last(y, out.tail);
    }

    bool is_last(const ggml_tensor * y, int end) const {
        for (int i = end - 1; i >= block_.merge; i--) {
            if (!is_passive(nodes_[i])) {
                return nodes_[i] == y;
            }
        }
        return nodes_[block_.merge - 1] == y;
    }

    ggml_tensor ** nodes_;
    const moe_block & block_;
    external_types external_;
    void * context_;
    small_weights & small_;
    const ggml_tensor * last_pairs_ = nullptr; // the pairs so far: scaled, biased, weighted
    const ggml_tensor * down_       = nullptr; // the last product with its scale and bias, when it has any
};

} // namespace

std::optional<described_block> describe(ggml_tensor ** nodes, const moe_block & block, external_types external,
                                        void * context, small_weights * small) {
    small_weights in_place;
    return reader(nodes, block, external, context, small == nullptr ? in_place : *small).read();
}

} // namespace hybrimoe
