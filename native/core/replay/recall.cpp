#include "recall.h"

#include "../top_scores.h"

#include <algorithm>

namespace hybrimoe {

status replay_recall(const replay_trace & t, prefetcher & policy, int distance, int64_t n_warm_tokens,
                     const int32_t * n_best, int n, double * recall) {
    HYBRIMOE_TRY(check_trace(t));
    const model_shape & s = t.shape;
    if (distance < 1 || distance >= s.n_layers) {
        return status::fail(error_code::invalid_argument, "distance = %d is outside 1..%d", distance, s.n_layers - 1);
    }
    for (int i = 0; i < n; ++i) {
        if (n_best[i] < 1 || n_best[i] > s.n_expert) {
            return status::fail(error_code::invalid_argument, "n_best = %d is outside 1..%d", n_best[i], s.n_expert);
        }
    }
    std::vector<int32_t> ones(static_cast<size_t>(s.top_k), 1);
    std::vector<float> scores(static_cast<size_t>(s.n_expert));
    std::vector<int> order(static_cast<size_t>(s.n_expert));
    std::vector<int64_t> found(static_cast<size_t>(n), 0);
    int64_t n_asked = 0;
    int64_t prompt  = 1;
    for (int64_t token = 0; token < t.n_tokens; ++token) {
        while (prompt < t.n_prompts && t.prompt_offsets[prompt] <= token) {
            policy.on_prompt();
            ++prompt;
        }
        for (int layer = 0; layer < s.n_layers; ++layer) {
            const auto ids_of = [&](int l) {
                return t.experts +
                       (static_cast<size_t>(token) * static_cast<size_t>(s.n_layers) + static_cast<size_t>(l)) *
                           static_cast<size_t>(s.top_k);
            };
            if (ids_of(layer)[0] < 0) {
                continue;
            }
            router_step step;
            step.layer     = layer;
            step.experts   = ids_of(layer);
            step.n_tokens  = ones.data();
            step.n_experts = s.top_k;
            step.n_rows    = 1;
            step.top_k     = s.top_k;
            step.ids       = step.experts;
            policy.observe(step);
            if (token < n_warm_tokens || layer + distance >= s.n_layers || ids_of(layer + distance)[0] < 0) {
                continue;
            }
            prefetch_view view;
            view.shape = &s;
            view.step  = &step;
            if (!policy.predict(view, distance, scores.data())) {
                return status::fail(error_code::missing_scores,
                                    "this prefetcher has no prediction at distance %d from ids alone", distance);
            }
            top_scores(scores.data(), s.n_expert, s.n_expert, order.data());
            n_asked += s.top_k;
            for (int k = 0; k < s.top_k; ++k) {
                const auto rank = std::find(order.begin(), order.end(), ids_of(layer + distance)[k]) - order.begin();
                for (int i = 0; i < n; ++i) {
                    found[static_cast<size_t>(i)] += rank < n_best[i];
                }
            }
        }
    }
    for (int i = 0; i < n; ++i) {
        recall[i] = n_asked ? static_cast<double>(found[static_cast<size_t>(i)]) / static_cast<double>(n_asked) : 0.0;
    }
    return {};
}

} // namespace hybrimoe
