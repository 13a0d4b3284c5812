// Whether a missed expert is worth a slot. Without a slot it can still be computed by the CPU, or copied to scratch.
#pragma once

#include "../cost_model.h"
#include "../registry.h"

namespace hybrimoe {

class admission_policy {
public:
    virtual ~admission_policy() = default;

    virtual bool wants(int key) const = 0; // after the on_step that used it

    virtual void reset() {}
    virtual void on_step(const router_step &) {}
    virtual void on_admit(int /*key*/) {}
    virtual void on_evict(int /*key*/) {}
    virtual void set_costs(const cost_model *) {} // lives as long as the policy; null: unknown
};

const policy_table<admission_policy> & admission_policies();

} // namespace hybrimoe
