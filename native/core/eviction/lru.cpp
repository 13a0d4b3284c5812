#include "eviction_policy.h"

namespace hybrimoe {
namespace {

// Least recent use is the cache's own tie-break, so every expert has the same value.
class lru final : public eviction_policy {
public:
    double keep_value(int) const override { return 0.0; }
};

} // namespace

extern const policy_entry<eviction_policy> lru_eviction;
const policy_entry<eviction_policy> lru_eviction = {
    "lru",
    "Evicts the least recently used expert.",
    "",
    {},
    nullptr,
    0,
    [](const model_shape &, const param_values &) -> std::unique_ptr<eviction_policy> {
        return std::make_unique<lru>();
    },
};

} // namespace hybrimoe
