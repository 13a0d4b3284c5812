// Random expert layers, an f32 reference, and thread teams for the kernel tests and benchmarks.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "moe_kernels.h"

namespace fixture {

using namespace hybrimoe::kernels;

// xorshift64*: the same numbers everywhere
class rng {
public:
    explicit rng(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15ull + 0x1234567) {}
    uint64_t next() {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        return state * 0x2545f4914f6cdd1dull;
    }
    float uniform() { return static_cast<float>(next() >> 40) / 16777216.0f; }
    float normal() {
        float sum = 0.0f;
        for (int i = 0; i < 6; ++i) {
            sum += uniform();
        }
        return (sum - 3.0f) * 1.41421356f;
    }

private:
    uint64_t state;
};

inline uint16_t to_half(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    const uint32_t sign = bits >> 16 & 0x8000;
    const int exp       = static_cast<int>(bits >> 23 & 255) - 112;
    if (exp <= 0) {
        return static_cast<uint16_t>(sign);
    }
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(exp) << 10 | (bits >> 13 & 0x3ff));
}

inline size_t row_bytes_of(int32_t type, int64_t n) {
    const type_info * info = find_type(type);
    return static_cast<size_t>(n / info->block_values) * static_cast<size_t>(info->block_bytes);
}

// One block with random quants and scales such that weights have a deviation of about `scale`.
inline void random_block(int32_t type, uint8_t * p, float scale, rng & r) {
    const type_info * info = find_type(type);
    for (int i = 0; i < info->block_bytes; ++i) {
        p[i] = static_cast<uint8_t>(r.next() >> 32);
    }
    const auto put = [&](int at, float value) {
        const uint16_t h = to_half(value);
        memcpy(p + at, &h, 2);
    };
    const float s = scale * (0.5f + r.uniform()) * (r.uniform() < 0.3f ? -1.0f : 1.0f);
    switch (type) {
    case type_f32: {
        const float v = scale * r.normal();
        memcpy(p, &v, 4);
        break;
    }
    case type_f16:
        put(0, scale * r.normal());
        break;
    case type_bf16: {
        const float v = scale * r.normal();
        memcpy(p, reinterpret_cast<const uint8_t *>(&v) + 2, 2);
        break;
    }
    case type_q4_0:
        put(0, s / 4.6f);
        break;
    case type_q4_1:
        put(0, s / 4.6f);
        put(2, -7.5f * s / 4.6f);
        break;
    case type_q8_0:
        put(0, s / 74.0f);
        break;
    case type_iq4_nl:
        put(0, s / 70.0f);
        break;
    case type_mxfp4:
        p[0] = static_cast<uint8_t>(127 + std::ilogb(scale / 3.0f) + static_cast<int>(r.next() >> 63));
        break;
    // mins equal to the scales in units that centre each group, as in real weights
    case type_q4_k:
    case type_q5_k:
        memcpy(p + 8, p + 4, 4);
        for (int i = 12; i < 16; ++i) {
            p[i] = static_cast<uint8_t>((p[i] & 15) * 17);
        }
        put(0, std::fabs(s) / (type == type_q4_k ? 147.0f : 295.0f));
        put(2, std::fabs(s) / (type == type_q4_k ? 147.0f / 7.5f : 295.0f / 15.5f));
        break;
    case type_q6_k:
        put(208, s / 1300.0f);
        break;
    case type_iq4_xs:
        put(0, s / 1300.0f);
        break;
    default:
        break;
    }
}

struct matrix {
    std::unique_ptr<uint8_t[]> bytes; // exactly as long as the tensor: a sanitizer sees reads beyond it
    expert_matrix m;
    std::vector<float> bias;
    std::vector<float> scale;
    std::vector<float> values; // dequantised
    int64_t n_in  = 0;
    int64_t n_out = 0;

