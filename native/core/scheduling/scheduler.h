// Intra-layer scheduling: who computes which expert, and what is copied. A scheduler only fills an assignment; prices,
// makespan and timeline are common (pricing.h), so a policy is one pure function.
#pragma once

#include "../registry.h"
#include "pricing.h"

namespace hybrimoe {

class scheduler {
public:
    virtual ~scheduler() = default;

    // Fills device_of[0..n_items). Must respect max_copies and may_copy, must be const and must not allocate.
    virtual status assign(const priced_problem & priced, assignment & device_of) const = 0;
};

const policy_table<scheduler> & schedulers();

// Prices, assigns and builds the timeline. `out` keeps its capacity, so a plan that is reused does not allocate.
status plan_layer(const scheduler & policy, const layer_problem & problem, layer_plan & out);

// The plan with one item given to another device: its makespan, and in `out` the timeline. `out` is not `plan`.
status plan_with(const layer_problem & problem, const layer_plan & plan, int item, int device, layer_plan & out,
                 double & makespan_us);

// The makespan alone, for callers that compare many variants of a layer (impact-driven prefetch).
status predict_makespan(const scheduler & policy, const layer_problem & problem, double & out_us);

} // namespace hybrimoe
