#include "prefetcher.h"

#include <algorithm>

namespace hybrimoe {
namespace {

// How often expert b of layer l + d followed expert a of layer l, for d = 1 and 2. A layer is predicted from the ids of
// the two before it; nothing but ids is needed.
class path final : public prefetcher {
public:
    path(const model_shape & shape, int horizon, bool adaptive, double second, double n_candidates)
        : prefetcher(horizon, adaptive), shape_(shape), second_(second), n_candidates_(n_candidates) {
        reset();
    }

    int max_horizon() const override { return 2; }
    int n_candidates(const prefetch_view & view) const override {
        return static_cast<int>(n_candidates_ * view.shape->top_k);
    }

    void reset() override {
        const auto n_pairs = static_cast<size_t>(shape_.n_keys()) * static_cast<size_t>(shape_.n_expert);
        for (int d = 0; d < 2; ++d) {
            count_[d].assign(n_pairs, 0);
            total_[d].assign(static_cast<size_t>(shape_.n_keys()), 0);
            before_[d].layer = -1;
        }
    }
    void on_prompt() override { before_[0].layer = before_[1].layer = -1; }

    void observe(const router_step & step) override {
        for (int d = 1; d <= 2; ++d) {
            const row & from = before_[d - 1];
            if (from.layer >= 0 && from.layer == step.layer - d && from.n_rows == step.n_rows &&
                from.top_k == step.top_k) {
                learn(d - 1, from, step);
            }
        }
        std::swap(before_[0], before_[1]);
        row & now  = before_[0];
        now.layer  = step.layer;
        now.n_rows = step.n_rows;
        now.top_k  = step.top_k;
        now.ids.assign(step.ids, step.ids + static_cast<size_t>(step.n_rows) * static_cast<size_t>(step.top_k));
    }

    // `observe` of the current layer must have come first: before_[0] is then the current layer.
    bool predict(const prefetch_view & view, int distance, float * scores) const override {
        std::fill(scores, scores + shape_.n_expert, 0.0F);
        const row & now = before_[0];
        if (distance > 2 || now.layer != view.step->layer) {
            return false;
        }
        add(distance - 1, now, 1.0F, scores);
        if (distance == 1 && now.layer > 0 && before_[1].layer == now.layer - 1) { // -1: none since the prompt began
            add(1, before_[1], static_cast<float>(second_), scores);
        }
        return true;
    }

private:
    struct row {
        int layer = -1, n_rows = 0, top_k = 0;
        std::vector<int32_t> ids; // [n_rows, top_k]
    };
    static constexpr uint16_t most = 60000;

    void learn(int table, const row & from, const router_step & step) {
        for (int t = 0; t < step.n_rows; ++t) {
            for (int i = 0; i < step.top_k; ++i) {
                const auto a =
                    static_cast<size_t>(shape_.key(from.layer, from.ids[static_cast<size_t>(t * step.top_k + i)]));
                uint16_t * counts = count_[table].data() + a * static_cast<size_t>(shape_.n_expert);
                if (total_[table][a] >= most) { // ages the whole row
                    total_[table][a] /= 2;
                    for (int e = 0; e < shape_.n_expert; ++e) {
                        counts[e] /= 2;
                    }
                }
                ++total_[table][a];
                for (int k = 0; k < step.top_k; ++k) {
                    ++counts[step.ids[t * step.top_k + k]];
                }
            }
        }
    }

    void add(int table, const row & from, float weight, float * scores) const {
        const size_t n = static_cast<size_t>(from.n_rows) * static_cast<size_t>(from.top_k);
        for (size_t i = 0; i < n; ++i) {
            const auto a = static_cast<size_t>(shape_.key(from.layer, from.ids[i]));
            if (total_[table][a] == 0) {
                continue;
            }
            const uint16_t * counts = count_[table].data() + a * static_cast<size_t>(shape_.n_expert);
            const float share       = weight / (static_cast<float>(total_[table][a]) * static_cast<float>(from.top_k));
            for (int e = 0; e < shape_.n_expert; ++e) {
                scores[e] += share * static_cast<float>(counts[e]);
            }
        }
    }

    model_shape shape_;
    double second_;
    double n_candidates_;
    std::vector<uint16_t> count_[2]; // [n_layers, n_expert, n_expert]
    std::vector<uint16_t> total_[2]; // [n_layers, n_expert]
    row before_[2];
};

const param_info params[] = {
    {"horizon", 1, 1, 2, true, "layers ahead"},
    {"adaptive", 0, 0, 1, true, "1: the horizon adapts to stalls and over-fetch (ExpertFlow)"},
    {"second", 0.5, 0.0, 10.0, false, "weight of the layer before the last"},
    {"n_candidates", 2.0, 0.01, 1024, false, "candidates per layer, as a multiple of top-k"},
};

} // namespace

extern const policy_entry<prefetcher> path_prefetch;
const policy_entry<prefetcher> path_prefetch = {
    "path",
    "A table of which experts follow the ids of the previous two layers.",
    "EdgeMoE, arXiv 2308.14352",
    {false, false, true},
    params,
    4,
    [](const model_shape & shape, const param_values & p) -> std::unique_ptr<prefetcher> {
        return std::make_unique<path>(shape, p.get_int("horizon"), p.get("adaptive") != 0.0, p.get("second"),
                                      p.get("n_candidates"));
    },
};

} // namespace hybrimoe
