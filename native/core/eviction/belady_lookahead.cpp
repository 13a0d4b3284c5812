#include "belady_oracle.h"

namespace hybrimoe {
namespace {

const param_info params[] = {
    {"window", 16, 1, 1e9, true, "tokens of the future that are known"},
};

} // namespace

extern const policy_entry<eviction_policy> belady_lookahead_eviction;
const policy_entry<eviction_policy> belady_lookahead_eviction = {
    "belady-lookahead",
    "Oracle that knows the next tokens only; beyond them it evicts the least recently used.",
    "Read-ME, arXiv 2410.19123",
    {false, true, false},
    params,
    1,
    [](const model_shape & shape, const param_values & p) -> std::unique_ptr<eviction_policy> {
        return std::make_unique<belady_oracle>(shape, false, static_cast<int64_t>(p.get("window")));
    },
};

} // namespace hybrimoe
