#include "belady_oracle.h"

namespace hybrimoe {

extern const policy_entry<eviction_policy> belady_eviction;
const policy_entry<eviction_policy> belady_eviction = {
    "belady",
    "Oracle: evicts the expert of furthest next use; admits every miss.",
    "Belady 1966",
    {false, true, false},
    nullptr,
    0,
    [](const model_shape & shape, const param_values &) -> std::unique_ptr<eviction_policy> {
        return std::make_unique<belady_oracle>(shape, false, future_index::never);
    },
};

} // namespace hybrimoe
