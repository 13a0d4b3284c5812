// 100,000 random operations on the composed runtime, as the engine and its guard may call it: layers of decode and
// prefill, copies that end or fail in any order, limits, prompts, other costs, caches of another size.
#include "traffic.h"

#include "core/guard.h"

#include <algorithm>
#include <map>
#include <set>

using namespace hybrimoe;

namespace {

constexpr int n_layers = 4, n_expert = 12, top_k = 3, most_slots = 6, n_operations = 100000;

cost_model machine(int n_devices, double copy_us) {
    layers::costs c;
    c.cpu_per_token = 30.0;
    c.gpu_fixed     = 5.0;
    c.copy          = copy_us;
    c.n_devices     = n_devices;
    return layers::make_costs(c, n_layers);
}

runtime_limits limits_of(guard_level level) {
    runtime_limits limits;
    limits.prefetch      = level < guard_level::no_prefetch;
    limits.demand_copies = level < guard_level::no_demand;
    limits.admission     = level < guard_level::frozen;
    return limits;
}

class player {
public:
    player(const traffic::options & o, int n_devices, uint64_t seed)
        : n_devices_(n_devices), rng_(seed), runtime_(traffic::make_runtime(o, machine(n_devices, 20.0))) {}

    void run(int n) {
        for (int i = 0; i < n && check::n_failed() == 0; i++) {
            now_us_ += static_cast<double>(below(40));
            one();
            CHECK_OK(runtime_->cache().verify());
        }
        CHECK(check::n_failed() > 0 || (runtime_->stats().n_gpu > 0 && runtime_->stats().n_hits > 0));
    }

private:
    int below(int n) { return static_cast<int>(rng_() % static_cast<uint64_t>(n)); }

    void one() {
        switch (below(20)) {
        case 0:
            limits_ = limits_of(static_cast<guard_level>(below(5)));
            runtime_->set_limits(limits_);
            break;
        case 1:
            runtime_->begin_prompt();
            break;
        case 2:
            CHECK_OK(runtime_->set_costs(machine(n_devices_, 1.0 + below(100))));
            break;
        case 3:
            resize();
            break;
        case 4:
        case 5:
        case 6:
        case 7:
        case 8:
        case 9:
            end_copy();
            break;
        case 10:
            wrong_calls();
            break;
        default:
            layer();
        }
    }

    void layer() {
        const bool prefill = below(5) == 0;
        const int n_rows   = prefill ? 2 + below(6) : 1;
        std::vector<int32_t> ids;
        std::vector<float> scores(static_cast<size_t>(n_rows * n_expert));
        std::vector<float> ahead(n_expert);
        for (float & s : scores) {
            s = static_cast<float>(below(1000)) / 1000.0f;
        }
        for (float & s : ahead) {
            s = static_cast<float>(below(1000)) / 1000.0f;
        }
        for (int row = 0; row < n_rows; row++) {
            std::set<int32_t> chosen;
            while (chosen.size() < top_k) {
                chosen.insert(below(2) == 0 ? below(n_expert) : below(4)); // some favourites
            }
            ids.insert(ids.end(), chosen.begin(), chosen.end());
        }
        layer_event e;
        e.layer   = below(n_layers);
        e.n_rows  = n_rows;
        e.top_k   = top_k;
        e.ids     = ids.data();
        e.scores  = scores.data();
        e.gap_us  = below(200);
        e.scratch = prefill && below(2) == 0;
        for (const float *& distance : e.lookahead) {
            distance = below(3) == 0 ? nullptr : ahead.data();
        }
        const size_t n_before = runtime_->in_flight().size();
        const decision * d    = nullptr;
        CHECK_OK(runtime_->on_layer(e, now_us_, d));
        if (d == nullptr) {
            return;
        }
        CHECK_EQ(runtime_->in_flight().size(), n_before + d->transfers.size());
        check_plan(e, *d, std::set<int32_t>(ids.begin(), ids.end()));
        check_transfers(e, *d);
        if (below(2) == 0) {
            runtime_->on_layer_done();
        }
    }

    // Every active expert is computed once: from a slot that holds it, after its copy, or on the CPU.
    void check_plan(const layer_event & e, const decision & d, const std::set<int32_t> & active) {
        CHECK_EQ(d.items.size(), active.size());
        CHECK_EQ(d.plan.placements.size(), active.size());
        CHECK_EQ(d.plan.n_cpu + d.plan.n_gpu, static_cast<int>(active.size()));
        CHECK_EQ(d.n_hits + d.n_misses, static_cast<int>(active.size()));
        std::set<std::pair<int, int>> used;
        int n_rows = 0;
        for (size_t i = 0; i < d.items.size(); i++) {
            const placement & at = d.plan.placements[i];
            CHECK_EQ(at.expert, d.items[i].expert);
            CHECK(active.count(at.expert) == 1);
            n_rows += d.items[i].n_tokens;
            if (at.device == cpu_device) {
                CHECK(!at.copied);
                continue;
            }
            const auto copy = std::find_if(d.transfers.begin(), d.transfers.end(), [&](const transfer & t) {
                return t.layer == e.layer && t.expert == at.expert;
            });
            CHECK_EQ(at.copied, copy != d.transfers.end());
            if (d.slots[i] >= 0) {
                CHECK(used.insert({at.device, d.slots[i]}).second); // no slot serves two
                const residency now = runtime_->cache().lookup(e.layer, at.expert);
                CHECK(now.state != slot_state::absent && now.device == at.device && now.slot == d.slots[i]);
                CHECK(d.slots[i] < runtime_->cache().n_slots(e.layer, at.device));
            } else {
                CHECK(copy != d.transfers.end() && copy->kind == transfer_kind::scratch);
            }
        }
        CHECK_EQ(n_rows, e.n_rows * e.top_k);
    }