    // gap_bytes between rows makes odd strides
    void make(int32_t type, int64_t in, int64_t out, int n_expert, rng & r, size_t gap_bytes = 0,
              bool dequantise = true) {
        n_in             = in;
        n_out            = out;
        m.type           = type;
        m.row_bytes      = row_bytes_of(type, in) + gap_bytes;
        m.expert_bytes   = m.row_bytes * static_cast<size_t>(out);
        const auto rows  = static_cast<size_t>(out) * static_cast<size_t>(n_expert);
        const auto total = rows * m.row_bytes - gap_bytes;
        bytes.reset(new uint8_t[total]());
        const type_info * info = find_type(type);
        const float std_dev    = 1.0f / std::sqrt(static_cast<float>(in));
        if (dequantise) {
            values.resize(rows * static_cast<size_t>(in));
        }
        for (size_t row = 0; row < rows; ++row) {
            uint8_t * p = bytes.get() + row * m.row_bytes;
            for (int64_t b = 0; b < in / info->block_values; ++b) {
                random_block(type, p + b * info->block_bytes, std_dev, r);
            }
            if (dequantise) {
                dequantize_row(type, p, values.data() + row * static_cast<size_t>(in), in);
            }
        }
        m.data = bytes.get();
    }
    void add_bias(int n_expert, rng & r) {
        bias.resize(static_cast<size_t>(n_out) * static_cast<size_t>(n_expert));
        for (float & b : bias) {
            b = 0.3f * r.normal();
        }
        m.bias       = bias.data();
        m.bias_bytes = static_cast<size_t>(n_out) * sizeof(float);
    }
    void add_scale(int n_expert, rng & r) {
        scale.resize(static_cast<size_t>(n_expert));
        for (float & s : scale) {
            s = 0.5f + r.uniform();
        }
        m.scale = scale.data();
    }
};

struct model {
    matrix gate, up, down;
    moe_layer layer;

    void make(int32_t gate_type, int32_t up_type, int32_t down_type, int64_t n_embd, int64_t n_ff, int n_expert,
              ffn_op op, uint64_t seed, size_t gap_bytes = 0, bool dequantise = true) {
        rng r(seed);
        if (is_gated(op)) {
            gate.make(gate_type, n_embd, n_ff, n_expert, r, gap_bytes, dequantise);
        }
        up.make(up_type, n_embd, n_ff, n_expert, r, gap_bytes, dequantise);
        down.make(down_type, n_ff, n_embd, n_expert, r, gap_bytes, dequantise);
        layer.n_embd   = n_embd;
        layer.n_ff     = n_ff;
        layer.n_expert = n_expert;
        layer.op       = op;
        layer.alpha    = op == ffn_op::situ ? 2.5f : 1.702f;
        layer.limit    = op == ffn_op::situ ? 3.0f : 7.0f;
        refresh();
    }
    void refresh() {
        layer.gate = gate.m;
        layer.up   = up.m;
        layer.down = down.m;
    }
};

struct input {
    int64_t n_tokens = 0;
    int32_t top_k    = 0;
    int64_t n_embd   = 0;
    std::vector<float> x;
    std::vector<float> weighted_x; // [n_embd, top_k, n_tokens] after weigh()
    std::vector<int32_t> ids;
    std::vector<float> weights;
    std::vector<uint8_t> take;

    void make(int64_t tokens, int32_t k, int64_t embd, uint64_t seed) {
        rng r(seed);
        n_tokens = tokens;
        top_k    = k;
        n_embd   = embd;
        x.resize(static_cast<size_t>(tokens * embd));
        for (float & v : x) {
            v = r.normal();
        }
        ids.assign(static_cast<size_t>(tokens * k), 0);
        weights.resize(static_cast<size_t>(tokens * k));
        for (float & w : weights) {
            w = r.uniform() / static_cast<float>(k) + 0.05f;
        }
    }
    // distinct experts per token
    void route_randomly(int n_expert, uint64_t seed) {
        rng r(seed);
        for (int64_t t = 0; t < n_tokens; ++t) {
            std::vector<int32_t> all(static_cast<size_t>(n_expert));
            for (int e = 0; e < n_expert; ++e) {
                all[static_cast<size_t>(e)] = e;
            }
            for (int k = 0; k < top_k; ++k) {
                const auto j = static_cast<size_t>(k) + r.next() % (all.size() - static_cast<size_t>(k));
                std::swap(all[static_cast<size_t>(k)], all[j]);
                ids[static_cast<size_t>(t * top_k + k)] = all[static_cast<size_t>(k)];
            }
        }
    }
    // From here on every pair has its own row of x, and the weights are not to be looked at.
    void weigh() {
        for (size_t pair = 0; pair < weights.size(); ++pair) {
            const float * row = x.data() + static_cast<int64_t>(pair) / top_k * n_embd;
            for (int64_t i = 0; i < n_embd; ++i) {
                weighted_x.push_back(row[i] * weights[pair]);
            }
        }
        weights.assign(weights.size(), -3.0f);
    }
    moe_batch batch(float * y) const {
        moe_batch b;
        b.n_tokens            = n_tokens;
        b.top_k               = top_k;
        b.x                   = x.data();
        b.x_token_bytes       = static_cast<size_t>(n_embd) * sizeof(float);
        b.ids                 = ids.data();
        b.ids_token_bytes     = static_cast<size_t>(top_k) * sizeof(int32_t);
        b.weights             = weights.data();
        b.weights_token_bytes = static_cast<size_t>(top_k) * sizeof(float);
        b.take                = take.empty() ? nullptr : take.data();
        if (!weighted_x.empty()) {
            b.x             = weighted_x.data();
            b.x_token_bytes = static_cast<size_t>(top_k * n_embd) * sizeof(float);
            b.x_is_weighted = true;
        }
        b.y             = y;
        b.y_token_bytes = static_cast<size_t>(n_embd) * sizeof(float);
        return b;
    }
};

