// Portable kernels: every CPU that has no set of its own, and what the other sets are checked against.
#include <cmath>

#include "block_layout.h"
#include "kernel_set.h"

namespace hybrimoe::kernels {

namespace {

// Below this a block is taken as zero: 127 / amax would overflow. (ggml's half-precision scale is zero there too.)
constexpr float smallest_amax = 1e-36f;

// Non-finite values must reach the result: an integer comparison keeps NaN on top of infinity.
uint32_t largest_magnitude_bits(const float * x, int n) {
    uint32_t largest = 0;
    for (int i = 0; i < n; ++i) {
        const uint32_t bits = float_to_bits(x[i]) & 0x7fffffffu;
        largest             = bits > largest ? bits : largest;
    }
    return largest;
}

void quantize_32(const float * x, int64_t n, void * row) {
    auto * out = static_cast<row_block32 *>(row);
    for (int64_t b = 0; b < n / 32; ++b, x += 32) {
        const float amax  = bits_to_float(largest_magnitude_bits(x, 32));
        const bool normal = amax >= smallest_amax && std::isfinite(amax);
        const float scale = normal ? 127.0f / amax : 0.0f;
        int sum           = 0;
        for (int i = 0; i < 32; ++i) {
            const int q = normal ? static_cast<int>(std::nearbyintf(x[i] * scale)) : 0;
            out[b].q[i] = static_cast<int8_t>(q);
            sum += q;
        }
        out[b].d   = amax < smallest_amax ? 0.0f : amax / 127.0f;
        out[b].sum = static_cast<float>(sum);
    }
}

void quantize_256(const float * x, int64_t n, void * row) {
    auto * out = static_cast<row_block256 *>(row);
    for (int64_t b = 0; b < n / 256; ++b, x += 256) {
        const uint32_t bits = largest_magnitude_bits(x, 256);
        const float amax    = bits_to_float(bits);
        const bool normal   = amax >= smallest_amax && std::isfinite(amax);
        float max           = amax;
        for (int i = 255; i >= 0; --i) {
            if ((float_to_bits(x[i]) & 0x7fffffffu) == bits) {
                max = x[i];
            }
        }
        const float scale = normal ? -127.0f / max : 0.0f;
        for (int s = 0; s < 16; ++s) {
            int sum = 0;
            for (int i = 16 * s; i < 16 * s + 16; ++i) {
                const int q = normal ? static_cast<int>(std::nearbyintf(x[i] * scale)) : 0;
                out[b].q[i] = static_cast<int8_t>(q);
                sum += q;
            }
            out[b].sum16[s] = static_cast<float>(sum);
        }
        for (int g = 0; g < 8; ++g) {
            out[b].sum32[g] = out[b].sum16[2 * g] + out[b].sum16[2 * g + 1];
        }
        out[b].d = normal ? 1.0f / scale : (amax < smallest_amax ? 0.0f : amax);
    }
}

float dot_group(const group32 & w, const int8_t * x, float sum) {
    int dot[2] = {0, 0};
    for (int i = 0; i < 32; ++i) {
        dot[i / 16] += w.q[i] * x[i];
    }
    return w.a[0] * static_cast<float>(dot[0]) + w.a[1] * static_cast<float>(dot[1]) + w.b * sum;
}

template <int type, act_format format> void dot_quantised(const dot_args & args) {
    for (int64_t r = 0; r < args.n_rows; ++r) {
        const uint8_t * row = args.rows + static_cast<size_t>(r) * args.row_bytes;
        float sum[8]        = {};
        for (int64_t g = 0; g < args.n_values / 32; ++g) {
            group32 w;
            unpack_group(type, row, g, &w);
            for (int t = 0; t < args.n_x; ++t) {
                if constexpr (format == act_format::q8_32) {
                    const auto & x = static_cast<const row_block32 *>(args.x[t])[g];
                    sum[t] += x.d * dot_group(w, x.q, x.sum);
                } else {
                    const auto & x = static_cast<const row_block256 *>(args.x[t])[g / 8];
                    sum[t] += x.d * dot_group(w, x.q + 32 * (g % 8), x.sum32[g % 8]);
                }
            }
        }
        for (int t = 0; t < args.n_x; ++t) {
            args.out[t][r] = sum[t];
        }
    }
}

template <int type> void dot_float(const dot_args & args) {
    constexpr int64_t step = 64;
    for (int64_t r = 0; r < args.n_rows; ++r) {
        const uint8_t * row = args.rows + static_cast<size_t>(r) * args.row_bytes;
        float sum[8]        = {};
        for (int64_t i0 = 0; i0 < args.n_values; i0 += step) {
            const int64_t n = args.n_values - i0 < step ? args.n_values - i0 : step;
            float w[step];
            dequantize_row(type, row + i0 * (type == type_f32 ? 4 : 2), w, n);
            for (int t = 0; t < args.n_x; ++t) {
                const float * x = static_cast<const float *>(args.x[t]) + i0;
                for (int64_t i = 0; i < n; ++i) {
                    sum[t] += w[i] * x[i];
                }
            }
        }
        for (int t = 0; t < args.n_x; ++t) {
            args.out[t][r] = sum[t];
        }
    }
}

float sigmoid(float x) {
    return 1.0f / (1.0f + std::exp(-x));
}

// The comparisons keep NaN, as std::min and std::clamp do in ggml.
float at_most(float x, float limit) {
    return limit < x ? limit : x;
}
float clamp(float x, float limit) {
    return limit < x ? limit : (x < -limit ? -limit : x);
}

// ggml saturates outside of +-10
float gelu(float x) {
    if (x <= -10.0f) {
        return 0.0f;
    }
    return x >= 10.0f ? x : 0.5f * x * (1.0f + std::tanh(0.79788456080286535588f * x * (1.0f + 0.044715f * x * x)));
}

float gelu_erf(float x) {
    return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752440f));
}

