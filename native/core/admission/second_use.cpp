#include "admission_policy.h"

#include <algorithm>
#include <vector>

namespace hybrimoe {
namespace {

class second_use final : public admission_policy {
public:
    second_use(const model_shape & shape, int64_t window) : shape_(shape), window_(window) { reset(); }

    void reset() override {
        last_.assign(static_cast<size_t>(shape_.n_keys()), never);
        before_.assign(static_cast<size_t>(shape_.n_keys()), never);
        n_steps_.assign(static_cast<size_t>(shape_.n_layers), 0);
    }
    void on_step(const router_step & step) override {
        const int64_t now = ++n_steps_[static_cast<size_t>(step.layer)];
        for (int i = 0; i < step.n_experts; ++i) {
            const auto key = static_cast<size_t>(shape_.key(step.layer, step.experts[i]));
            before_[key]   = step.n_tokens[i] > 1 ? now : last_[key]; // two tokens of one batch are two uses
            last_[key]     = now;
        }
    }
    bool wants(int key) const override {
        return last_[static_cast<size_t>(key)] - before_[static_cast<size_t>(key)] <= window_;
    }

private:
    static constexpr int64_t never = INT64_MIN / 2;

    model_shape shape_;
    int64_t window_;
    std::vector<int64_t> last_, before_, n_steps_; // in steps of the expert's layer
};

const param_info params[] = {
    {"window", 256, 1, 1e9, true, "steps within which the second use must come"},
};

} // namespace

extern const policy_entry<admission_policy> second_use_admission;
const policy_entry<admission_policy> second_use_admission = {
    "second-use",
    "An expert is admitted at its second use within a window.",
    "",
    {},
    params,
    1,
    [](const model_shape & shape, const param_values & p) -> std::unique_ptr<admission_policy> {
        return std::make_unique<second_use>(shape, static_cast<int64_t>(p.get("window")));
    },
};

} // namespace hybrimoe