class spin_barrier {
public:
    explicit spin_barrier(int n) : count(n) {}
    void wait() {
        const int turn = round.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(turn + 1, std::memory_order_release);
            return;
        }
        while (round.load(std::memory_order_acquire) == turn) {
            std::this_thread::yield();
        }
    }
    static void call(void * self) { static_cast<spin_barrier *>(self)->wait(); }

private:
    int count;
    std::atomic<int> arrived{0};
    std::atomic<int> round{0};
};

struct scratch_buffer {
    void * p = nullptr;
    explicit scratch_buffer(size_t n) : p(std::aligned_alloc(64, (n + 63) / 64 * 64)) { memset(p, 0xa5, n); }
    ~scratch_buffer() { std::free(p); }
    scratch_buffer(const scratch_buffer &)             = delete;
    scratch_buffer & operator=(const scratch_buffer &) = delete;
};

inline std::vector<float> forward(const kernel_set * ks, const moe_layer & layer, const input & in, int n_threads,
                                  size_t limit_bytes = default_scratch_limit_bytes, const float * add_to = nullptr,
                                  int n_streams = 0) {
    std::vector<float> y(in.x.size(), -77.0f);
    moe_batch batch = in.batch(y.data());
    if (add_to != nullptr) {
        y.assign(add_to, add_to + y.size());
        batch.accumulate = true;
    }
    moe_plan plan = make_plan(ks, layer, in.n_tokens, in.top_k, n_threads, limit_bytes);
    if (n_streams > 0) {
        plan.n_streams = n_streams;
    }
    scratch_buffer scratch(plan.scratch_bytes);
    spin_barrier barrier(n_threads);
    const auto work = [&](int index) {
        const team t = {index, n_threads, spin_barrier::call, &barrier};
        moe_forward(plan, layer, batch, scratch.p, t);
    };
    std::vector<std::thread> threads;
    for (int i = 1; i < n_threads; ++i) {
        threads.emplace_back(work, i);
    }
    work(0);
    for (std::thread & t : threads) {
        t.join();
    }
    return y;
}

// ---------------------------------------------------------------------------------------------------------------
// reference: dequantised weights, f32 activations, sums in f64

inline double reference_act(const moe_layer & layer, double g, double u) {
    const auto sigmoid = [](double v) { return 1.0 / (1.0 + std::exp(-v)); };
    const auto gelu    = [](double v) {
        return 0.5 * v * (1.0 + std::tanh(0.79788456080286535588 * v * (1.0 + 0.044715 * v * v)));
    };
    const auto erf_    = [](double v) { return 0.5 * v * (1.0 + std::erf(v * 0.70710678118654752440)); };
    const double limit = layer.limit;
    const double alpha = layer.alpha;
    const auto clamp   = [limit](double v) { return std::fmin(std::fmax(v, -limit), limit); };
    switch (layer.op) {
    case ffn_op::reglu:
        return std::fmax(g, 0.0) * u;
    case ffn_op::geglu:
        return gelu(g) * u;
    case ffn_op::swiglu:
        return g * sigmoid(g) * u;
    case ffn_op::swiglu_oai:
        return std::fmin(g, limit) * sigmoid(alpha * std::fmin(g, limit)) * (clamp(u) + 1.0);
    case ffn_op::geglu_erf:
        return erf_(g) * u;
    case ffn_op::geglu_quick:
        return g * sigmoid(1.702 * g) * u;
    case ffn_op::swiglu_clamp:
        return std::fmin(g, limit) * sigmoid(std::fmin(g, limit)) * clamp(u);
    case ffn_op::swiglu_limit:
        return std::fmin(g * sigmoid(g), limit) * clamp(u);
    case ffn_op::situ:
        return alpha * std::tanh(g / alpha) * sigmoid(g) * (limit > 0 ? limit * std::tanh(u / limit) : u);
    case ffn_op::silu:
        return u * sigmoid(u);
    case ffn_op::gelu:
        return gelu(u);
    case ffn_op::gelu_erf:
        return erf_(u);
    case ffn_op::gelu_quick:
        return u * sigmoid(1.702 * u);
    case ffn_op::relu:
        return std::fmax(u, 0.0);
    case ffn_op::relu_sqr:
        return u > 0 ? u * u : 0.0;
    }
    return 0.0;
}

