// Weights that are valid for their type and sized like trained ones, made quickly.
#pragma once

#include "ggml.h"

#include <cstdint>
#include <vector>

namespace hybrimoe::probe {

// Rows [n_in] of `type`, n_rows of them, as bytes: a few random rows, quantised by ggml and repeated in turn.
// Throws std::invalid_argument for a type that ggml cannot make or a length that does not fit it.
std::vector<uint8_t> random_rows(ggml_type type, int64_t n_in, int64_t n_rows);

std::vector<float> random_values(size_t n, float scale);

} // namespace hybrimoe::probe
