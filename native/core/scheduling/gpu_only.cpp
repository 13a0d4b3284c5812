#include "copy_all.h"
#include "scheduler.h"

namespace hybrimoe {
namespace {

class gpu_only final : public scheduler {
public:
    status assign(const priced_problem & p, assignment & device_of) const override {
        assign_copy_all(p, device_of);
        return {};
    }
};

} // namespace

extern const policy_entry<scheduler> gpu_only_scheduler;
const policy_entry<scheduler> gpu_only_scheduler = {
    "gpu-only",
    "Every miss is copied and computed on an accelerator; only what finds no slot falls to the CPU.",
    "AdapMoE-like loading; HybriMoE sec. II",
    {},
    nullptr,
    0,
    [](const model_shape &, const param_values &) -> std::unique_ptr<scheduler> {
        return std::make_unique<gpu_only>();
    },
};

} // namespace hybrimoe
