#include "prefetcher.h"

#include <algorithm>
#include <cmath>

namespace hybrimoe {
namespace {

// Candidates are the experts whose look-ahead score lies above a percentile of their layer's scores; at most
// floor(t_layer / t_copy) of them, the copies that fit in one layer's time.
class fate final : public prefetcher {
public:
    fate(int horizon, bool adaptive, double percentile) : prefetcher(horizon, adaptive), percentile_(percentile) {}

    int n_candidates(const prefetch_view & view) const override {
        const int n_above = static_cast<int>(std::floor((1.0 - percentile_) * view.shape->n_expert));
        return std::max(1, n_above);
    }

    void propose(const prefetch_view & view, proposal_list & out) const override {
        prefetcher::propose(view, out);
        if (view.layer_us <= 0.0) {
            return; // nothing measured yet: the runtime's idle window is the only bound
        }
        int n_kept[max_layers] = {};
        int n_out              = 0;
        for (int i = 0; i < out.n_items; ++i) { // best first, so the budget keeps the best of each layer
            const int layer     = out.items[i].layer;
            const double t_copy = view.costs->t_copy(view.device_of_layer[layer], view.costs->of_layer(layer).bytes);
            if (n_kept[layer] < std::floor(view.layer_us / t_copy)) {
                ++n_kept[layer];
                out.items[n_out++] = out.items[i];
            }
        }
        out.n_items = n_out;
    }

private:
    double percentile_;
};

const param_info params[] = {
    {"horizon", 1, 1, max_lookahead, true, "layers ahead"},
    {"adaptive", 0, 0, 1, true, "1: the horizon adapts to stalls and over-fetch (ExpertFlow)"},
    {"percentile", 0.75, 0.0, 0.999, false, "share of a layer's experts whose score a candidate must exceed"},
};

} // namespace

extern const policy_entry<prefetcher> fate_prefetch;
const policy_entry<prefetcher> fate_prefetch = {
    "fate",
    "Look-ahead scores above a percentile, as many as fit in one layer's measured time.",
    "Fate, arXiv 2502.12224",
    {true, false, true},
    params,
    3,
    [](const model_shape &, const param_values & p) -> std::unique_ptr<prefetcher> {
        return std::make_unique<fate>(p.get_int("horizon"), p.get("adaptive") != 0.0, p.get("percentile"));
    },
};

} // namespace hybrimoe
