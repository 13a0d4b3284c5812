// The graph of expert FFNs over (token, expert) pairs, for any ggml backend.
#pragma once

#include "accelerator/expert_layout.h"
#include "accelerator/slot_set.h"

#include "ggml.h"

#include <array>

namespace hybrimoe {

// A layer's experts as tensors in the order of layout.parts: slots on a device, or the whole layer in host memory.
using expert_tensors = std::array<ggml_tensor *, max_expert_parts>;

expert_tensors tensors_of(const slot_set & slots, const expert_layout & layout);
// Tensors [.., n_expert] over the host's memory, made in `context`.
expert_tensors host_tensors(ggml_context * context, const expert_layout & layout);

// One number a pair, [1, n_k, n_tokens] float32; null where the layer has no such scale.
struct pair_scales {
    ggml_tensor * gate = nullptr;
    ggml_tensor * up   = nullptr;
    ggml_tensor * down = nullptr;
};

// Rows [n_embd, n_k, n_tokens] for x [n_embd, 1, n_tokens], or [n_embd, n_k, n_tokens] with a row for every pair, and
// ids [n_k, n_tokens] (indices into the tensors): bias and scale of the last product applied, router weights not.
ggml_tensor * build_ffn(ggml_context * context, const expert_layout & layout, const expert_tensors & experts,
                        ggml_tensor * x, ggml_tensor * ids, const pair_scales & scales);

// Upper bound of the nodes that build_ffn makes, views included.
constexpr size_t max_ffn_nodes = 24;

} // namespace hybrimoe
