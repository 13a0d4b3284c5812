#include "copy_all.h"
#include "scheduler.h"

namespace hybrimoe {
namespace {

class static_layers final : public scheduler {
public:
    explicit static_layers(int n_cpu_layers) : n_cpu_layers_(n_cpu_layers) {}

    status assign(const priced_problem & p, assignment & device_of) const override {
        if (p.problem->layer >= n_cpu_layers_) {
            assign_copy_all(p, device_of);
            return {};
        }
        for (int i = 0; i < p.n_items; ++i) {
            device_of[i] = cpu_device;
        }
        return {};
    }

private:
    int n_cpu_layers_;
};

const param_info params[] = {
    {"n_cpu_layers", max_layers, 0, max_layers, true,
     "the first so many MoE layers run on the CPU, the others on the accelerator"},
};

} // namespace

extern const policy_entry<scheduler> static_layers_scheduler;
const policy_entry<scheduler> static_layers_scheduler = {
    "static",
    "Whole layers are placed once: the first n on the CPU, the rest on the accelerator.",
    "llama.cpp --n-cpu-moe",
    {},
    params,
    1,
    [](const model_shape &, const param_values & p) -> std::unique_ptr<scheduler> {
        return std::make_unique<static_layers>(p.get_int("n_cpu_layers"));
    },
};

} // namespace hybrimoe
