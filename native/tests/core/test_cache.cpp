// The slot state machine by random operations, against a plain model of it; and what single policies must do.
#include "check.h"

#include "core/expert_cache.h"

#include <random>
#include <set>

using namespace hybrimoe;

namespace {

constexpr int n_layers = 3, n_expert = 12, top_k = 3;

expert_cache make_cache(const char * name, std::vector<int> n_slots, int n_devices = 1, bool pooled = false) {
    const model_shape shape{n_layers, n_expert, top_k};
    std::unique_ptr<eviction_policy> policy;
    CHECK_OK(make_policy(eviction_policies(), name, shape, nullptr, 0, policy));
    cache_config config;
    config.shape     = shape;
    config.n_devices = n_devices;
    config.pooled    = pooled;
    config.n_slots   = std::move(n_slots);
    expert_cache out;
    CHECK_OK(expert_cache::create(config, std::move(policy), out));
    return out;
}

struct drawn_step {
    std::vector<int32_t> ids, loads;
    std::vector<float> scores;
    router_step step;

    drawn_step(int layer, std::mt19937_64 & rng) {
        std::set<int32_t> chosen;
        while (chosen.size() < top_k) {
            chosen.insert(static_cast<int32_t>(rng() % n_expert));
        }
        ids.assign(chosen.begin(), chosen.end());
        loads.assign(ids.size(), 1);
        for (int e = 0; e < n_expert; ++e) {
            scores.push_back(static_cast<float>(rng() % 1000) / 1000);
        }
        step.layer     = layer;
        step.experts   = ids.data();
        step.n_tokens  = loads.data();
        step.n_experts = top_k;
        step.n_rows    = 1;
        step.top_k     = top_k;
        step.ids       = ids.data();
        step.scores    = scores.data();
    }
};

// What must hold after every operation, tracked without looking inside the cache.
struct model {
    enum state { absent, loading, resident, pinned };
    std::vector<state> states = std::vector<state>(n_layers * n_expert, absent);
    std::set<int> in_step;

