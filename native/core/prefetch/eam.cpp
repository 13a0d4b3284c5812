#include "../eam_library.h"
#include "prefetcher.h"

namespace hybrimoe {
namespace {

class eam_prefetcher final : public prefetcher {
public:
    eam_prefetcher(const model_shape & shape, int horizon, bool adaptive, int capacity, int n_nearest)
        : prefetcher(horizon, adaptive), shape_(shape), library_(shape, capacity, n_nearest) {}

    int max_horizon() const override { return shape_.n_layers; }

    void reset() override { library_.reset(); }
    void on_prompt() override { library_.on_prompt(); }
    void observe(const router_step & step) override { library_.observe(step); }

    // p[l'][e] x (1 - (l' - l) / L): a nearer layer is more urgent.
    bool predict(const prefetch_view & view, int distance, float * scores) const override {
        const int layer     = view.step->layer + distance;
        const double urgent = 1.0 - static_cast<double>(distance) / static_cast<double>(shape_.n_layers);
        for (int e = 0; e < shape_.n_expert; ++e) {
            scores[e] = static_cast<float>(library_.predicted(shape_.key(layer, e)) * urgent);
        }
        return true;
    }

private:
    model_shape shape_;
    eam_library library_;
};

const param_info params[] = {
    {"horizon", 3, 1, max_layers, true, "layers ahead"},
    {"adaptive", 0, 0, 1, true, "1: the horizon adapts to stalls and over-fetch (ExpertFlow)"},
    {"n_matrices", 120, 1, 4096, true, "past requests kept"},
    {"n_nearest", 3, 1, 64, true, "past requests summed for a prediction"},
};

} // namespace

extern const policy_entry<prefetcher> eam_prefetch;
const policy_entry<prefetcher> eam_prefetch = {
    "eam",
    "What the most similar past requests used, nearer layers first.",
    "MoE-Infinity, arXiv 2401.14361",
    {false, false, true},
    params,
    4,
    [](const model_shape & shape, const param_values & p) -> std::unique_ptr<prefetcher> {
        return std::make_unique<eam_prefetcher>(shape, p.get_int("horizon"), p.get("adaptive") != 0.0,
                                                p.get_int("n_matrices"), p.get_int("n_nearest"));
    },
};

} // namespace hybrimoe