float glu_one(ffn_op op, float alpha, float limit, float g, float u) {
    switch (op) {
    case ffn_op::reglu:
        return g > 0.0f ? g * u : 0.0f;
    case ffn_op::geglu:
        return gelu(g) * u;
    case ffn_op::swiglu:
        return g * sigmoid(g) * u;
    case ffn_op::swiglu_oai: {
        const float x = at_most(g, limit);
        return x * sigmoid(alpha * x) * (clamp(u, limit) + 1.0f);
    }
    case ffn_op::geglu_erf:
        return gelu_erf(g) * u;
    case ffn_op::geglu_quick:
        return g * sigmoid(1.702f * g) * u;
    case ffn_op::swiglu_clamp: {
        const float x = at_most(g, limit);
        return x * sigmoid(x) * clamp(u, limit);
    }
    case ffn_op::swiglu_limit:
        return at_most(g * sigmoid(g), limit) * clamp(u, limit);
    case ffn_op::situ: {
        const float linear = limit > 0.0f ? limit * std::tanh(u / limit) : u;
        return alpha * std::tanh(g / alpha) * sigmoid(g) * linear;
    }
    case ffn_op::silu:
        return u * sigmoid(u);
    case ffn_op::gelu:
        return gelu(u);
    case ffn_op::gelu_erf:
        return gelu_erf(u);
    case ffn_op::gelu_quick:
        return u * sigmoid(1.702f * u);
    case ffn_op::relu:
        return u > 0.0f ? u : 0.0f;
    case ffn_op::relu_sqr:
        return u > 0.0f ? u * u : 0.0f;
    }
    return 0.0f;
}

void add_scaled(float * y, const float * x, float w, int64_t n, bool first) {
    for (int64_t i = 0; i < n; ++i) {
        y[i] = first ? w * x[i] : y[i] + w * x[i];
    }
}

constexpr type_kernels types[] = {
    {type_f32, dot_float<type_f32>, nullptr, nullptr},
    {type_f16, dot_float<type_f16>, nullptr, nullptr},
    {type_bf16, dot_float<type_bf16>, nullptr, nullptr},
    {type_q4_0, dot_quantised<type_q4_0, act_format::q8_32>, nullptr, nullptr},
    {type_q4_1, dot_quantised<type_q4_1, act_format::q8_32>, nullptr, nullptr},
    {type_q8_0, dot_quantised<type_q8_0, act_format::q8_32>, nullptr, nullptr},
    {type_iq4_nl, dot_quantised<type_iq4_nl, act_format::q8_32>, nullptr, nullptr},
    {type_mxfp4, dot_quantised<type_mxfp4, act_format::q8_32>, nullptr, nullptr},
    {type_q4_k, dot_quantised<type_q4_k, act_format::q8_256>, nullptr, nullptr},
    {type_q5_k, dot_quantised<type_q5_k, act_format::q8_256>, nullptr, nullptr},
    {type_q6_k, dot_quantised<type_q6_k, act_format::q8_256>, nullptr, nullptr},
    {type_iq4_xs, dot_quantised<type_iq4_xs, act_format::q8_256>, nullptr, nullptr},
    {-1, nullptr, nullptr, nullptr},
};

} // namespace

void glu_scalar(ffn_op op, float alpha, float limit, const float * gate, const float * up, float * out, int64_t n) {
    const bool gated = is_gated(op);
    for (int64_t i = 0; i < n; ++i) {
        out[i] = glu_one(op, alpha, limit, gated ? gate[i] : 0.0f, up[i]);
    }
}

const kernel_set kernels_scalar = {
    "scalar", 8, 1 << 30, false, quantize_32, quantize_256, nullptr, nullptr, nullptr, glu_scalar, add_scaled, types,
};

} // namespace hybrimoe::kernels
