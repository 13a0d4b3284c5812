#include "admission_policy.h"

#include <algorithm>
#include <vector>

namespace hybrimoe {
namespace {

// Admits when expected uses before eviction x (t_cpu - t_gpu) > t_copy. Expected uses = the expert's rate of use (EMA)
// x the steps that an expert of its layer stays (EMA over past evictions, one step at least).
class pays final : public admission_policy {
public:
    pays(const model_shape & shape, double alpha, double stay) : shape_(shape), alpha_(alpha), first_stay_(stay) {
        reset();
    }

    void set_costs(const cost_model * costs) override { costs_ = costs; }
    void reset() override {
        rate_.assign(static_cast<size_t>(shape_.n_keys()), 0.0);
        admitted_.assign(static_cast<size_t>(shape_.n_keys()), 0);
        n_steps_.assign(static_cast<size_t>(shape_.n_layers), 0);
        stay_.assign(static_cast<size_t>(shape_.n_layers), first_stay_);
    }
    void on_step(const router_step & step) override {
        ++n_steps_[static_cast<size_t>(step.layer)];
        double * row = rate_.data() + shape_.key(step.layer, 0);
        for (int e = 0; e < shape_.n_expert; ++e) {
            row[e] *= 1.0 - alpha_;
        }
        for (int i = 0; i < step.n_experts; ++i) {
            row[step.experts[i]] += alpha_;
        }
    }
    void on_admit(int key) override { admitted_[static_cast<size_t>(key)] = n_steps_[layer(key)]; }
    void on_evict(int key) override {
        const double stayed = static_cast<double>(n_steps_[layer(key)] - admitted_[static_cast<size_t>(key)]);
        double & stay       = stay_[layer(key)];
        stay                = std::max(1.0, (1.0 - alpha_) * stay + alpha_ * stayed);
    }
    bool wants(int key) const override {
        if (!costs_ || costs_->n_devices() == 0) {
            return true; // nothing to weigh
        }
        const int l         = static_cast<int>(layer(key));
        const double n_uses = rate_[static_cast<size_t>(key)] * stay_[layer(key)];
        double t_gpu        = costs_->t_gpu(l, 0, 1);
        double t_copy       = costs_->t_copy(0, costs_->of_layer(l).bytes);
        for (int d = 1; d < costs_->n_devices(); ++d) {
            t_gpu  = std::min(t_gpu, costs_->t_gpu(l, d, 1));
            t_copy = std::min(t_copy, costs_->t_copy(d, costs_->of_layer(l).bytes));
        }
        return n_uses * (costs_->t_cpu(l, 1, false) - t_gpu) > t_copy;
    }

private:
    size_t layer(int key) const { return static_cast<size_t>(shape_.layer_of(key)); }

    model_shape shape_;
    double alpha_;
    double first_stay_;
    const cost_model * costs_ = nullptr;
    std::vector<double> rate_, stay_;
    std::vector<int64_t> admitted_, n_steps_;
};

const param_info params[] = {
    {"alpha", 0.1, 1e-6, 1.0, false,
     "weight of the newest step in the rate of use, and of the newest eviction in the stay"},
    {"stay", 32, 1, 1e9, false, "steps that an expert is expected to stay before any was evicted"},
};

} // namespace

extern const policy_entry<admission_policy> pays_admission;
const policy_entry<admission_policy> pays_admission = {
    "pays",
    "An expert is admitted if its expected uses save more time than its copy takes.",
    "this project",
    {false, false, true},
    params,
    2,
    [](const model_shape & shape, const param_values & p) -> std::unique_ptr<admission_policy> {
        return std::make_unique<pays>(shape, p.get("alpha"), p.get("stay"));
    },
};

} // namespace hybrimoe
