// Words that every part of the core shares.
#pragma once

#include <cstdint>

namespace hybrimoe {

constexpr int max_devices   = 8;    // accelerators, each with its own link
constexpr int max_experts   = 1024; // per layer
constexpr int max_layers    = 1024;
constexpr int max_lookahead = 3;  // layers ahead for which a caller may pass look-ahead scores
constexpr int cpu_device    = -1; // "device" of an expert that the CPU computes, or that no accelerator holds

struct model_shape {
    int n_layers = 0; // MoE layers
    int n_expert = 0; // experts per layer
    int top_k    = 0;

    int n_keys() const { return n_layers * n_expert; }
    int key(int layer, int expert) const { return layer * n_expert + expert; }
    int layer_of(int key) const { return key / n_expert; }
    int expert_of(int key) const { return key % n_expert; }
};

// What the router of one layer said in one step. Nothing is owned; all pointers last for the call only.
struct router_step {
    int layer                = 0;
    const int32_t * experts  = nullptr; // [n_experts] distinct, in order of first appearance
    const int32_t * n_tokens = nullptr; // [n_experts] tokens routed to each
    int n_experts            = 0;

    int n_rows            = 0;       // tokens of the step
    int top_k             = 0;       // experts per token
    const int32_t * ids   = nullptr; // [n_rows, top_k]
    const float * scores  = nullptr; // [n_rows, n_expert] softmax router scores, or null
    const float * weights = nullptr; // [n_rows, top_k] weights of the chosen experts, or null
};

} // namespace hybrimoe
