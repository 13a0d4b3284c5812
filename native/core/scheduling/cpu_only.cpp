#include "scheduler.h"

namespace hybrimoe {
namespace {

class cpu_only final : public scheduler {
public:
    status assign(const priced_problem & p, assignment & device_of) const override {
        for (int i = 0; i < p.n_items; ++i) {
            device_of[i] = static_cast<int8_t>(p.items[i].device);
        }
        return {};
    }
};

} // namespace

extern const policy_entry<scheduler> cpu_only_scheduler;
const policy_entry<scheduler> cpu_only_scheduler = {
    "cpu-only",
    "The CPU runs every miss, the accelerators every hit; nothing is copied on demand.",
    "Fiddler, kTransformers",
    {},
    nullptr,
    0,
    [](const model_shape &, const param_values &) -> std::unique_ptr<scheduler> {
        return std::make_unique<cpu_only>();
    },
};

} // namespace hybrimoe
