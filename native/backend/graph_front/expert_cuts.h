// Where a graph that a device computes must be cut: in front of products with experts that lie in host memory.
#pragma once

#include "describe.h"
#include "match.h"
#include "router_scores.h"

#include "ggml.h"

#include <optional>
#include <vector>

namespace hybrimoe {

// Products of one layer that use the same ids.
struct expert_cut {
    std::vector<int> products; // nodes, MUL_MAT_ID
    moe_block block;           // of the graph's nodes; `begin` is that of the first product
    bool is_block = false;     // ... and it is one
    bool has_rows = true;      // false: a micro-batch's last layer without outputs
    // The whole MoE block in the terms of the kernels; without it each product is computed alone.
    std::optional<described_block> described;
    int sum = -1;                // with it: the node that holds the block's result
    router_scores scores;        // with it: null when the router runs elsewhere
    bool scores_are_kept = true; // whether their memory is not reused before the first product
};

// Whether a tensor is one of a model's experts in our host memory.
using is_expert_weight = bool (*)(const ggml_tensor * t);

// All cuts in the order of the graph.
std::vector<expert_cut> find_cuts(ggml_tensor ** nodes, int n_nodes, is_expert_weight is_ours, small_weights & small);

} // namespace hybrimoe
