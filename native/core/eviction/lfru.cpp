#include "eviction_policy.h"

#include <algorithm>
#include <vector>

namespace hybrimoe {
namespace {

class lfru final : public eviction_policy {
public:
    explicit lfru(const model_shape & shape) : shape_(shape) {
        n_uses_.assign(static_cast<size_t>(shape.n_keys()), 0);
        last_use_.assign(static_cast<size_t>(shape.n_keys()), 0);
        n_steps_.assign(static_cast<size_t>(shape.n_layers), 0);
    }

    void reset() override {
        std::fill(n_uses_.begin(), n_uses_.end(), 0);
        std::fill(last_use_.begin(), last_use_.end(), 0);
        std::fill(n_steps_.begin(), n_steps_.end(), 0);
    }
    void on_step(const router_step & step) override {
        const int64_t now = ++n_steps_[static_cast<size_t>(step.layer)];
        for (int i = 0; i < step.n_experts; ++i) {
            const auto key = static_cast<size_t>(shape_.key(step.layer, step.experts[i]));
            n_uses_[key] += step.n_tokens[i];
            last_use_[key] = now;
        }
    }
    double keep_value(int key) const override {
        const int64_t age = n_steps_[static_cast<size_t>(shape_.layer_of(key))] - last_use_[static_cast<size_t>(key)];
        return static_cast<double>(n_uses_[static_cast<size_t>(key)]) / static_cast<double>(age + 1);
    }

private:
    model_shape shape_;
    std::vector<int64_t> n_uses_, last_use_, n_steps_; // time is counted in steps of the expert's layer
};

} // namespace

extern const policy_entry<eviction_policy> lfru_eviction;
const policy_entry<eviction_policy> lfru_eviction = {
    "lfru",
    "Evicts the smallest uses / (now - last use + 1), in steps.",
    "",
    {},
    nullptr,
    0,
    [](const model_shape & shape, const param_values &) -> std::unique_ptr<eviction_policy> {
        return std::make_unique<lfru>(shape);
    },
};

} // namespace hybrimoe
