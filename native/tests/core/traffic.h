// A runtime under decode-like traffic, for the runtime's test and the benchmark.
#pragma once

#include "check.h"
#include "layers.h"

#include "core/runtime.h"

namespace traffic {

using namespace hybrimoe;

struct options {
    int n_layers = 8, n_expert = 64, top_k = 8, n_slots = 16;
    const char * eviction  = "lru";
    const char * admission = "always";
    const char * prefetch  = "none";
    const char * schedule  = "two-threshold";
    bool pay_back          = true;
    bool preload           = false;
};

inline std::unique_ptr<runtime> make_runtime(const options & o, const cost_model & costs) {
    const model_shape shape{o.n_layers, o.n_expert, o.top_k};
    runtime_config c;
    c.cache.shape     = shape;
    c.cache.n_devices = costs.n_devices();
    c.cache.n_slots.assign(static_cast<size_t>(o.n_layers * costs.n_devices()), o.n_slots);
    c.costs    = costs;
    c.pay_back = o.pay_back;
    c.preload  = o.preload;
    std::unique_ptr<runtime> out;
    CHECK_OK(make_policy(eviction_policies(), o.eviction, shape, nullptr, 0, c.eviction));
    CHECK_OK(make_policy(admission_policies(), o.admission, shape, nullptr, 0, c.admission));
    CHECK_OK(make_policy(schedulers(), o.schedule, shape, nullptr, 0, c.schedule));
    CHECK_OK(make_policy(prefetchers(), o.prefetch, shape, nullptr, 0, c.prefetch));
    CHECK_OK(runtime::create(std::move(c), out));
    return out;
}

// Random routing with skew, full scores and a look-ahead that is mostly right.
struct routing {
    explicit routing(const options & o) : o_(o) {
        scores.resize(static_cast<size_t>(o.n_expert));
        for (auto & a : ahead) {
            a.resize(static_cast<size_t>(o.n_expert));
        }
        ids.resize(static_cast<size_t>(o.top_k));
        order_.resize(static_cast<size_t>(o.n_expert));
    }

    void draw(int layer) {
        for (int e = 0; e < o_.n_expert; ++e) {
            const auto i = static_cast<size_t>(e);
            const auto r = static_cast<float>(rng_() % 1000) / 1000;
            scores[i]    = r * r * r + ((e + layer) % 7 == 0 ? 0.3F : 0.0F);
            order_[i]    = e;
            for (auto & a : ahead) {
                a[i] = scores[i] * 0.5F + ((e + layer + 1) % 7 == 0 ? 0.3F : 0.0F);
            }
        }
        std::partial_sort(order_.begin(), order_.begin() + o_.top_k, order_.end(), [this](int a, int b) {
            return scores[static_cast<size_t>(a)] != scores[static_cast<size_t>(b)]
                       ? scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)]
                       : a < b;
        });
        std::copy(order_.begin(), order_.begin() + o_.top_k, ids.begin());
    }

    layer_event event(int layer) const {
        layer_event e;
        e.layer  = layer;
        e.top_k  = o_.top_k;
        e.ids    = ids.data();
        e.scores = scores.data();
        for (int d = 0; d < max_lookahead; ++d) {
            e.lookahead[d] = ahead[d].data();
        }
        e.gap_us = 20.0;
        return e;
    }

    std::vector<float> scores, ahead[max_lookahead];
    std::vector<int32_t> ids;

private:
    options o_;
    std::vector<int> order_;
    std::mt19937_64 rng_{5};
};

// Completes every transfer that ended by now.
inline void deliver(runtime & rt, double now_us) {
    for (bool again = true; again;) {
        again = false;
        for (const transfer & t : rt.in_flight()) {
            if (t.end_us <= now_us) {
                CHECK_OK(rt.on_complete(t.id, now_us));
                again = true;
                break;
            }
        }
    }
}

} // namespace traffic
