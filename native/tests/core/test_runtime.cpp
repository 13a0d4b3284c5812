// The decode path allocates nothing after warm-up, and the same events give the same decisions.
#include "traffic.h"

#include <cstdlib>
#include <new>

namespace {

long long g_n_allocations = 0;

} // namespace

void * operator new(std::size_t size) {
    ++g_n_allocations;
    if (void * p = std::malloc(size ? size : 1)) {
        return p;
    }
    throw std::bad_alloc();
}
void operator delete(void * p) noexcept {
    std::free(p);
}
void operator delete(void * p, std::size_t) noexcept {
    std::free(p);
}

using namespace hybrimoe;
using namespace traffic;

namespace {

cost_model machine(int n_devices, double cpu_us = 30.0) {
    layers::costs c;
    c.cpu_per_token = cpu_us;
    c.gpu_fixed     = 5.0;
    c.copy          = 25.0;
    c.gpu_step      = 2.0;
    c.dram          = c.bytes / 15.0;
    c.n_devices     = n_devices;
    return layers::make_costs(c, 8);
}

uint64_t run(const options & o, int n_devices, int n_tokens, int warm_tokens, long long & n_allocations) {
    const cost_model costs      = machine(n_devices);
    std::unique_ptr<runtime> rt = make_runtime(o, costs);
    routing r(o);
    double now_us = 0.0;
    n_allocations = 0;
    for (int token = 0; token < n_tokens; ++token) {
        const long long before = g_n_allocations;
        for (int layer = 0; layer < o.n_layers; ++layer) {
            r.draw(layer);
            deliver(*rt, now_us);
            const decision * d = nullptr;
            CHECK_OK(rt->on_layer(r.event(layer), now_us, d));
            CHECK_EQ(d->plan.n_cpu + d->plan.n_gpu, o.top_k);
            now_us += d->plan.makespan_us + 20.0;
        }
        CHECK_OK(rt->cache().verify());
        if (token >= warm_tokens) {
            n_allocations += g_n_allocations - before;
        }
    }
    CHECK(rt->stats().n_hits > 0);
    return rt->stats().decision_hash;
}

int64_t hits_of(int n_devices, int n_slots, const char * schedule) {
    options o;
    o.top_k                     = 1;
    o.n_slots                   = n_slots;
    o.schedule                  = schedule;
    o.preload                   = true;
    std::unique_ptr<runtime> rt = make_runtime(o, machine(n_devices, 60.0)); // a copy is faster
    routing r(o);
    double now_us = 0.0;
    for (int i = 0; i < 4000; ++i) {
        r.draw(i % o.n_layers);
        deliver(*rt, now_us);
        layer_event e      = r.event(i % o.n_layers);
        e.gap_us           = 0.0;
        const decision * d = nullptr;
        CHECK_OK(rt->on_layer(e, now_us, d));
        now_us += d->plan.makespan_us;
    }
    return rt->stats().n_hits;
}

// Equal cards are equally near: the slots of all are one cache, else the first card evicts what it needs again while
// the others hold what nobody asks for.
void slots_of_two_cards_are_one_cache() {
    for (const char * schedule : {"two-threshold", "hybrimoe", "cpu-only"}) {
        const int64_t one = hits_of(1, 8, schedule), two = hits_of(2, 4, schedule);
        std::printf("%s: %lld hits with one card, %lld with two\n", schedule, static_cast<long long>(one),
                    static_cast<long long>(two));
        CHECK(two >= one - one / 50);
    }
}

// Wants anything, until it was given something in the same step.
class fickle final : public admission_policy {
public:
    bool wants(int) const override { return !given_; }
    void on_step(const router_step &) override { given_ = false; }
    void on_admit(int) override { given_ = true; }

private:
    bool given_ = false;
};

// A decoded token has no scratch: what the plan copies takes a slot, whatever admission thinks of it by then.
void no_scratch_without_scratch() {
    const model_shape shape{8, 16, 4};
    runtime_config c;
    c.cache.shape     = shape;
    c.cache.n_devices = 1;
    c.cache.n_slots.assign(8, 4);
    c.costs     = machine(1);
    c.admission = std::make_unique<fickle>();
    CHECK_OK(make_policy(eviction_policies(), "lru", shape, nullptr, 0, c.eviction));
    CHECK_OK(make_policy(schedulers(), "gpu-only", shape, nullptr, 0, c.schedule));
    CHECK_OK(make_policy(prefetchers(), "none", shape, nullptr, 0, c.prefetch));
    std::unique_ptr<runtime> rt;
    CHECK_OK(runtime::create(std::move(c), rt));
    double now_us = 0.0;
    for (int32_t first = 0; first < 12; first += 3) {
        const int32_t ids[] = {first, first + 1, first + 2, first + 3};
        layer_event e;
        e.top_k            = 4;
        e.ids              = ids;
        const decision * d = nullptr;
        CHECK_OK(rt->on_layer(e, now_us, d));
        CHECK_EQ(d->plan.n_gpu, 4);
        for (size_t i = 0; i < d->slots.size(); ++i) {
            CHECK(d->slots[i] >= 0);
        }
        for (const transfer & t : d->transfers) {
            CHECK(t.kind == transfer_kind::demand && t.slot >= 0);
        }
        now_us += d->plan.makespan_us;
        deliver(*rt, now_us);
        rt->on_layer_done();
    }
}

} // namespace

int main() {
    for (const char * eviction : {"lru", "lfu", "lfru", "ema", "mrs", "arc", "static", "eam"}) {
        for (const char * prefetch : {"none", "next-layer", "impact", "fate", "path", "eam"}) {
            for (const int n_devices : {1, 2}) {
                options o;
                o.eviction              = eviction;
                o.prefetch              = prefetch;
                long long n_allocations = 0, ignored = 0;
                const uint64_t hash = run(o, n_devices, 60, 20, n_allocations);
                CHECK_EQ(n_allocations, 0);
                CHECK_EQ(run(o, n_devices, 60, 20, ignored), hash);
            }
        }
    }
    options a, b;
    long long ignored = 0;
    b.eviction        = "ema";
    CHECK(run(a, 1, 60, 20, ignored) != run(b, 1, 60, 20, ignored));
    slots_of_two_cards_are_one_cache();
    no_scratch_without_scratch();
    return check::report("runtime");
}
