#include "scheduler.h"
#include "three_timelines.h"

namespace hybrimoe {
namespace {

class paper_rule final : public scheduler {
public:
    status assign(const priced_problem & p, assignment & device_of) const override {
        three_timelines(p, device_of).run();
        return {};
    }
};

} // namespace

extern const policy_entry<scheduler> hybrimoe_scheduler;
const policy_entry<scheduler> hybrimoe_scheduler = {
    "hybrimoe",
    "The paper's greedy: three timelines, the operation that completes first is committed.",
    "HybriMoE sec. IV-B",
    {},
    nullptr,
    0,
    [](const model_shape &, const param_values &) -> std::unique_ptr<scheduler> {
        return std::make_unique<paper_rule>();
    },
};

} // namespace hybrimoe
