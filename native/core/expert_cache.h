// Which expert is in which slot of which accelerator. An explicit state machine per slot:
//
//     absent --begin--> loading --complete--> resident <--pin/unpin--> pinned
//                          |                     |
//                          +------fail---------->absent<--evict (inside begin or resize)
//
// Slots stand in pools: one per (device, layer), or, pooled, one per (device, layer class). An expert is on one device
// at most. The policy says who goes; the cache guards who may: never an expert of the step that runs, one that is
// loading, or a pinned one.
#pragma once

#include "eviction/eviction_policy.h"

#include <memory>
#include <vector>

namespace hybrimoe {

enum class slot_state : uint8_t { absent, loading, resident, pinned };

struct residency {
    slot_state state = slot_state::absent;
    int device       = cpu_device;
    int slot         = -1;    // index in its pool
    bool speculative = false; // prefetched, and no step has used it yet
};

struct cache_config {
    model_shape shape;
    int n_devices = 0;
    bool pooled   = false;
    std::vector<int> n_slots;        // [n_devices, n_layers]; pooled: a pool gets the sum over its layers
    std::vector<int> class_of_layer; // empty: all layers are of one class
};

struct cache_stats {
    int64_t n_queries = 0, n_hits = 0, n_misses = 0;
    int64_t n_late  = 0; // misses whose copy was under way
    int64_t n_loads = 0, n_failed_loads = 0, n_evictions = 0, n_refused = 0;
    int64_t n_prefetched = 0, n_prefetch_used = 0, n_prefetch_wasted = 0; // wasted: evicted before any use
};

struct load_result {
    int slot            = -1;
    int evicted_key     = -1;
    bool evicted_unused = false; // a prefetched expert that nobody used
};

struct slot_move {
    int key, from_slot, to_slot;
};

// A slot that a load may take, and what stands in it. `<`: takes it first; ties by least recent use, then lowest id.
struct slot_offer {
    int slot         = -1;
    int device       = cpu_device;
    bool is_free     = false;
    bool is_dud      = false; // a prefetch whose layer came by without using it: a wrong guess goes before all others
    double value     = 0.0;   // the policy's
    int64_t last_use = 0;
    int key          = -1;

    bool operator<(const slot_offer & other) const;
};

class expert_cache {
public:
    static status create(const cache_config & config, std::unique_ptr<eviction_policy> policy, expert_cache & out);

    const model_shape & shape() const { return shape_; }
    int n_devices() const { return n_devices_; }
    const cache_stats & stats() const { return stats_; }
    eviction_policy & policy() { return *policy_; }

    residency lookup(int layer, int expert) const {
        const where & w = where_[static_cast<size_t>(shape_.key(layer, expert))];
        if (w.pool < 0) {
            return {};
        }
        const pool & p = pools_[static_cast<size_t>(w.pool)];
        const slot & s = p.slots[static_cast<size_t>(w.slot)];
        return {s.state, p.device, w.slot, s.speculative};
    }

    // Forgets everything and loads experts 0.. of each layer (per layer) or of the pool's layers in turn.
    void reset(bool preload);
    void begin_prompt() { policy_->on_prompt(); }

    // A step of one layer: looks up all of its experts, then touches them in the order listed and tells the policy.
    // They are protected until end_step. Fails, changing nothing, if the policy lacks what it needs.
    status begin_step(const router_step & step);
    void end_step() { protected_from_ = step_id_ + 1; }

    // Two-phase load. begin finds a free slot or evicts one victim, atomically: it fails without having changed
    // anything.
    status begin_load(int layer, int expert, int device, bool speculative, load_result & out);
    status complete_load(int layer, int expert);
    status fail_load(int layer, int expert);

    status pin(int layer, int expert);
    status unpin(int layer, int expert);
    // Keeps a resident or loading expert from being evicted until its layer's next step has begun.
    void shield(int layer, int expert);

    // Slots that a load into this layer's pool could take now; counting stops at n_wanted.
    int n_available(int layer, int device, int n_wanted) const;
    int n_slots(int layer, int device) const;
    // Slots that loads into this layer's pools could take, of all devices, the one that loses least first; at most
    // n_wanted of a device.
    void offers(int layer, int n_wanted, std::vector<slot_offer> & out) const;
    // The first of one device; false: none.
    bool first_offer(int layer, int device, slot_offer & out) const;
    // The expert that would be evicted next, or -1.
    int next_victim(int layer, int device) const;

    // Keeps the best experts; those in slots that vanish move down into freed ones, in the order listed in `moves`.
    status resize(int layer, int device, int n_slots, std::vector<slot_move> & moves);

    // Checks all invariants, for tests: the first that does not hold.
    status verify() const;

private:
    struct where {
        int16_t pool = -1;
        int32_t slot = -1;
    };
    struct slot {
        int32_t key         = -1;
        slot_state state    = slot_state::absent;
        bool speculative    = false; // prefetched and not used yet
        int64_t loaded_step = 0;     // steps of its layer when the load began
    };
    struct pool {
        int device          = 0;
        int n_layers_served = 1;
        int n_used          = 0;
        std::vector<slot> slots;
    };

    int pool_of(int layer, int device) const { return pool_of_[static_cast<size_t>(device * shape_.n_layers + layer)]; }
    bool may_leave(const slot & s) const;
    bool may_go(const slot & s) const;
    slot_offer offer_of(const pool & p, int index, const double * values) const;
    int find_victim(const pool & p) const;
    void vacate(int pool_id, int slot_index, load_result * out);
    status find_loading(int layer, int expert, const char * what, slot *& out);
    status check_expert(int layer, int expert) const;

    model_shape shape_;
    int n_devices_ = 0;
    std::unique_ptr<eviction_policy> policy_;
    bool may_bypass_ = false; // the policy's word, asked once
    std::vector<pool> pools_;
    std::vector<int> pool_of_;      // [n_devices, n_layers]
    std::vector<where> where_;      // per key
    std::vector<int64_t> last_use_; // per key, in ticks
    std::vector<int64_t> used_in_;  // per key, id of the last step that used it
    std::vector<int64_t> shield_;   // per key: kept while its layer's step count is below this
    std::vector<int64_t> n_steps_;  // per layer
    int64_t tick_           = 0;
    int64_t step_id_        = 0;
    int64_t protected_from_ = 1;
    cache_stats stats_;
};

} // namespace hybrimoe
