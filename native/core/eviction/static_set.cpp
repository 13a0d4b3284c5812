#include "eviction_policy.h"

namespace hybrimoe {
namespace {

// What is loaded first stays: pins chosen by the caller, e.g. the most used experts of other prompts.
class static_set final : public eviction_policy {
public:
    double keep_value(int) const override { return 0.0; }
    bool may_evict() const override { return false; }
};

} // namespace

extern const policy_entry<eviction_policy> static_set_eviction;
const policy_entry<eviction_policy> static_set_eviction = {
    "static",
    "Never evicts: the experts loaded first stay.",
    "",
    {},
    nullptr,
    0,
    [](const model_shape &, const param_values &) -> std::unique_ptr<eviction_policy> {
        return std::make_unique<static_set>();
    },
};

} // namespace hybrimoe
