// Reads a matched block's graph as one call of our CPU kernels.
#pragma once

#include "kernels/moe_kernels.h"
#include "match.h"

#include <algorithm>
#include <cstring>
#include <optional>

namespace hybrimoe {

// A block in the kernels' terms: the layer's weights, and the tensors that hold this step's input and output.
struct described_block {
    kernels::moe_layer layer;
    // [n_embd, 1, n_tokens] float32; with layer.weights_on_input [n_embd, top_k, n_tokens], already weighted
    const ggml_tensor * x       = nullptr;
    const ggml_tensor * weights = nullptr; // [1, top_k, n_tokens] float32; null: the pairs' results are only summed
    ggml_tensor * y      = nullptr; // [n_embd, n_tokens] or, of one expert a token, [n_embd, 1, n_tokens] float32
    size_t y_token_bytes = 0;       // from one token's row of y to the next one's
    // Index of the first of the block's last nodes that work on y alone (minicpm scales it) and are left to ggml;
    // block.end when there are none.
    int tail = 0;

    int64_t x_rows_per_token() const { return layer.weights_on_input ? x->ne[1] : 1; }
    // One token's router weights, contiguous; all are one where the input was weighted.
    void take_weights(int64_t token, int32_t top_k, float * out) const {
        if (weights == nullptr) {
            std::fill(out, out + top_k, 1.0f);
            return;
        }
        const auto * row = static_cast<const char *>(weights->data) + static_cast<size_t>(token) * weights->nb[2];
        std::memcpy(out, row, static_cast<size_t>(top_k) * sizeof(float));
    }
};

// Supplies ggml's own dot product for a weight type that the kernels do not know; null when there is none.
using external_types = const kernels::external_type * (*)(ggml_type type, void * context);

// Where the host reads biases and scales. By default where they are; a device's have copies.
class small_weights {
public:
    virtual ~small_weights() = default;
    virtual const float * of(const ggml_tensor * weight) { return static_cast<const float *>(weight->data); }
};

// Empty when the block holds anything that the kernels cannot express; it is then run by ggml's kernels.
std::optional<described_block> describe(ggml_tensor ** nodes, const moe_block & block, external_types external,
                                        void * context, small_weights * small = nullptr);

} // namespace hybrimoe
