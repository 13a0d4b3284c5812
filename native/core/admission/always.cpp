#include "admission_policy.h"

namespace hybrimoe {
namespace {

class always final : public admission_policy {
public:
    bool wants(int) const override { return true; }
};

} // namespace

extern const policy_entry<admission_policy> always_admission;
const policy_entry<admission_policy> always_admission = {
    "always",
    "Every missed expert is admitted.",
    "",
    {},
    nullptr,
    0,
    [](const model_shape &, const param_values &) -> std::unique_ptr<admission_policy> {
        return std::make_unique<always>();
    },
};

} // namespace hybrimoe