    // What the guard forbids does not happen.
    void check_transfers(const layer_event & e, const decision & d) const {
        std::set<int32_t> active(e.ids, e.ids + e.n_rows * e.top_k);
        for (const transfer & t : d.transfers) {
            CHECK(t.kind != transfer_kind::prefetch || (limits_.prefetch && t.layer != e.layer));
            CHECK((t.kind != transfer_kind::demand && t.kind != transfer_kind::scratch) || limits_.demand_copies);
            CHECK(t.kind == transfer_kind::scratch || t.kind == transfer_kind::prefetch || limits_.admission);
            CHECK((t.slot < 0) == (t.kind == transfer_kind::scratch));
            CHECK(t.kind != transfer_kind::scratch || e.scratch);
            CHECK(t.evicted < 0 || t.evicted / n_expert != e.layer || active.count(t.evicted % n_expert) == 0);
            CHECK(t.end_us >= t.start_us && t.start_us >= now_us_);
        }
    }

    void end_copy() {
        const auto & flying = runtime_->in_flight();
        if (flying.empty()) {
            return;
        }
        const transfer t = flying[static_cast<size_t>(below(static_cast<int>(flying.size())))];
        const bool fails = below(8) == 0;
        CHECK_OK(fails ? runtime_->on_fail(t.id, now_us_) : runtime_->on_complete(t.id, now_us_));
        if (t.slot >= 0) {
            const residency at = runtime_->cache().lookup(t.layer, t.expert);
            CHECK(at.state == (fails ? slot_state::absent : slot_state::resident));
            CHECK(!(runtime_->on_complete(t.id, now_us_).ok())); // no copy ends twice
        }
    }

    // As the engine does it: no copy is under way then.
    void resize() {
        while (!runtime_->in_flight().empty()) {
            CHECK_OK(runtime_->on_complete(runtime_->in_flight().front().id, now_us_));
        }
        runtime_->on_layer_done();
        std::vector<slot_move> moves;
        const int layer  = below(n_layers);
        const int device = below(n_devices_);
        const int n      = below(most_slots + 1);
        std::map<int, int> before; // key -> slot
        for (int e = 0; e < n_expert; e++) {
            const residency at = runtime_->cache().lookup(layer, e);
            if (at.device == device && at.slot >= 0) {
                before[runtime_->cache().shape().key(layer, e)] = at.slot;
            }
        }
        const int n_before = runtime_->cache().n_slots(layer, device);
        const bool done    = runtime_->resize(layer, device, n, moves).ok();
        CHECK_EQ(runtime_->cache().n_slots(layer, device), done ? n : n_before);
        CHECK(done || moves.empty()); // prefetched experts that wait for their layer may not go
        for (const slot_move & m : moves) {
            CHECK_EQ(before[m.key], m.from_slot);
            before[m.key] = m.to_slot;
        }
        int n_kept = 0;
        for (int e = 0; e < n_expert; e++) {
            const residency at = runtime_->cache().lookup(layer, e);
            if (at.device == device && at.slot >= 0) {
                n_kept++;
                CHECK_EQ(before[runtime_->cache().shape().key(layer, e)], at.slot);
            }
        }
        CHECK_EQ(n_kept, std::min(done ? n : n_before, static_cast<int>(before.size())));
    }

    // Refused, and nothing has changed.
    void wrong_calls() {
        const uint64_t hash = runtime_->stats().decision_hash;
        const int32_t ids[] = {0, 1, n_expert};
        const decision * d  = nullptr;
        const size_t n      = runtime_->in_flight().size();
        layer_event e;
        e.layer = below(n_layers);
        e.top_k = top_k;
        e.ids   = ids;
        CHECK(!runtime_->on_layer(e, now_us_, d).ok());
        e.layer = n_layers;
        CHECK(!runtime_->on_layer(e, now_us_, d).ok());
        CHECK(!runtime_->on_complete(-7, now_us_).ok());
        CHECK(!runtime_->on_fail(0, now_us_).ok());
        CHECK(runtime_->stats().decision_hash == hash && runtime_->in_flight().size() == n && d == nullptr);
    }

    int n_devices_;
    std::mt19937_64 rng_;
    std::unique_ptr<runtime> runtime_;
    runtime_limits limits_;
    double now_us_ = 0.0;
};

} // namespace

int main() {
    const char * const evictions[]  = {"lru", "lfu", "lfru", "ema", "mrs", "arc", "eam"};
    const char * const prefetches[] = {"none", "next-layer", "impact", "fate", "path", "eam"};
    const char * const admissions[] = {"always", "pays", "second-use"};
    const char * const schedules[]  = {"two-threshold", "gpu-only", "two-threshold", "hybrimoe", "two-threshold"};
    int n_runs                      = 0;
    for (const char * eviction : evictions) {
        for (const char * prefetch : prefetches) {
            for (const int n_devices : {1, 2}) {
                traffic::options o;
                o.n_layers = n_layers;
                o.n_expert = n_expert;
                o.top_k    = top_k;
                // Of those that want less than everything, what they admit changes what they want.
                o.admission = admissions[n_runs % 3];
                o.schedule  = schedules[n_runs % 5];
                o.n_slots   = 1 + n_runs % most_slots;
                o.eviction  = eviction;
                o.prefetch  = prefetch;
                o.schedule  = n_runs % 3 == 0 ? "hybrimoe" : "two-threshold";
                o.pay_back  = n_runs % 2 == 0;
                player(o, n_devices, 1000 + static_cast<uint64_t>(n_runs)).run(n_operations / 84);
                n_runs++;
            }
        }
    }
    CHECK_EQ(n_runs, 84);
    return check::report("runtime_random");
}
