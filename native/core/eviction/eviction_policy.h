// Which resident expert goes first. A policy is a value per expert, smallest first out; the cache finds the victim
// among the slots that may go, and breaks ties by least recent use, then lowest id.
#pragma once

#include "../registry.h"

#include <cstdint>

namespace hybrimoe {

// The whole routing of a replay, for oracles.
struct future_trace {
    const int32_t * experts = nullptr; // [n_tokens, n_layers, top_k]; -1 in the first place: the layer did not run
    int64_t n_tokens        = 0;
};

class eviction_policy {
public:
    virtual ~eviction_policy() = default;

    virtual double keep_value(int key) const = 0;

    // Everything below is optional. on_step comes once per step and layer, before its hits and misses.
    virtual void reset() {}                                        // forget all statistics
    virtual void on_prompt() {}                                    // a new request begins
    virtual status check(const router_step &) const { return {}; } // may refuse a step, before anything changes
    virtual void on_step(const router_step &) {}
    virtual void on_hit(int /*pool*/, int /*key*/) {}
    virtual void on_miss(int /*pool*/, int /*key*/) {} // wanted in this pool; before its victim is chosen
    virtual void on_admit(int /*pool*/, int /*key*/) {}
    virtual void on_evict(int /*pool*/, int /*key*/) {}
    virtual void on_pool_size(int /*pool*/, int /*n_slots*/) {}

    // keep_value of every key as a table, where the policy has one: the search for a victim then makes no calls. Asked
    // anew for every search.
    virtual const double * values() const { return nullptr; }

    virtual bool may_evict() const { return true; }
    // True: an expert whose value is not above the victim's is not admitted.
    virtual bool may_bypass() const { return false; }
    virtual status set_future(const future_trace &) {
        return status::fail(error_code::invalid_argument, "this eviction policy is no oracle");
    }
};

const policy_table<eviction_policy> & eviction_policies();

} // namespace hybrimoe