    void compare(const expert_cache & cache) const {
        for (int key = 0; key < n_layers * n_expert; ++key) {
            const residency at = cache.lookup(cache.shape().layer_of(key), cache.shape().expert_of(key));
            CHECK_EQ(static_cast<int>(at.state), static_cast<int>(states[static_cast<size_t>(key)]));
        }
    }
};

void random_operations(const char * policy, bool pooled, int n_operations, uint64_t seed) {
    std::mt19937_64 rng(seed);
    expert_cache cache = make_cache(policy, {4, 5, 0, 3, 2, 6}, 2, pooled);
    model m;
    std::vector<slot_move> moves;
    int n_refused = 0, n_evicted = 0;
    for (int i = 0; i < n_operations; ++i) {
        const int layer  = static_cast<int>(rng() % n_layers);
        const int expert = static_cast<int>(rng() % n_expert);
        const int key    = cache.shape().key(layer, expert);
        const int device = static_cast<int>(rng() % 2);
        auto & state     = m.states[static_cast<size_t>(key)];
        switch (rng() % 10) {
        case 0:
        case 1: {
            const drawn_step s(layer, rng);
            CHECK_OK(cache.begin_step(s.step));
            m.in_step.clear();
            for (const int32_t e : s.ids) {
                m.in_step.insert(cache.shape().key(layer, e));
            }
            break;
        }
        case 2:
            cache.end_step();
            m.in_step.clear();
            break;
        case 3:
        case 4:
        case 5: {
            load_result loaded;
            const int n_free = cache.n_available(layer, device, 1);
            const status s   = cache.begin_load(layer, expert, device, rng() % 2 == 0, loaded);
            if (state != model::absent) {
                CHECK(s.code() == error_code::out_of_order);
            } else if (!s.ok()) {
                CHECK(s.code() == error_code::no_slot);
                CHECK_EQ(n_free, 0);
                ++n_refused;
            } else {
                CHECK_EQ(n_free, 1);
                state = model::loading;
                CHECK(loaded.slot >= 0 && loaded.slot < cache.n_slots(layer, device));
                if (loaded.evicted_key >= 0) {
                    auto & victim = m.states[static_cast<size_t>(loaded.evicted_key)];
                    CHECK(victim == model::resident); // never loading, never pinned
                    CHECK(m.in_step.count(loaded.evicted_key) == 0);
                    victim = model::absent;
                    ++n_evicted;
                }
            }
            break;
        }
        case 6: {
            const bool may = state == model::loading;
            CHECK_EQ(cache.complete_load(layer, expert).ok(), may);
            state = may ? model::resident : state;
            break;
        }
        case 7: {
            const bool may = state == model::loading;
            CHECK_EQ(cache.fail_load(layer, expert).ok(), may);
            state = may ? model::absent : state;
            break;
        }
        case 8: {
            const bool pin = rng() % 3 == 0;
            const bool may = state == (pin ? model::resident : model::pinned);
            CHECK_EQ((pin ? cache.pin(layer, expert) : cache.unpin(layer, expert)).ok(), may);
            if (may) {
                state = pin ? model::pinned : model::resident;
            }
            break;
        }
        default: {
            const int n    = static_cast<int>(rng() % 8);
            const status s = cache.resize(layer, device, n, moves);
            if (s.ok()) {
                CHECK_EQ(cache.n_slots(layer, device), n);
                for (int k = 0; k < n_layers * n_expert; ++k) { // only evictable ones may have gone
                    const residency at = cache.lookup(cache.shape().layer_of(k), cache.shape().expert_of(k));
                    auto & old         = m.states[static_cast<size_t>(k)];
                    if (static_cast<int>(at.state) != static_cast<int>(old)) {
                        CHECK(old == model::resident && at.state == slot_state::absent && m.in_step.count(k) == 0);
                        old = model::absent;
                    }
                }
            } else {
                CHECK(s.code() == error_code::no_slot);
            }
        }
        }
        CHECK_OK(cache.verify());
        if (i % 16 == 0) {
            m.compare(cache);
        }
    }
    m.compare(cache);
    CHECK(n_evicted > n_operations / 200 || std::string(policy) == "static");
    CHECK(n_refused > 0);
}

void resize_keeps_the_best() {
    for (const char * name : {"lru", "lfu", "ema", "lfru"}) {
        expert_cache cache = make_cache(name, {8, 0, 0});
        std::mt19937_64 rng(1);
        load_result loaded;
        for (int e = 0; e < 8; ++e) {
            CHECK_OK(cache.begin_load(0, e, 0, false, loaded));
            CHECK_OK(cache.complete_load(0, e));
        }
        // Expert 7 - i is used more often, and later, the larger i is.
        for (int round = 0; round < 8; ++round) {
            for (int32_t e = 7 - round; e >= 0; --e) {
                const int32_t one = 1;
                router_step step;
                step.experts   = &e;
                step.n_tokens  = &one;
                step.n_experts = step.n_rows = step.top_k = 1;
                step.ids                                  = &e;
                CHECK_OK(cache.begin_step(step));
            }
        }
        cache.end_step();
        std::vector<slot_move> moves;
        CHECK_OK(cache.resize(0, 0, 3, moves));
        for (int e = 0; e < 8; ++e) {
            CHECK_EQ(cache.lookup(0, e).state == slot_state::resident, e < 3);
        }
        for (const slot_move & m : moves) {
            CHECK(m.from_slot >= 3 && m.to_slot < 3);
        }
        CHECK_OK(cache.resize(0, 0, 8, moves));
        CHECK_OK(cache.verify());
        CHECK_EQ(cache.n_available(0, 0, 100), 8);
    }
}

void resize_moves_pinned_experts_down() {
    expert_cache cache = make_cache("lru", {6, 0, 0});
    load_result loaded;
    for (int e = 0; e < 6; ++e) {
        CHECK_OK(cache.begin_load(0, e, 0, false, loaded));
        if (e != 2) {
            CHECK_OK(cache.complete_load(0, e));
        }
    }
    CHECK_OK(cache.pin(0, 5));
    std::vector<slot_move> moves;
    CHECK(cache.resize(0, 0, 1, moves).code() == error_code::no_slot); // the pinned and the loading one
    CHECK_EQ(cache.lookup(0, 0).state == slot_state::resident, true);
    CHECK_OK(cache.resize(0, 0, 3, moves));
    CHECK(cache.lookup(0, 5).state == slot_state::pinned);
    CHECK(cache.lookup(0, 5).slot < 3);
    CHECK_EQ(cache.lookup(0, 2).slot, 2); // loading ones stay where their copy goes
    CHECK_OK(cache.complete_load(0, 2));
    CHECK_OK(cache.verify());
}

void a_failed_load_leaves_no_trace() {
    for (const char * name : {"lru", "arc", "lfu", "eam"}) {
        expert_cache a = make_cache(name, {3, 3, 3}), b = make_cache(name, {3, 3, 3});
        std::mt19937_64 rng(3), again(3);
        load_result loaded;
        for (int i = 0; i < 300; ++i) {
            for (expert_cache * cache : {&a, &b}) {
                std::mt19937_64 & r = cache == &a ? rng : again;
                const int layer     = static_cast<int>(r() % n_layers);
                const drawn_step s(layer, r);
                CHECK_OK(cache->begin_step(s.step));
                for (const int32_t e : s.ids) {
                    if (cache->begin_load(layer, e, 0, false, loaded).ok()) {
                        CHECK_OK(cache->complete_load(layer, e));
                    }
                }
                cache->end_step();
                // One of the two also fails a load now and then, into a slot that is free anyway.
                if (cache == &a && i % 7 == 0 && cache->n_slots(0, 0) == 3) {
                    std::vector<slot_move> moves;
                    CHECK_OK(cache->resize(0, 0, 4, moves));
                    for (int e = 0; e < n_expert; ++e) {
                        if (cache->lookup(0, e).state == slot_state::absent) {
                            CHECK_OK(cache->begin_load(0, e, 0, false, loaded));
                            CHECK_EQ(loaded.evicted_key, -1);
                            CHECK_OK(cache->fail_load(0, e));
                            CHECK(cache->fail_load(0, e).code() == error_code::out_of_order);
                            break;
                        }
                    }
                    CHECK_OK(cache->resize(0, 0, 3, moves));
                }
            }
            if (std::string(name) == "arc") {
                continue; // its adaptation learns from the miss itself
            }
            for (int k = 0; k < n_layers * n_expert; ++k) {
                CHECK_EQ(a.lookup(k / n_expert, k % n_expert).state == b.lookup(k / n_expert, k % n_expert).state,
                         true);
            }
        }
    }
}

void mrs_reads_every_row() {
    // Two rows: the first wants expert 0, the second expert 1. Both must count, the later one more.
    expert_cache cache  = make_cache("mrs", {2, 0, 0});
    const int32_t ids[] = {0, 1}, loads[] = {1, 1};
    float scores[2 * n_expert] = {};
    scores[0]                  = 0.9F;
    scores[n_expert + 1]       = 0.9F;
    scores[5]                  = 0.5F;
    router_step step;
    step.experts   = ids;
    step.n_tokens  = loads;
    step.n_experts = 2;
    step.n_rows    = 2;
    step.top_k     = 1;
    step.ids       = ids;
    CHECK(cache.begin_step(step).code() == error_code::missing_scores);
    CHECK_EQ(cache.stats().n_queries, 0);
    step.scores = scores;
    CHECK_OK(cache.begin_step(step));
    CHECK(std::fabs(cache.policy().keep_value(1) - 0.45) < 1e-6);
    CHECK(std::fabs(cache.policy().keep_value(0) - 0.225) < 1e-6);
    CHECK(std::fabs(cache.policy().keep_value(5) - 0.125) < 1e-6); // not chosen, but among the 2 x top-k largest
}

void a_wrong_prefetch_goes_first() {
    expert_cache cache = make_cache("lru", {3, 0, 0});
    load_result loaded;
    for (int e = 0; e < 2; ++e) {
        CHECK_OK(cache.begin_load(0, e, 0, false, loaded));
        CHECK_OK(cache.complete_load(0, e));
    }
    CHECK_OK(cache.begin_load(0, 9, 0, true, loaded));
    CHECK_OK(cache.complete_load(0, 9));
    cache.shield(0, 9);
    CHECK(cache.next_victim(0, 0) != 9); // until its layer has come by
    std::vector<slot_offer> offers;
    slot_offer first;
    cache.offers(0, 2, offers);
    CHECK(cache.first_offer(0, 0, first));
    CHECK(!offers.empty() && offers.size() <= 2);
    CHECK_EQ(offers[0].key, cache.next_victim(0, 0));
    CHECK_EQ(first.key, offers[0].key);
    const int32_t ids[] = {3}, loads[] = {1};
    router_step step;
    step.experts   = ids;
    step.n_tokens  = loads;
    step.n_experts = step.n_rows = step.top_k = 1;
    step.ids                                  = ids;
    CHECK_OK(cache.begin_step(step));
    CHECK_EQ(cache.next_victim(0, 0), 9);
    CHECK_OK(cache.begin_load(0, 3, 0, false, loaded));
    CHECK_EQ(loaded.evicted_key, 9);
    CHECK(loaded.evicted_unused);
    CHECK_EQ(cache.stats().n_prefetch_wasted, 1);
}

void bad_configurations() {
    const model_shape good{2, 8, 2};
    auto create = [](model_shape shape, int n_devices, std::vector<int> slots) {
        std::unique_ptr<eviction_policy> policy;
        CHECK_OK(make_policy(eviction_policies(), "lru", model_shape{1, 1, 1}, nullptr, 0, policy));
        cache_config config;
        config.shape     = shape;
        config.n_devices = n_devices;
        config.n_slots   = std::move(slots);
        expert_cache out;
        return expert_cache::create(config, std::move(policy), out).code();
    };
    CHECK(create(good, 1, {8, 8}) == error_code::none);
    CHECK(create(good, 0, {}) == error_code::none);
    CHECK(create(good, 1, {9, 8}) == error_code::invalid_argument);
    CHECK(create(good, 1, {-1, 8}) == error_code::invalid_argument);
    CHECK(create(good, 1, {8}) == error_code::invalid_argument);
    CHECK(create(good, max_devices + 1, {}) == error_code::invalid_argument);
    CHECK(create({2, 0, 1}, 1, {0, 0}) == error_code::invalid_argument);
    CHECK(create({2, 8, 9}, 1, {8, 8}) == error_code::invalid_argument);
    CHECK(create({0, 8, 2}, 1, {}) == error_code::invalid_argument);

    expert_cache cache = make_cache("lru", {2, 2, 2});
    load_result loaded;
    CHECK(cache.begin_load(3, 0, 0, false, loaded).code() == error_code::invalid_argument);
    CHECK(cache.begin_load(0, n_expert, 0, false, loaded).code() == error_code::invalid_argument);
    CHECK(cache.begin_load(0, 0, 1, false, loaded).code() == error_code::invalid_argument);
    CHECK(cache.complete_load(0, 0).code() == error_code::out_of_order); // without begin
    CHECK_OK(cache.begin_load(0, 0, 0, false, loaded));
    CHECK(cache.complete_load(1, 0).code() == error_code::out_of_order); // another layer
    CHECK_OK(cache.complete_load(0, 0));
    CHECK(cache.complete_load(0, 0).code() == error_code::out_of_order); // twice
    std::vector<slot_move> moves;
    CHECK(cache.resize(0, 0, n_expert + 1, moves).code() == error_code::invalid_argument);
    CHECK_OK(cache.verify());
}

} // namespace

int main() {
    for (const char * name : {"lru", "lfu", "lfru", "ema", "mrs", "arc", "static", "eam"}) {
        random_operations(name, false, 12500, 42);
        random_operations(name, true, 12500, 43);
    }
    random_operations("lru", false, 100000, 7);
    resize_keeps_the_best();
    resize_moves_pinned_experts_down();
    a_failed_load_leaves_no_trace();
    mrs_reads_every_row();
    a_wrong_prefetch_goes_first();
    bad_configurations();
    return check::report("cache");
}
