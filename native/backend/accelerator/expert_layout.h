// How the experts of a layer lie in host memory, part by part: what a copy into a slot moves, and what a graph on a
// device computes with.
#pragma once

#include "kernels/moe_kernels.h"

#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace hybrimoe {

enum class part_role : uint8_t { gate, up, gate_up, down, gate_bias, up_bias, gate_up_bias, down_bias };

// One matrix [n_in, n_out] or one bias vector [n_in] (n_out = 1) that every expert has.
struct expert_part {
    part_role role      = part_role::up;
    ggml_type type      = GGML_TYPE_F32;
    int64_t n_in        = 0;
    int64_t n_out       = 1;
    const char * host   = nullptr; // expert 0's; expert e's begins e * stride_bytes later
    size_t stride_bytes = 0;
    size_t n_bytes      = 0; // of one expert, contiguous

    bool is_matrix() const { return role <= part_role::down; }
};

// A layer's experts. Scales stay in host memory: one number a pair, handed over with the step's input.
struct expert_layout {
    int64_t n_embd           = 0;
    int64_t n_ff             = 0;
    int32_t n_expert         = 0;
    kernels::ffn_op op       = kernels::ffn_op::swiglu;
    float alpha              = 0.0f;
    float limit              = 0.0f;
    bool x_per_pair          = false;   // every (token, expert) pair has a row of x of its own, weighted by the router
    const float * scale_gate = nullptr; // [n_expert], also of a merged gate_up
    const float * scale_up   = nullptr;
    const float * scale_down = nullptr;
    std::vector<expert_part> parts;

    size_t expert_bytes() const;
    // Slots of one serve the other: parts of the same roles, types and shapes, and the same activation.
    bool same_class(const expert_layout & other) const;
};

// Empty when an expert cannot be moved as a few contiguous ranges.
std::optional<expert_layout> make_layout(const kernels::moe_layer & layer);

} // namespace hybrimoe
