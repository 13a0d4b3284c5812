#include "scheduler.h"

#include "slot_choice.h"

namespace hybrimoe {

#define HYBRIMOE_POLICY(name) extern const policy_entry<scheduler> name##_scheduler;
#include "policies.def"
#undef HYBRIMOE_POLICY

const policy_table<scheduler> & schedulers() {
    static const policy_entry<scheduler> * const entries[] = {
#define HYBRIMOE_POLICY(name) &name##_scheduler,
#include "policies.def"
#undef HYBRIMOE_POLICY
    };
    static const policy_table<scheduler> table = {"scheduler", entries, sizeof(entries) / sizeof(entries[0])};
    return table;
}

status plan_layer(const scheduler & policy, const layer_problem & problem, layer_plan & out) {
    priced_problem priced;
    assignment device_of;
    HYBRIMOE_TRY(price(problem, priced));
    HYBRIMOE_TRY(policy.assign(priced, device_of));
    choose_slots(priced, device_of);
    build_plan(priced, device_of, out);
    return {};
}

status plan_with(const layer_problem & problem, const layer_plan & plan, int item, int device, layer_plan & out,
                 double & makespan_us) {
    priced_problem priced;
    assignment device_of;
    HYBRIMOE_TRY(price(problem, priced));
    for (int i = 0; i < problem.n_items; ++i) {
        device_of[i] = static_cast<int8_t>(plan.placements[static_cast<size_t>(i)].device);
    }
    device_of[item] = static_cast<int8_t>(device);
    build_plan(priced, device_of, out);
    makespan_us = out.makespan_us;
    return {};
}

status predict_makespan(const scheduler & policy, const layer_problem & problem, double & out_us) {
    priced_problem priced;
    assignment device_of;
    HYBRIMOE_TRY(price(problem, priced));
    HYBRIMOE_TRY(policy.assign(priced, device_of));
    out_us = makespan(priced, device_of);
    return {};
}

} // namespace hybrimoe
