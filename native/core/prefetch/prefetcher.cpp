#include "prefetcher.h"

#include "../top_scores.h"

#include <algorithm>

namespace hybrimoe {

#define HYBRIMOE_POLICY(name) extern const policy_entry<prefetcher> name##_prefetch;
#include "policies.def"
#undef HYBRIMOE_POLICY

const policy_table<prefetcher> & prefetchers() {
    static const policy_entry<prefetcher> * const entries[] = {
#define HYBRIMOE_POLICY(name) &name##_prefetch,
#include "policies.def"
#undef HYBRIMOE_POLICY
    };
    static const policy_table<prefetcher> table = {"prefetcher", entries, sizeof(entries) / sizeof(entries[0])};
    return table;
}

void proposal_list::add(const proposal & p) {
    if (n_items < capacity) {
        items[n_items++] = p;
    }
}

void proposal_list::add_keep(int key) {
    if (n_keep < capacity) {
        keep[n_keep++] = key;
    }
}

void proposal_list::sort() {
    std::sort(items, items + n_items, [](const proposal & a, const proposal & b) {
        if (a.gain_us != b.gain_us) {
            return a.gain_us > b.gain_us;
        }
        if (a.confidence != b.confidence) {
            return a.confidence > b.confidence;
        }
        return a.layer != b.layer ? a.layer < b.layer : a.expert < b.expert;
    });
}

double saving_us(const cost_model & costs, int layer, int device) {
    return std::max(0.0, costs.t_cpu(layer, 1, false) - costs.t_gpu(layer, device, 1));
}

bool prefetcher::predict(const prefetch_view & view, int distance, float * scores) const {
    if (distance > max_lookahead || !view.lookahead[distance - 1]) {
        return false;
    }
    const float * from = view.lookahead[distance - 1];
    std::copy(from, from + view.shape->n_expert, scores);
    return true;
}

void prefetcher::propose(const prefetch_view & view, proposal_list & out) const {
    float scores[max_experts];
    int order[max_experts];
    const int n_expert = view.shape->n_expert;
    const int n_best   = std::min(n_expert, n_candidates(view));
    for (int distance = 1; distance <= view.horizon; ++distance) {
        const int layer = view.step->layer + distance;
        if (layer >= view.shape->n_layers || n_best <= 0) {
            break;
        }
        const int device = view.device_of_layer[layer];
        if (device == cpu_device || !predict(view, distance, scores)) {
            continue;
        }
        const double saved = saving_us(*view.costs, layer, device);
        top_scores(scores, n_expert, n_best, order);
        for (int k = 0; k < n_best; ++k) {
            const int e        = order[k];
            const double score = static_cast<double>(scores[e]);
            if (view.cache->lookup(layer, e).state != slot_state::absent) {
                out.add_keep(view.shape->key(layer, e));
            } else if (score * saved > 0.0) {
                out.add({layer, e, score * saved, score});
            }
        }
    }
    out.sort();
}

} // namespace hybrimoe
