// Prints what planning and caching cost. A benchmark, not a test: nothing is asserted.
//     cmake --build build --target bench_core && build/native/tests/core/bench_core
#include "traffic.h"

#include <chrono>

using namespace hybrimoe;
using namespace layers;

namespace {

double now_us() {
    using namespace std::chrono;
    return duration<double, std::micro>(steady_clock::now().time_since_epoch()).count();
}

// Median over batches, so that a clock read costs nothing per call.
template <class body> double median_us(int n_calls, body call) {
    std::vector<double> samples;
    const int batch = n_calls >= 4096 ? 64 : 4;
    for (int i = 0; i < n_calls; i += batch) {
        const double start = now_us();
        for (int k = 0; k < batch; ++k) {
            call(i + k);
        }
        samples.push_back((now_us() - start) / batch);
    }
    std::sort(samples.begin(), samples.end());
    return samples[samples.size() / 2];
}

void print(const char * what, double us, double target_us) {
    std::printf("%-58s %10.2f us   target %g\n", what, us, target_us);
}

void planning(const char * name, int n, regime r, double target_us) {
    std::mt19937_64 rng(1);
    std::vector<random_layer> drawn;
    std::vector<cost_model> costs;
    for (int i = 0; i < 64; ++i) {
        drawn.push_back(draw(r, rng, n, n));
        costs.push_back(make_costs(drawn.back().c));
    }
    const auto policy = make(name);
    layer_plan plan;
    const double us = median_us(n > 64 ? 2048 : 65536, [&](int i) {
        const auto k = static_cast<size_t>(i % 64);
        layer_problem p;
        p.costs   = &costs[k];
        p.items   = drawn[k].items.data();
        p.n_items = n;
        (void)plan_layer(*policy, p, plan);
    });
    const std::string what =
        std::string("plan ") + name + ", " + std::to_string(n) + " active experts, " + regime_name(r);
    print(what.c_str(), us, target_us);
}

void impact(double target_us) {
    traffic::options o;
    o.n_expert = 64;
    const model_shape shape{o.n_layers, o.n_expert, o.top_k};
    layers::costs c;
    c.cpu_per_token             = 30;
    c.gpu_fixed                 = 5;
    c.copy                      = 25;
    const cost_model costs      = make_costs(c, o.n_layers);
    std::unique_ptr<runtime> rt = traffic::make_runtime(o, costs);
    std::unique_ptr<prefetcher> policy;
    const auto planner = make("two-threshold");
    CHECK_OK(make_policy(prefetchers(), "impact", shape, nullptr, 0, policy));
    traffic::routing r(o);
    r.draw(0);
    std::vector<int> devices(static_cast<size_t>(o.n_layers), 0);
    std::vector<int32_t> ones(static_cast<size_t>(o.top_k), 1);
    router_step step;
    step.experts   = r.ids.data();
    step.n_tokens  = ones.data();
    step.n_experts = step.top_k = o.top_k;
    step.n_rows                 = 1;
    step.ids                    = r.ids.data();
    prefetch_view view;
    view.shape           = &shape;
    view.costs           = &costs;
    view.cache           = &rt->cache(); // empty: all 24 predicted experts are candidates
    view.policy          = planner.get();
    view.step            = &step;
    view.horizon         = 3;
    view.device_of_layer = devices.data();
    for (int d = 0; d < max_lookahead; ++d) {
        view.lookahead[d] = r.ahead[d].data();
    }
    static proposal_list out;
    const double us        = median_us(16384, [&](int) {
        out.clear();
        policy->propose(view, out);
    });
    const std::string what = "impact proposals, 24 candidates (" + std::to_string(out.n_items) + " proposed)";
    print(what.c_str(), us, target_us);
}

void cache_step(const char * eviction, double target_us) {
    traffic::options o;
    const model_shape shape{o.n_layers, o.n_expert, o.top_k};
    std::unique_ptr<eviction_policy> policy;
    CHECK_OK(make_policy(eviction_policies(), eviction, shape, nullptr, 0, policy));
    cache_config config;
    config.shape     = shape;
    config.n_devices = 1;
    config.n_slots.assign(static_cast<size_t>(o.n_layers), o.n_slots);
    expert_cache cache;
    CHECK_OK(expert_cache::create(config, std::move(policy), cache));
    traffic::routing r(o);
    std::vector<int32_t> ids, ones(static_cast<size_t>(o.top_k), 1);
    std::vector<float> scores;
    const int n_drawn = 512;
    for (int i = 0; i < n_drawn; ++i) {
        r.draw(i % o.n_layers);
        ids.insert(ids.end(), r.ids.begin(), r.ids.end());
        scores.insert(scores.end(), r.scores.begin(), r.scores.end());
    }
    const double us        = median_us(65536, [&](int i) {
        const auto k = static_cast<size_t>(i % n_drawn);
        router_step step;
        step.layer   = i % o.n_layers;
        step.experts = step.ids = ids.data() + k * static_cast<size_t>(o.top_k);
        step.scores             = scores.data() + k * static_cast<size_t>(o.n_expert);
        step.n_tokens           = ones.data();
        step.n_experts = step.top_k = o.top_k;
        step.n_rows                 = 1;
        (void)cache.begin_step(step);
        load_result loaded;
        for (int e = 0; e < o.top_k; ++e) {
            if (cache.lookup(step.layer, step.experts[e]).state == slot_state::absent &&
                cache.begin_load(step.layer, step.experts[e], 0, false, loaded).ok()) {
                (void)cache.complete_load(step.layer, step.experts[e]);
            }
        }
        cache.end_step();
    });
    const std::string what = std::string("cache lookup + update, 8 of 64 experts, 16 slots, ") + eviction;
    print(what.c_str(), us, target_us);
}

void whole_layer(const char * prefetch) {
    traffic::options o;
    o.prefetch = prefetch;
    o.eviction = "ema";
    o.pay_back = false; // always proposing
    layers::costs c;
    c.cpu_per_token             = 30;
    c.gpu_fixed                 = 5;
    c.copy                      = 25;
    const cost_model costs      = make_costs(c, o.n_layers);
    std::unique_ptr<runtime> rt = traffic::make_runtime(o, costs);
    std::vector<traffic::routing> drawn;
    traffic::routing r(o);
    for (int i = 0; i < 256; ++i) {
        r.draw(i % o.n_layers);
        drawn.push_back(r);
    }
    double clock    = 0.0;
    const double us = median_us(65536, [&](int i) {
        traffic::deliver(*rt, clock);
        const decision * d = nullptr;
        (void)rt->on_layer(drawn[static_cast<size_t>(i % 256)].event(i % o.n_layers), clock, d);
        clock += d->plan.makespan_us + 20.0;
    });
    std::printf("%-58s %10.2f us\n", (std::string("runtime::on_layer, 8 of 64, ema, prefetch ") + prefetch).c_str(),
                us);
}

} // namespace

int main() {
    planning("two-threshold", 8, regime::decode, 5);
    planning("two-threshold", 64, regime::loads_1_20, 200);
    planning("two-threshold", 512, regime::heavy_tailed, 2000);
    planning("hybrimoe", 8, regime::decode, 5);
    planning("hybrimoe", 64, regime::loads_1_20, 200);
    planning("hybrimoe", 512, regime::heavy_tailed, 2000);
    impact(60);
    for (const char * eviction : {"lru", "lfu", "lfru", "ema", "mrs", "arc", "eam"}) {
        cache_step(eviction, 2);
    }
    for (const char * prefetch : {"none", "next-layer", "impact", "fate", "path", "eam"}) {
        whole_layer(prefetch);
    }
    return 0;
}
