#include "accelerator/expert_layout.h"

namespace hybrimoe {

namespace {

using kernels::expert_matrix;

class layout_maker {
public:
    layout_maker(const kernels::moe_layer & layer, expert_layout & out) : layer_(layer), out_(out) {}

    bool make() {
        out_.n_embd     = layer_.n_embd;
        out_.n_ff       = layer_.n_ff;
        out_.n_expert   = layer_.n_expert;
        out_.op         = layer_.op;
        out_.alpha      = layer_.alpha;
        out_.limit      = layer_.limit;
        out_.x_per_pair = layer_.weights_on_input;
        return add_gate_and_up() && add(layer_.down, part_role::down, layer_.n_ff, layer_.n_embd) &&
               add_bias(layer_.down, part_role::down_bias, layer_.n_embd);
    }

private:
    bool add_gate_and_up() {
        const expert_matrix & gate = layer_.gate;
        const expert_matrix & up   = layer_.up;
        out_.scale_up              = up.scale;
        out_.scale_down            = layer_.down.scale;
        if (!kernels::is_gated(layer_.op)) {
            return add(up, part_role::up, layer_.n_embd, layer_.n_ff) && add_bias(up, part_role::up_bias, layer_.n_ff);
        }
        out_.scale_gate = gate.scale;
        if (is_merged()) {
            // Situ scales gate and up, and ggml scales no halves of rows.
            return layer_.op != kernels::ffn_op::situ &&
                   add(gate, part_role::gate_up, layer_.n_embd, 2 * layer_.n_ff) &&
                   add_bias(gate, part_role::gate_up_bias, 2 * layer_.n_ff);
        }
        return add(gate, part_role::gate, layer_.n_embd, layer_.n_ff) &&
               add_bias(gate, part_role::gate_bias, layer_.n_ff) &&
               add(up, part_role::up, layer_.n_embd, layer_.n_ff) && add_bias(up, part_role::up_bias, layer_.n_ff);
    }

    // One tensor that holds gate rows, then up rows (kernels::split_gate_up made two of it).
    bool is_merged() const {
        const expert_matrix & gate = layer_.gate;
        const expert_matrix & up   = layer_.up;
        const auto * second  = static_cast<const char *>(gate.data) + static_cast<size_t>(layer_.n_ff) * gate.row_bytes;
        const bool bias_fits = gate.bias == nullptr ? up.bias == nullptr : up.bias == gate.bias + layer_.n_ff;
        return gate.type == up.type && up.data == second && gate.expert_bytes == up.expert_bytes &&
               gate.expert_bytes >= 2 * static_cast<size_t>(layer_.n_ff) * gate.row_bytes && gate.scale == up.scale &&
               bias_fits;
    }

    bool add(const expert_matrix & m, part_role role, int64_t n_in, int64_t n_out) {
        const auto type = static_cast<ggml_type>(m.type);
        if (m.row_bytes != ggml_row_size(type, n_in)) {
            return false;
        }
        out_.parts.push_back({role, type, n_in, n_out, static_cast<const char *>(m.data), m.expert_bytes,
                              m.row_bytes * static_cast<size_t>(n_out)});
        return true;
    }

    bool add_bias(const expert_matrix & m, part_role role, int64_t n) {
        if (m.bias != nullptr) {
            out_.parts.push_back({role, GGML_TYPE_F32, n, 1, reinterpret_cast<const char *>(m.bias), m.bias_bytes,
                                  sizeof(float) * static_cast<size_t>(n)});
        }
        return true;
    }

    const kernels::moe_layer & layer_;
    expert_layout & out_;
};

} // namespace

size_t expert_layout::expert_bytes() const {
    size_t sum = 0;
    for (const expert_part & part : parts) {
        sum += part.n_bytes;
    }
    return sum;
}

bool expert_layout::same_class(const expert_layout & other) const {
    if (op != other.op || alpha != other.alpha || limit != other.limit || x_per_pair != other.x_per_pair ||
        parts.size() != other.parts.size()) {
        return false;
    }
    for (size_t i = 0; i < parts.size(); i++) {
        const expert_part & a = parts[i];
        const expert_part & b = other.parts[i];
        if (a.role != b.role || a.type != b.type || a.n_in != b.n_in || a.n_out != b.n_out) {
            return false;
        }
    }
    return true;
}

std::optional<expert_layout> make_layout(const kernels::moe_layer & layer) {
    expert_layout out;
    if (!layout_maker(layer, out).make()) {
        return std::nullopt;
    }
    return out;
}

} // namespace hybrimoe
