#include "random_weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>

namespace hybrimoe::probe {

namespace {

constexpr int64_t n_different_rows = 64;

} // namespace

std::vector<float> random_values(size_t n, float scale) {
    std::mt19937 random(1);
    std::normal_distribution<float> gauss(0.0f, scale);
    std::vector<float> values(n);
    std::generate(values.begin(), values.end(), [&]() { return gauss(random); });
    return values;
}

std::vector<uint8_t> random_rows(ggml_type type, int64_t n_in, int64_t n_rows) {
    if (type < 0 || type >= GGML_TYPE_COUNT || ggml_blck_size(type) <= 0 || ggml_type_size(type) == 0) {
        throw std::invalid_argument("ggml has no type " + std::to_string(static_cast<int>(type)));
    }
    if (n_in <= 0 || n_in % ggml_blck_size(type) != 0) {
        throw std::invalid_argument("rows of " + std::to_string(n_in) + " weights are not whole blocks of " +
                                    ggml_type_name(type));
    }
    const int64_t n_made   = std::min(n_rows, n_different_rows);
    const auto values      = random_values(static_cast<size_t>(n_made * n_in), 1.0f / std::sqrt(float(n_in)));
    const size_t row_bytes = ggml_row_size(type, n_in);
    std::vector<uint8_t> rows(row_bytes * static_cast<size_t>(n_rows));
    const std::vector<float> importance(static_cast<size_t>(n_in), 1.0f);
    const size_t n_written = ggml_quantize_chunk(type, values.data(), rows.data(), 0, n_made, n_in, importance.data());
    if (n_written != row_bytes * static_cast<size_t>(n_made)) {
        throw std::invalid_argument(std::string("ggml cannot make weights of type ") + ggml_type_name(type));
    }
    for (size_t filled = n_written; filled < rows.size();) {
        const size_t n = std::min(filled, rows.size() - filled);
        std::memcpy(rows.data() + filled, rows.data(), n);
        filled += n;
    }
    return rows;
}

} // namespace hybrimoe::probe
