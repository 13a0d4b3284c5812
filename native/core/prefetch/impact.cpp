#include "prefetcher.h"

#include "../top_scores.h"

#include <algorithm>
#include <cmath>

namespace hybrimoe {
namespace {

// For each predicted, absent expert of the coming layers: re-plan that layer with the expert cached; gain = fall of the
// planned layer time (HybriMoE sec. IV-C).
class impact final : public prefetcher {
public:
    impact(int horizon, bool adaptive, double discount) : prefetcher(horizon, adaptive), discount_(discount) {}

    void propose(const prefetch_view & view, proposal_list & out) const override {
        double weight = 1.0;
        for (int distance = 1; distance <= view.horizon; ++distance, weight *= discount_) {
            const int layer = view.step->layer + distance;
            if (layer >= view.shape->n_layers) {
                break;
            }
            if (view.device_of_layer[layer] != cpu_device) {
                propose_layer(view, distance, layer, weight, out);
            }
        }
        out.sort();
    }

private:
    void propose_layer(const prefetch_view & view, int distance, int layer, double weight, proposal_list & out) const {
        float scores[max_experts];
        work_item items[max_experts];
        if (!predict(view, distance, scores)) {
            return;
        }
        const int n_items = predicted_layer(view, layer, scores, items);
        layer_problem problem;
        problem.costs   = view.costs;
        problem.layer   = layer;
        problem.items   = items;
        problem.n_items = n_items;
        double base_us  = 0.0;
        if (n_items == 0 || !predict_makespan(*view.policy, problem, base_us).ok()) {
            return;
        }
        for (int i = 0; i < n_items; ++i) {
            if (items[i].device != cpu_device) {
                out.add_keep(view.shape->key(layer, items[i].expert));
                continue;
            }
            double cached_us  = base_us;
            items[i].device   = view.device_of_layer[layer];
            const status s    = predict_makespan(*view.policy, problem, cached_us);
            items[i].device   = cpu_device;
            const double gain = weight * (base_us - cached_us);
            if (s.ok() && gain > 0.0) {
                out.add({layer, items[i].expert, gain, static_cast<double>(scores[items[i].expert])});
            }
        }
    }

    // The experts that the layer is expected to use: top-k for one token; for a batch those whose expected load is at
    // least half a token.
    static int predicted_layer(const prefetch_view & view, int layer, const float * scores, work_item * items) {
        int order[max_experts];
        const int n_expert = view.shape->n_expert;
        const int n_rows   = view.step->n_rows;
        double total       = 0.0;
        for (int e = 0; e < n_expert; ++e) {
            total += static_cast<double>(scores[e]);
        }
        const int n_most = n_rows == 1 ? view.shape->top_k : n_expert;
        top_scores(scores, n_expert, n_most, order);
        int n_items = 0;
        for (int k = 0; k < n_most; ++k) {
            const int e       = order[k];
            const double load = total > 0.0 ? static_cast<double>(scores[e]) / total * n_rows * view.shape->top_k : 0.0;
            if (n_rows > 1 && k >= view.shape->top_k && load < 0.5) {
                break;
            }
            const residency at = view.cache->lookup(layer, e);
            work_item & w      = items[n_items++];
            w                  = work_item();
            w.expert           = e;
            w.n_tokens         = n_rows == 1 ? 1 : std::max(1, static_cast<int>(std::lround(load)));
            w.device           = at.device; // what is loading now will be there by then
        }
        return n_items;
    }

    double discount_;
};

const param_info params[] = {
    {"horizon", 3, 1, max_lookahead, true, "layers ahead"},
    {"adaptive", 0, 0, 1, true, "1: the horizon adapts to stalls and over-fetch (ExpertFlow)"},
    {"discount", 1.0, 0.0, 1.0, false, "factor on the gain per further layer; 1 is the paper's rule"},
};

} // namespace

extern const policy_entry<prefetcher> impact_prefetch;
const policy_entry<prefetcher> impact_prefetch = {
    "impact",
    "The predicted experts whose presence shortens the re-planned layer most, up to three layers ahead.",
    "HybriMoE sec. IV-C",
    {true, false, true},
    params,
    3,
    [](const model_shape &, const param_values & p) -> std::unique_ptr<prefetcher> {
        return std::make_unique<impact>(p.get_int("horizon"), p.get("adaptive") != 0.0, p.get("discount"));
    },
};

} // namespace hybrimoe
