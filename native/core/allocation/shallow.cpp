#include "slot_allocation.h"

namespace hybrimoe {
namespace {

class shallow final : public slot_allocation {
public:
    explicit shallow(int n_full) : n_full_(n_full) {}

    status weights(const allocation_request &, std::vector<double> &, int & n_full_layers) const override {
        n_full_layers = n_full_;
        return {};
    }

private:
    int n_full_;
};

const param_info params[] = {
    {"n_full", 2, 0, max_layers, true, "first layers that are cached whole; look-ahead cannot serve them"},
};

} // namespace

extern const policy_entry<slot_allocation> shallow_allocation;
const policy_entry<slot_allocation> shallow_allocation = {
    "shallow",
    "The first layers are cached whole, the rest evenly.",
    "Fate, arXiv 2502.12224",
    {},
    params,
    1,
    [](const model_shape &, const param_values & p) -> std::unique_ptr<slot_allocation> {
        return std::make_unique<shallow>(p.get_int("n_full"));
    },
};

} // namespace hybrimoe
