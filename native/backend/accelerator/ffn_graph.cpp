#include "accelerator/ffn_graph.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace hybrimoe {

namespace {

using kernels::ffn_op;

void set_param(ggml_tensor * t, int index, float value) {
    std::memcpy(&t->op_params[index], &value, sizeof(value));
}

ggml_tensor * activate_ungated(ggml_context * context, ffn_op op, ggml_tensor * up) {
    switch (op) {
    case ffn_op::silu:
        return ggml_silu(context, up);
    case ffn_op::gelu:
        return ggml_gelu(context, up);
    case ffn_op::gelu_erf:
        return ggml_gelu_erf(context, up);
    case ffn_op::gelu_quick:
        return ggml_gelu_quick(context, up);
    case ffn_op::relu_sqr:
        return ggml_sqr(context, ggml_relu(context, up));
    default:
        return ggml_relu(context, up);
    }
}

// beta tanh(t / beta)
ggml_tensor * bound(ggml_context * context, ggml_tensor * t, float beta) {
    return ggml_scale(context, ggml_tanh(context, ggml_scale(context, t, 1.0f / beta)), beta);
}

ggml_tensor * activate_gated(ggml_context * context, const expert_layout & layout, ggml_tensor * gate,
                             ggml_tensor * up) {
    if (layout.op == ffn_op::swiglu_limit) {
        const float infinity = std::numeric_limits<float>::infinity();
        ggml_tensor * act    = ggml_clamp(context, ggml_silu(context, gate), -infinity, layout.limit);
        return ggml_mul(context, act, ggml_clamp(context, up, -layout.limit, layout.limit));
    }
    if (layout.op == ffn_op::situ) { // the operations of llama.cpp's graph, for the same bits
        ggml_tensor * act = ggml_mul(context, bound(context, gate, layout.alpha), ggml_sigmoid(context, gate));
        return ggml_mul(context, act, layout.limit > 0.0f ? bound(context, up, layout.limit) : up);
    }
    ggml_tensor * h = ggml_glu_split(context, gate, up, static_cast<ggml_glu_op>(layout.op));
    set_param(h, 2, layout.alpha);
    set_param(h, 3, layout.limit);
    return h;
}

class ffn_builder {
public:
    ffn_builder(ggml_context * context, const expert_layout & layout, const expert_tensors & experts, ggml_tensor * ids,
                const pair_scales & scales)
        : context_(context), layout_(layout), experts_(experts), ids_(ids), scales_(scales) {}

    ggml_tensor * build(ggml_tensor * x) {
        ggml_tensor * h = hidden(x);
        return linear(h, part_role::down, part_role::down_bias, scales_.down);
    }

private:
    ggml_tensor * find(part_role role) const {
        for (size_t i = 0; i < layout_.parts.size(); i++) {
            if (layout_.parts[i].role == role) {
                return experts_[i];
            }
        }
        return nullptr;
    }

    ggml_tensor * linear(ggml_tensor * x, part_role weight, part_role bias, ggml_tensor * scale) const {
        ggml_tensor * rows = ggml_mul_mat_id(context_, find(weight), x, ids_);
        if (scale != nullptr) {
            rows = ggml_mul(context_, rows, scale);
        }
        ggml_tensor * b = find(bias);
        return b == nullptr ? rows : ggml_add_id(context_, rows, b, ids_);
    }

    ggml_tensor * half(ggml_tensor * merged, size_t offset) const {
        return ggml_view_3d(context_, merged, layout_.n_ff, merged->ne[1], merged->ne[2], merged->nb[1], merged->nb[2],
                            offset);
    }

    ggml_tensor * hidden(ggml_tensor * x) const {
        if (!kernels::is_gated(layout_.op)) {
            return activate_ungated(context_, layout_.op, linear(x, part_role::up, part_role::up_bias, scales_.up));
        }
        if (find(part_role::gate_up) != nullptr) {
            ggml_tensor * merged = linear(x, part_role::gate_up, part_role::gate_up_bias, scales_.gate);
            return activate_gated(context_, layout_, half(merged, 0),
                                  half(merged, static_cast<size_t>(layout_.n_ff) * sizeof(float)));
        }
        ggml_tensor * up   = linear(x, part_role::up, part_role::up_bias, scales_.up);
        ggml_tensor * gate = linear(x, part_role::gate, part_role::gate_bias, scales_.gate);
        return activate_gated(context_, layout_, gate, up);
    }

    ggml_context * context_;
    const expert_layout & layout_;
    const expert_tensors & experts_;
    ggml_tensor * ids_;
    const pair_scales & scales_;
};

} // namespace

expert_tensors tensors_of(const slot_set & slots, const expert_layout & layout) {
    expert_tensors tensors{};
    for (size_t i = 0; i < layout.parts.size(); i++) {
        tensors[i] = slots.part(i);
    }
    return tensors;
}

expert_tensors host_tensors(ggml_context * context, const expert_layout & layout) {
    expert_tensors tensors{};
    for (size_t i = 0; i < layout.parts.size(); i++) {
        const expert_part & part = layout.parts[i];
        ggml_tensor * t          = part.is_matrix()
                                       ? ggml_new_tensor_3d(context, part.type, part.n_in, part.n_out, layout.n_expert)
                                       : ggml_new_tensor_2d(context, part.type, part.n_in, layout.n_expert);
        // Only read; ggml's tensors have no pointer to const.
        t->data         = const_cast<char *>(part.host);
        const int outer = part.is_matrix() ? 2 : 1;
        t->nb[outer]    = part.stride_bytes;
        for (int d = outer + 1; d < GGML_MAX_DIMS; d++) {
            t->nb[d] = t->nb[d - 1] * static_cast<size_t>(t->ne[d - 1]);
        }
        tensors[i] = t;
    }
    return tensors;
}

ggml_tensor * build_ffn(ggml_context * context, const expert_layout & layout, const expert_tensors & experts,
                        ggml_tensor * x, ggml_tensor * ids, const pair_scales & scales) {
    return ffn_builder(context, layout, experts, ids, scales).build(x);
}

} // namespace hybrimoe
