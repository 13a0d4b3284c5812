// What the router gave every expert, for policies that look at more than the chosen ones.
#pragma once

#include "match.h"

#include <vector>

namespace hybrimoe {

// The router's scores among a block's nodes: after softmax or sigmoid where it has one before the choice of experts,
// else the logits (then is_logits). Null when the router runs elsewhere.
struct router_scores {
    const ggml_tensor * tensor = nullptr; // [n_expert, n_tokens] float32
    int node                   = -1;      // its index; its memory may be reused by the nodes after it
    bool is_logits             = false;
};
router_scores find_scores(ggml_tensor ** nodes, const moe_block & block);
// Copies [n_expert, n_tokens] to `out`, turning logits into probabilities.
void take_scores(const router_scores & scores, std::vector<float> & out);
// The same from a copy of the tensor's values.
void take_scores(const router_scores & scores, const float * values, std::vector<float> & out);

} // namespace hybrimoe
