#include "free_copies.h"
#include "one_card.h"
#include "scheduler.h"
#include "several_cards.h"

namespace hybrimoe {
namespace {

// Copy the u heaviest misses, hand the v lightest hits to the CPU, and take the best of all (u, v): exact where all
// loads are equal (decode of one token). With other loads single experts are then moved while that helps
// (docs/policies.md).
class two_threshold final : public scheduler {
public:
    status assign(const priced_problem & p, assignment & device_of) const override {
        if (p.n_devices <= 1) {
            assign_one_card(p, device_of);
        } else {
            assign_several_cards(p, device_of);
        }
        add_free_copies(p, device_of);
        return {};
    }
};

} // namespace

extern const policy_entry<scheduler> two_threshold_scheduler;
const policy_entry<scheduler> two_threshold_scheduler = {
    "two-threshold",
    "Copies the u heaviest misses and hands the v lightest hits to the CPU: the best of all (u, v).",
    "this project; objective of HybriMoE sec. IV-B",
    {},
    nullptr,
    0,
    [](const model_shape &, const param_values &) -> std::unique_ptr<scheduler> {
        return std::make_unique<two_threshold>();
    },
};

} // namespace hybrimoe
