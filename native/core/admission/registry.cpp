#include "admission_policy.h"

namespace hybrimoe {

#define HYBRIMOE_POLICY(name) extern const policy_entry<admission_policy> name##_admission;
#include "policies.def"
#undef HYBRIMOE_POLICY

const policy_table<admission_policy> & admission_policies() {
    static const policy_entry<admission_policy> * const entries[] = {
#define HYBRIMOE_POLICY(name) &name##_admission,
#include "policies.def"
#undef HYBRIMOE_POLICY
    };
    static const policy_table<admission_policy> table = {"admission policy", entries,
                                                         sizeof(entries) / sizeof(entries[0])};
    return table;
}

} // namespace hybrimoe
