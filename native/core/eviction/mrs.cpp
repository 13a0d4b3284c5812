#include "eviction_policy.h"

#include <algorithm>
#include <cstring>
#include <utility>
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
        rank_.resize(static_cast<size_t>(shape.n_expert));
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
    const double * values() const override { return value_.data(); }

private:
    // Ties at the p-th place go to the lower expert.
    void add_top(const float * scores, double * row) {
        for (size_t e = 0; e < rank_.size(); ++e) {
            rank_[e] = rank(scores[e]);
        }
        const auto [least, n_above] = bound();
        for (size_t e = 0; e < rank_.size(); ++e) {
            row[e] += rank_[e] > least ? alpha_ * static_cast<double>(scores[e]) : 0.0;
        }
        int n_left = n_kept_ - n_above;
        for (size_t e = 0; n_left > 0 && e < rank_.size(); ++e) {
            if (rank_[e] == least) {
                row[e] += alpha_ * static_cast<double>(scores[e]);
                --n_left;
            }
        }
    }

    // An integer in the order of the scores; a NaN, which has no place in it, ranks last.
    static int32_t rank(float score) {
        int32_t bits;
        std::memcpy(&bits, &score, sizeof(bits));
        return score == score ? bits ^ ((bits >> 31) & INT32_MAX) : INT32_MIN;
    }

    // A rank with n_kept or fewer scores above it, and that number; if it is fewer, the rest is at the rank itself.
    // Found by bisection: counting is one pass without branches, and about ten of them separate the scores of a real
    // router.
    std::pair<int32_t, int> bound() const {
        int64_t below = INT32_MIN - int64_t{1}, reached = INT32_MAX;
        int n_above = 0;
        while (reached - below > 1) {
            const auto middle = static_cast<int32_t>((below + reached) >> 1);
            int n             = 0;
            for (const int32_t r : rank_) {
                n += r > middle;
            }
            if (n == n_kept_) {
                return {middle, n};
            }
            if (n > n_kept_) {
                below = middle;
            } else {
                reached = middle;
                n_above = n;
            }
        }
        return {static_cast<int32_t>(reached), n_above};
    }

    model_shape shape_;
    double alpha_;
    int n_kept_;
    std::vector<double> value_;
    std::vector<int32_t> rank_; // of one token's scores
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
