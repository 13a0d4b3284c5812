#include "eviction_policy.h"

#include <algorithm>
#include <vector>

namespace hybrimoe {
namespace {

class lfu final : public eviction_policy {
public:
    lfu(const model_shape & shape, bool fresh) : shape_(shape), fresh_(fresh) {
        n_uses_.assign(static_cast<size_t>(shape.n_keys()), 0);
    }

    void reset() override { std::fill(n_uses_.begin(), n_uses_.end(), 0); }
    void on_prompt() override {
        if (fresh_) {
            reset();
        }
    }
    void on_step(const router_step & step) override {
        for (int i = 0; i < step.n_experts; ++i) {
            n_uses_[static_cast<size_t>(shape_.key(step.layer, step.experts[i]))] += step.n_tokens[i];
        }
    }
    double keep_value(int key) const override { return static_cast<double>(n_uses_[static_cast<size_t>(key)]); }

private:
    model_shape shape_;
    bool fresh_;
    std::vector<int64_t> n_uses_;
};

const param_info params[] = {
    {"fresh", 0, 0, 1, true, "1: counts start anew with every prompt; skew lives within a request"},
};

} // namespace

extern const policy_entry<eviction_policy> lfu_eviction;
const policy_entry<eviction_policy> lfu_eviction = {
    "lfu",
    "Evicts the least used expert, counting every token since the start.",
    "Lin, He, Chen, arXiv 2511.05814",
    {},
    params,
    1,
    [](const model_shape & shape, const param_values & p) -> std::unique_ptr<eviction_policy> {
        return std::make_unique<lfu>(shape, p.get("fresh") != 0.0);
    },
};

} // namespace hybrimoe
