#include "eviction_policy.h"

#include <algorithm>
#include <vector>

namespace hybrimoe {
namespace {

// Adaptive replacement (Megiddo, Modha, FAST 2003; used by Fate): residents are in T1 (used once) or T2 (again), ghosts
// of evicted experts in B1 or B2; a hit on a ghost moves the target size of T1.
class arc final : public eviction_policy {
public:
    explicit arc(const model_shape & shape) : shape_(shape) { clear(); }

    void reset() override {
        clear();
        for (pool & p : pools_) {
            const int n_slots = p.n_slots;
            p                 = pool();
            p.n_slots         = n_slots;
        }
    }
    void on_pool_size(int pool_id, int n_slots) override {
        if (static_cast<size_t>(pool_id) >= pools_.size()) {
            pools_.resize(static_cast<size_t>(pool_id) + 1);
        }
        pools_[static_cast<size_t>(pool_id)].n_slots = n_slots;
        pools_[static_cast<size_t>(pool_id)].target =
            std::min(pools_[static_cast<size_t>(pool_id)].target, 1.0 * n_slots);
    }
    void on_hit(int pool_id, int key) override { move(pool_id, key, T2); }

    void on_miss(int pool_id, int key) override {
        pool & p        = pools_[static_cast<size_t>(pool_id)];
        const int where = at(key).list;
        if (where == B1) {
            p.target = std::min(1.0 * p.n_slots, p.target + std::max(1.0, 1.0 * p.count[B2] / p.count[B1]));
        } else if (where == B2) {
            p.target = std::max(0.0, p.target - std::max(1.0, 1.0 * p.count[B1] / p.count[B2]));
        }
        // REPLACE takes from T1 while it is above its target.
        const double n1 = p.count[T1];
        take_t1_        = n1 >= 1 && (n1 > p.target || (where == B2 && n1 == p.target));
    }

    double keep_value(int key) const override { return values()[key]; }
    const double * values() const override { return take_t1_ ? not_in_t1_.data() : in_t1_.data(); }

    void on_evict(int pool_id, int key) override {
        move(pool_id, key, at(key).list == T2 ? B2 : B1);
        pool & p = pools_[static_cast<size_t>(pool_id)];
        while (p.count[T1] + p.count[B1] > p.n_slots && p.count[B1] > 0) {
            unlink(p.oldest[B1]);
        }
        while (p.count[T1] + p.count[T2] + p.count[B1] + p.count[B2] > 2 * p.n_slots && p.count[B2] > 0) {
            unlink(p.oldest[B2]);
        }
    }

    void on_admit(int pool_id, int key) override {
        const int where = at(key).list;
        move(pool_id, key, where == B1 || where == B2 ? T2 : T1);
    }

private:
    enum list : int8_t { none, T1, T2, B1, B2, n_lists };
    struct entry {
        int8_t list = none;
        int pool    = -1;
        int older = -1, newer = -1; // neighbours in its list
    };
    struct pool {
        int n_slots         = 0;
        double target       = 0.0;
        int count[n_lists]  = {};
        int oldest[n_lists] = {-1, -1, -1, -1, -1};
        int newest[n_lists] = {-1, -1, -1, -1, -1};
    };

    entry & at(int key) { return entries_[static_cast<size_t>(key)]; }
    void clear() {
        const auto n_keys = static_cast<size_t>(shape_.n_keys());
        entries_.assign(n_keys, entry());
        in_t1_.assign(n_keys, 0.0);
        not_in_t1_.assign(n_keys, 1.0);
    }
    void set_list(int key, list to) {
        in_t1_[static_cast<size_t>(key)]     = to == T1 ? 1.0 : 0.0;
        not_in_t1_[static_cast<size_t>(key)] = to == T1 ? 0.0 : 1.0;
    }

    void unlink(int key) {
        entry & e = at(key);
        if (e.pool < 0) {
            return;
        }
        pool & p = pools_[static_cast<size_t>(e.pool)];
        --p.count[e.list];
        (e.older >= 0 ? at(e.older).newer : p.oldest[e.list]) = e.newer;
        (e.newer >= 0 ? at(e.newer).older : p.newest[e.list]) = e.older;
        e                                                     = entry();
        set_list(key, none);
    }

    void move(int pool_id, int key, list to) {
        unlink(key);
        pool & p                                                    = pools_[static_cast<size_t>(pool_id)];
        at(key)                                                     = {to, pool_id, p.newest[to], -1};
        (p.newest[to] >= 0 ? at(p.newest[to]).newer : p.oldest[to]) = key;
        p.newest[to]                                                = key;
        ++p.count[to];
        set_list(key, to);
    }

    model_shape shape_;
    std::vector<entry> entries_;
    std::vector<pool> pools_;
    std::vector<double> in_t1_, not_in_t1_; // values by key while a victim comes from T2, from T1
    bool take_t1_ = true;                   // decision of the last on_miss
};

} // namespace

extern const policy_entry<eviction_policy> arc_eviction;
const policy_entry<eviction_policy> arc_eviction = {
    "arc",
    "Balances recency and frequency by the ghosts of evicted experts.",
    "Fate, arXiv 2502.12224; Megiddo and Modha, FAST 2003",
    {},
    nullptr,
    0,
    [](const model_shape & shape, const param_values &) -> std::unique_ptr<eviction_policy> {
        return std::make_unique<arc>(shape);
    },
};

} // namespace hybrimoe
