#include "../eam_library.h"
#include "eviction_policy.h"

#include <vector>

namespace hybrimoe {
namespace {

// Evicts the smallest (p[l][e] + eps) * (1 - l/L). The layer factor matters in one pool over all layers only: layers
// that come early in the next token are worth more.
class eam final : public eviction_policy {
public:
    eam(const model_shape & shape, int capacity, int n_nearest, double eps)
        : shape_(shape), library_(shape, capacity, n_nearest), eps_(eps) {
        for (int layer = 0; layer < shape.n_layers; ++layer) {
            worth_of_layer_.push_back(1.0 - static_cast<double>(layer) / static_cast<double>(shape.n_layers));
        }
    }

    void reset() override { library_.reset(); }
    void on_prompt() override { library_.on_prompt(); }
    void on_step(const router_step & step) override { library_.observe(step); }

    double keep_value(int key) const override {
        return (library_.predicted(key) + eps_) * worth_of_layer_[static_cast<size_t>(shape_.layer_of(key))];
    }

private:
    model_shape shape_;
    eam_library library_;
    double eps_;
    std::vector<double> worth_of_layer_;
};

const param_info params[] = {
    {"n_matrices", 120, 1, 4096, true, "past requests kept"},
    {"n_nearest", 3, 1, 64, true, "past requests summed for a prediction"},
    {"eps", 1e-3, 0, 1, false, "worth of an expert that was never seen"},
};

} // namespace

extern const policy_entry<eviction_policy> eam_eviction;
const policy_entry<eviction_policy> eam_eviction = {
    "eam",
    "Evicts by the activation matrices of the most similar past requests.",
    "MoE-Infinity, arXiv 2401.14361",
    {},
    params,
    3,
    [](const model_shape & shape, const param_values & p) -> std::unique_ptr<eviction_policy> {
        return std::make_unique<eam>(shape, p.get_int("n_matrices"), p.get_int("n_nearest"), p.get("eps"));
    },
};

} // namespace hybrimoe
