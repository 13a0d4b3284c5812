// hybrid_dispatch: the placement of the setting "reproducible". Whole layers stand on accelerators from set-up to the
// end, as plain llama.cpp would place them, so that which device computes an expert never depends on anything that
// happens while the model runs. Whole layers rather than some experts of each: then one device computes all of a
// token's sum in a layer, and only layers that are on an accelerator pay for launching and waiting.
#include "hybrid/hybrid_dispatch.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace hybrimoe {

namespace {

constexpr double rounding = 1e-9; // a share of the layers' bytes must hold that share of the layers

} // namespace

// The first layers that may be taken, as many as the budget holds.
std::vector<int> hybrid_dispatch::whole_layers(double budget, const std::vector<bool> & may_take) const {
    std::vector<int> slots(static_cast<size_t>(book_.n_layers()), 0);
    for (int layer = 0; layer < book_.n_layers(); layer++) {
        const expert_layout & layout = book_.layer(layer).layout;
        const double bytes           = static_cast<double>(layout.expert_bytes()) * layout.n_expert;
        if (may_take[static_cast<size_t>(layer)] && bytes <= budget * (1.0 + rounding)) {
            slots[static_cast<size_t>(layer)] = layout.n_expert;
            budget -= bytes;
        }
    }
    return slots;
}

// [device][layer]. `free` decides for the size "auto" alone: any other size is shared out by what the devices have.
std::vector<std::vector<int>> hybrid_dispatch::fixed_slots(const std::vector<double> & free) const {
    const expert_cache_size & size = config_.expert_cache;
    std::vector<double> total;
    for (const auto & device : devices_) {
        total.push_back(static_cast<double>(device->port.total_bytes()));
    }
    const double all = std::accumulate(total.begin(), total.end(), 0.0);
    std::vector<bool> is_taken(static_cast<size_t>(book_.n_layers()), false);
    std::vector<std::vector<int>> slots;
    for (size_t d = 0; d < devices_.size(); d++) {
        const double share = all > 0.0 ? total[d] / all : 1.0 / static_cast<double>(devices_.size());
        std::vector<bool> may_take(static_cast<size_t>(book_.n_layers()), false);
        double budget = 0.0;
        for (int layer = 0; layer < book_.n_layers(); layer++) {
            const expert_layout & layout = book_.layer(layer).layout;
            if (!may_cache(*devices_[d], layer)) {
                continue;
            }
            may_take[static_cast<size_t>(layer)] = !is_taken[static_cast<size_t>(layer)];
            const double n = size.is == expert_cache_size::kind::slots ? static_cast<double>(size.n_slots)
                                                                       : size.fraction * layout.n_expert;
            budget += share * std::min<double>(n, layout.n_expert) * static_cast<double>(layout.expert_bytes());
        }
        if (size.is == expert_cache_size::kind::automatic) {
            budget = free[d] - static_cast<double>(config_.fit_margin_bytes);
        } else if (size.is == expert_cache_size::kind::bytes) {
            budget = share * size.n_bytes;
        }
        slots.push_back(whole_layers(budget, may_take));
        for (size_t layer = 0; layer < is_taken.size(); layer++) {
            is_taken[layer] = is_taken[layer] || slots.back()[layer] > 0;
        }
    }
    return slots;
}

// After the caches are filled.
void hybrid_dispatch::check_fixed_placement() {
    if (std::find(is_suspended_.begin(), is_suspended_.end(), true) != is_suspended_.end()) {
        not_reproducible("an accelerator does not finish its copies");
    }
    for (int layer = 0; layer < book_.n_layers(); layer++) {
        const int32_t n_expert = book_.layer(layer).layout.n_expert;
        int n_resident         = 0;
        for (int32_t e = 0; e < n_expert; e++) {
            n_resident += runtime_->cache().lookup(layer, e).state == slot_state::resident ? 1 : 0;
        }
        if (n_resident != 0 && n_resident != n_expert) {
            not_reproducible("a copy failed");
        }
    }
}

double hybrid_dispatch::whole_layer_bytes() const {
    double bytes = 0.0;
    for (int layer = 0; layer < book_.n_layers(); layer++) {
        const expert_layout & layout = book_.layer(layer).layout;
        for (const auto & device : devices_) {
            bytes += static_cast<double>(layout.expert_bytes()) * device->slots[static_cast<size_t>(layer)].n_slots();
        }
    }
    return bytes;
}

void hybrid_dispatch::announce_fixed_placement() const {
    for (const auto & device : devices_) {
        int n_layers = 0;
        int n_slots  = 0;
        for (const slot_set & set : device->slots) {
            n_layers += set.n_slots() > 0 ? 1 : 0;
            n_slots += set.n_slots();
        }
        log_.add("reproducible: %s holds the experts of %d of %d layers (%d slots), nothing is copied while the model "
                 "runs",
                 device->port.name().c_str(), n_layers, book_.n_layers(), n_slots);
    }
    if (config_.expert_cache.is == expert_cache_size::kind::automatic) {
        constexpr double mib = 1 << 20;
        log_.add("reproducible: that followed from the memory that is free now; the same again: --expert-cache %.0fMiB",
                 std::ceil(whole_layer_bytes() / mib));
    }
}

// Said once; the state keeps it.
void hybrid_dispatch::not_reproducible(const char * why) {
    if (config_.reproducible && is_reproducible_) {
        is_reproducible_ = false;
        log_.add("not reproducible from here on: %s", why);
    }
}

} // namespace hybrimoe
