#include "scheduler.h"

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
    build_plan(priced, device_of, out);
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
