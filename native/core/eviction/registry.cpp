#include "eviction_policy.h"

namespace hybrimoe {

#define HYBRIMOE_POLICY(name) extern const policy_entry<eviction_policy> name##_eviction;
#include "policies.def"
#undef HYBRIMOE_POLICY

const policy_table<eviction_policy> & eviction_policies() {
    static const policy_entry<eviction_policy> * const entries[] = {
#define HYBRIMOE_POLICY(name) &name##_eviction,
#include "policies.def"
#undef HYBRIMOE_POLICY
    };
    static const policy_table<eviction_policy> table = {"eviction policy", entries,
                                                        sizeof(entries) / sizeof(entries[0])};
    return table;
}

} // namespace hybrimoe
