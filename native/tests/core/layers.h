// Cost models and random layers for the tests and the benchmark of the schedulers.
#pragma once

#include "core/scheduling/scheduler.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <string>

namespace layers {

using namespace hybrimoe;

struct costs {
    double cpu_fixed = 0, cpu_per_token = 1, cpu_first = 0, cpu_step = 0;
    double gpu_fixed = 1, gpu_per_token = 0, gpu_step = 0;
    double copy   = 3;
    double bytes  = 1e6;
    double dram   = std::numeric_limits<double>::infinity();
    int n_devices = 1;
};

inline cost_model make_costs(const costs & c, int n_layers = 1) {
    cost_model m;
    cost_curve cpu, gpu;
    status s = cost_model::create(n_layers, 1, c.n_devices, m);
    s        = s.ok() ? cost_curve::affine(c.cpu_fixed, c.cpu_per_token, cpu) : s;
    s        = s.ok() ? cost_curve::affine(c.gpu_fixed, c.gpu_per_token, gpu) : s;
    s        = s.ok() ? m.set_bytes(0, c.bytes) : s;
    s        = s.ok() ? m.set_cpu(0, cpu, c.cpu_first) : s;
    s        = s.ok() ? m.set_step(cpu_device, c.cpu_step) : s;
    s        = s.ok() ? m.set_dram(c.dram) : s;
    for (int d = 0; d < c.n_devices; ++d) {
        s = s.ok() ? m.set_gpu(0, d, gpu) : s;
        s = s.ok() ? m.set_link(d, 0.0, c.bytes / c.copy) : s;
        s = s.ok() ? m.set_step(d, c.gpu_step) : s;
    }
    if (!s.ok()) {
        std::fprintf(stderr, "make_costs: %s\n", s.message());
        std::abort();
    }
    return m;
}

inline std::unique_ptr<scheduler> make(const char * name) {
    std::unique_ptr<scheduler> out;
    const status s = make_policy(schedulers(), name, model_shape{1, max_experts, 1}, nullptr, 0, out);
    if (!s.ok()) {
        std::fprintf(stderr, "%s\n", s.message());
        std::abort();
    }
    return out;
}

enum class regime { decode, loads_1_20, heavy_tailed };
constexpr regime all_regimes[] = {regime::decode, regime::loads_1_20, regime::heavy_tailed};

inline const char * regime_name(regime r) {
    return r == regime::decode ? "decode, load 1" : r == regime::loads_1_20 ? "loads 1..20" : "heavy-tailed loads";
}

// The random layers of the reference figures: n = 3..9 experts, each cached with p from {.3, .5, .7, .85}; GPU
// 1.0 + 0.002 x load; decode: load 1, CPU per token and copy uniform in 0.3..6; the others: CPU per token 0.02..1, copy
// 0.3..8, loads 1..20 or Pareto 0.8 up to 400; first CPU expert extra 0 or half a token.
struct random_layer {
    costs c;
    std::vector<work_item> items;
};

inline random_layer draw(regime r, std::mt19937_64 & rng, int n_min = 3, int n_max = 9) {
    auto uniform = [&](double lo, double hi) { return lo + (hi - lo) * (static_cast<double>(rng() >> 11) * 0x1p-53); };
    auto pick    = [&](int n) { return static_cast<int>(rng() % static_cast<uint64_t>(n)); };

    random_layer out;
    const bool decode     = r == regime::decode;
    out.c.gpu_fixed       = 1.0;
    out.c.gpu_per_token   = 0.002;
    out.c.cpu_per_token   = decode ? uniform(0.3, 6.0) : uniform(0.02, 1.0);
    out.c.copy            = decode ? uniform(0.3, 6.0) : uniform(0.3, 8.0);
    out.c.cpu_first       = pick(2) ? 0.5 * out.c.cpu_per_token : 0.0;
    const double shares[] = {0.3, 0.5, 0.7, 0.85};
    const double p_cached = shares[pick(4)];
    out.items.resize(static_cast<size_t>(n_min + pick(n_max - n_min + 1)));
    int id = 0;
    for (work_item & item : out.items) {
        item.expert = id++;
        item.device = uniform(0, 1) < p_cached ? pick(out.c.n_devices) : cpu_device;
        if (r == regime::loads_1_20) {
            item.n_tokens = 1 + pick(20);
        } else if (r == regime::heavy_tailed) {
            item.n_tokens = static_cast<int>(std::min(400.0, std::pow(1.0 - uniform(0, 1), -1.0 / 0.8)));
        }
    }
    return out;
}

} // namespace layers
