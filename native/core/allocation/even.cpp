#include "slot_allocation.h"

namespace hybrimoe {
namespace {

class even final : public slot_allocation {
public:
    status weights(const allocation_request &, std::vector<double> &, int &) const override { return {}; }
};

} // namespace

extern const policy_entry<slot_allocation> even_allocation;
const policy_entry<slot_allocation> even_allocation = {
    "even",
    "Every layer gets the same number of slots.",
    "",
    {},
    nullptr,
    0,
    [](const model_shape &, const param_values &) -> std::unique_ptr<slot_allocation> {
        return std::make_unique<even>();
    },
};

} // namespace hybrimoe
