// Which operations the plug-in takes from llama.cpp's graph: a layer's MoE block, and nothing around it.
#pragma once

#include "ggml-backend.h"
#include "ggml.h"

namespace hybrimoe {

// Answers the scheduler's supports_op. The answer depends on the graph's structure only, never on run-time state,
// because llama.cpp reuses a graph together with its splits.
//
// Claimed are: MUL_MAT with a router weight, MUL_MAT_ID with experts, and every row-wise operation whose inputs all
// come from those (scores, top-k, weights, activation, weighted sum). The first operation that mixes in anything else,
// such as the residual or a shared expert, is refused and ends the block.
bool claims(const ggml_tensor * op, ggml_backend_buffer_type_t own_buffer_type, ggml_backend_dev_t cpu);

} // namespace hybrimoe
