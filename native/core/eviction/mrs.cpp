#include "../top_scores.h"
#include "eviction_policy.h"

#include <algorithm>
#include <vector>

namespace hybrimoe {
namespace {

// S <- alpha * TopP(s) + (1 - alpha) * S for every token of the step, in order; TopP keeps the p largest router scores
// and zeroes the rest. Where a trace holds the weights of the chosen experts only, those are all that TopP sees.
class mrs final : public eviction_policy {
public:
    mrs(const model_shape & shape, double alpha, double p_factor) : shape_(shape), alpha_(alpha) {
        n_kept_ = std::min(shape.n_expert, std::max(1, static_cast<int>(p_factor * shape.top_k)));
        value_.assign(static_cast<size_t>(shape.n_keys()), 0.0);
        order_.resize(static_cast<size_t>(shape.n_expert));
    }

    void reset() override { std::fill(value_.begin(), value_.end(), 0.0); }

    status check(const router_step & step) const override {
        if (!step.scores && !step.weights) {
            return status::fail(error_code::missing_scores,
                                "mrs needs router scores (or at least the chosen experts' weights); layer %d has none",
                                step.layer);
        }
        return {};
    }

    void on_step(const router_step & step) override {
        double * row = value_.data() + shape_.key(step.layer, 0);
        for (int t = 0; t < step.n_rows; ++t) {
            for (int e = 0; e < shape_.n_expert; ++e) {
                row[e] *= 1.0 - alpha_;
            }
            if (step.scores) {
                add_top(step.scores + static_cast<size_t>(t) * static_cast<size_t>(shape_.n_expert), row);
                continue;
            }
            for (int k = 0; k < step.top_k; ++k) {
                const size_t at = static_cast<size_t>(t) * static_cast<size_t>(step.top_k) + static_cast<size_t>(k);
                row[step.ids[at]] += alpha_ * static_cast<double>(step.weights[at]);
            }
        }
    }

    double keep_value(int key) const override { return value_[static_cast<size_t>(key)]; }

private:
    void add_top(const float * scores, double * row) {
        top_scores(scores, shape_.n_expert, n_kept_, order_.data());
        for (int k = 0; k < n_kept_; ++k) {
            const int e = order_[static_cast<size_t>(k)];
            row[e] += alpha_ * static_cast<double>(scores[e]);
        }
    }

    model_shape shape_;
    double alpha_;
    int n_kept_;
    std::vector<double> value_;
    std::vector<int> order_;
};

const param_info params[] = {
    {"alpha", 0.5, 1e-6, 1.0, false, "weight of the newest token (0.5 in the released code)"},
    {"p_factor", 2.0, 0.01, 1024, false, "scores kept per token, as a multiple of top-k"},
};

} // namespace

extern const policy_entry<eviction_policy> mrs_eviction;
const policy_entry<eviction_policy> mrs_eviction = {
    "mrs",
    "Evicts the lowest moving average of the router's largest scores (minus recent score).",
    "HybriMoE sec. IV-D",
    {true, false, false},
    params,
    2,
    [](const model_shape & shape, const param_values & p) -> std::unique_ptr<eviction_policy> {
        return std::make_unique<mrs>(shape, p.get("alpha"), p.get("p_factor"));
    },
};

} // namespace hybrimoe
