#include "belady_oracle.h"

namespace hybrimoe {

extern const policy_entry<eviction_policy> belady_bypass_eviction;
const policy_entry<eviction_policy> belady_bypass_eviction = {
    "belady-bypass",
    "Oracle: as belady, but a miss that is used later than every resident is not admitted.",
    "Belady 1966",
    {false, true, false},
    nullptr,
    0,
    [](const model_shape & shape, const param_values &) -> std::unique_ptr<eviction_policy> {
        return std::make_unique<belady_oracle>(shape, true, future_index::never);
    },
};

} // namespace hybrimoe
