#include "eviction_policy.h"

#include <algorithm>
#include <vector>

namespace hybrimoe {
namespace {

// S = alpha * used + (1 - alpha) * S, once per step for all experts of the layer. Eager on purpose: a lazy power would
// round differently and so break ties differently.
class ema final : public eviction_policy {
public:
    ema(const model_shape & shape, double alpha) : shape_(shape), alpha_(alpha) {
        value_.assign(static_cast<size_t>(shape.n_keys()), 0.0);
    }

    void reset() override { std::fill(value_.begin(), value_.end(), 0.0); }
    void on_step(const router_step & step) override {
        double * row      = value_.data() + shape_.key(step.layer, 0);
        const double keep = 1.0 - alpha_;
        for (int e = 0; e < shape_.n_expert; ++e) {
            row[e] = keep * row[e];
        }
        for (int i = 0; i < step.n_experts; ++i) {
            row[step.experts[i]] += alpha_;
        }
    }
    double keep_value(int key) const override { return value_[static_cast<size_t>(key)]; }
    const double * values() const override { return value_.data(); }

private:
    model_shape shape_;
    double alpha_;
    std::vector<double> value_;
};

const param_info params[] = {
    {"alpha", 0.1, 1e-6, 1.0, false, "weight of the newest step"},
};

} // namespace

extern const policy_entry<eviction_policy> ema_eviction;
const policy_entry<eviction_policy> ema_eviction = {
    "ema",
    "Evicts the lowest moving average of plain use (no scores).",
    "this project",
    {},
    params,
    1,
    [](const model_shape & shape, const param_values & p) -> std::unique_ptr<eviction_policy> {
        return std::make_unique<ema>(shape, p.get("alpha"));
    },
};

} // namespace hybrimoe
