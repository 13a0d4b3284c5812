// Finds the MoE blocks in a graph that the scheduler hands over.
#pragma once

#include "ggml.h"

#include <cstdint>
#include <vector>

namespace hybrimoe {

// One layer's MoE block as index ranges of the graph's nodes: [begin, experts) is the router, [experts, merge) the
// expert FFNs, [merge, end) the weighted sum over a token's experts. Running the three ranges in order is running the
// graph.
struct moe_block {
    int begin   = 0;
    int experts = 0;
    int merge   = 0;
    int end     = 0;

    int layer                  = 0; // llama.cpp's layer index
    int64_t n_expert           = 0;
    const ggml_tensor * ids    = nullptr; // [top_k, n_tokens] int32, rows may be strided (a view of the argsort)
    const ggml_tensor * router = nullptr; // router weight [n_embd, n_expert]; null when the router runs elsewhere

    int64_t top_k() const { return ids->ne[0]; }
    int64_t n_tokens() const { return ids->ne[1]; }
};

// A graph is a sequence of blocks and of stretches that hold no complete block.
struct segment {
    bool is_block = false;
    moe_block block; // valid if is_block; else only begin and end are, and layer if the stretch has expert operations
    bool has_experts = false;
};

// Splits the nodes [0, n_nodes) into segments, in order and without gaps, into `out` (cleared first). A block is
// recognised when its expert operations share one ids tensor, everything between them is row-wise over (token, expert)
// pairs, and what follows sums over each token's experts or hands all pairs on. Whatever else holds experts is a
// segment with is_block false.
void find_segments(ggml_tensor ** nodes, int n_nodes, std::vector<segment> & out);

// The ranges of what begins with the expert product nodes[first], without a router; whether it is a block.
bool find_block(ggml_tensor ** nodes, int n_nodes, int first, moe_block & out);

} // namespace hybrimoe
