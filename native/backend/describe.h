// Reads a matched block's graph as one call of our CPU kernels.
#pragma once

#include "kernels/moe_kernels.h"
#include "match.h"

#include <optional>

namespace hybrimoe {

// A block in the kernels' terms: the layer's weights, and the tensors that hold this step's input and output.
struct described_block {
    kernels::moe_layer layer;
    const ggml_tensor * x       = nullptr; // [n_embd, 1, n_tokens] float32
    const ggml_tensor * weights = nullptr; // [1, top_k, n_tokens] float32
    ggml_tensor * y             = nullptr; // [n_embd, n_tokens] float32: the block's last node
};

// Supplies ggml's own dot product for a weight type that the kernels do not know; null when there is none.
using external_types = const kernels::external_type * (*)(ggml_type type, void * context);

// Empty when the block holds anything that the kernels cannot express; it is then run by ggml's kernels.
std::optional<described_block> describe(ggml_tensor ** nodes, const moe_block & block, external_types external,
                                        void * context);

} // namespace hybrimoe