inline double reference_dot(const float * w, const float * x, int64_t n) {
    double sum[8] = {};
    int64_t i     = 0;
    for (; i + 8 <= n; i += 8) {
        for (int j = 0; j < 8; ++j) {
            sum[j] += static_cast<double>(w[i + j]) * static_cast<double>(x[i + j]);
        }
    }
    for (; i < n; ++i) {
        sum[0] += static_cast<double>(w[i]) * static_cast<double>(x[i]);
    }
    return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

inline void reference_matrix(const matrix & m, int e, const float * x, std::vector<float> & out) {
    out.resize(static_cast<size_t>(m.n_out));
    for (int64_t r = 0; r < m.n_out; ++r) {
        double v = reference_dot(m.values.data() +
                                     (static_cast<size_t>(e) * static_cast<size_t>(m.n_out) + static_cast<size_t>(r)) *
                                         static_cast<size_t>(m.n_in),
                                 x, m.n_in);
        v *= m.scale.empty() ? 1.0 : static_cast<double>(m.scale[static_cast<size_t>(e)]);
        v += m.bias.empty()
                 ? 0.0
                 : static_cast<double>(
                       m.bias[static_cast<size_t>(e) * static_cast<size_t>(m.n_out) + static_cast<size_t>(r)]);
        out[static_cast<size_t>(r)] = static_cast<float>(v);
    }
}

inline std::vector<float> reference(const model & mod, const input & in) {
    std::vector<float> y(in.x.size(), 0.0f);
    std::vector<float> x(static_cast<size_t>(in.n_embd)), g, u, h, out;
    for (int64_t t = 0; t < in.n_tokens; ++t) {
        for (int k = 0; k < in.top_k; ++k) {
            const auto pair = static_cast<size_t>(t * in.top_k + k);
            const int e     = in.ids[pair];
            if (e < 0 || e >= mod.layer.n_expert || (!in.take.empty() && in.take[pair] == 0)) {
                continue;
            }
            const float w = in.weights[pair];
            for (size_t i = 0; i < x.size(); ++i) {
                x[i] = in.x[static_cast<size_t>(t) * x.size() + i] * (mod.layer.weights_on_input ? w : 1.0f);
            }
            reference_matrix(mod.up, e, x.data(), u);
            if (is_gated(mod.layer.op)) {
                reference_matrix(mod.gate, e, x.data(), g);
            }
            h.resize(u.size());
            for (size_t i = 0; i < u.size(); ++i) {
                h[i] = static_cast<float>(
                    reference_act(mod.layer, g.empty() ? 0.0 : static_cast<double>(g[i]), static_cast<double>(u[i])));
            }
            reference_matrix(mod.down, e, h.data(), out);
            for (size_t i = 0; i < x.size(); ++i) {
                y[static_cast<size_t>(t) * x.size() + i] += out[i] * (mod.layer.weights_on_input ? 1.0f : w);
            }
        }
    }
    return y;
}

inline double nmse(const std::vector<float> & a, const std::vector<float> & b) {
    double err = 0.0;
    double sum = 0.0;
    for (size_t i = 0; i < a.size(); ++i) {
        const double d = static_cast<double>(a[i]) - static_cast<double>(b[i]);
        err += d * d;
        sum += static_cast<double>(b[i]) * static_cast<double>(b[i]);
    }
    return sum > 0.0 ? err / sum : err;
}

} // namespace fixture
