#include "slot_allocation.h"

#include <cmath>

namespace hybrimoe {
namespace {

class proportional final : public slot_allocation {
public:
    status weights(const allocation_request & request, std::vector<double> & out, int &) const override {
        if (!request.demand) {
            return status::fail(error_code::invalid_argument, "proportional allocation needs a demand per layer");
        }
        for (size_t l = 0; l < out.size(); ++l) {
            const double d = request.demand[l];
            if (!std::isfinite(d) || d < 0.0) {
                return status::fail(error_code::invalid_argument,
                                    "demand of layer %zu = %g must be finite and at least 0", l, d);
            }
            out[l] = d;
        }
        return {};
    }
};

} // namespace

extern const policy_entry<slot_allocation> proportional_allocation;
const policy_entry<slot_allocation> proportional_allocation = {
    "proportional",
    "Slots in proportion to each layer's predicted demand.",
    "ExpertFlow (He), arXiv 2410.17954",
    {},
    nullptr,
    0,
    [](const model_shape &, const param_values &) -> std::unique_ptr<slot_allocation> {
        return std::make_unique<proportional>();
    },
};

} // namespace hybrimoe
