// hybrid_dispatch: caches of another size, when memory becomes scarce or the guard wants whole layers.
#include "hybrid/hybrid_dispatch.h"

#include <algorithm>
#include <cmath>

namespace hybrimoe {

namespace {

double gib(double bytes) {
    return bytes / (1 << 30);
}

} // namespace

bool hybrid_dispatch::drain(double timeout_us) {
    bool idle = true;
    for (auto & device : devices_) {
        idle = device->worker.wait_idle(timeout_us) && idle;
    }
    take_results();
    return idle;
}

void hybrid_dispatch::relayout(int device, const std::vector<int> & slots) {
    if (!drain(drain_timeout_us)) {
        return;
    }
    accelerator & on = *devices_[static_cast<size_t>(device)];
    on.compute.synchronize();
    on.compute.forget_graphs();
    std::vector<int> changed;
    std::vector<slot_move> moves;
    for (int layer = 0; layer < book_.n_layers(); layer++) {
        const int n = slots[static_cast<size_t>(layer)];
        if (n != on.slots[static_cast<size_t>(layer)].n_slots() && runtime_->resize(layer, device, n, moves).ok()) {
            note(trace_kind::resize, layer, device, n);
            changed.push_back(layer);
            on.slots[static_cast<size_t>(layer)].release(); // all first: there may be no room for both
        }
    }
    for (const int layer : changed) {
        slot_set & set = on.slots[static_cast<size_t>(layer)];
        int n          = slots[static_cast<size_t>(layer)];
        while (n > 0 && !set.allocate(on.port, book_.layer(layer).layout, n)) {
            n /= 2;
        }
        if (n != slots[static_cast<size_t>(layer)] && runtime_->resize(layer, device, n, moves).ok()) {
            note(trace_kind::resize, layer, device, n);
        }
        for (int32_t e = 0; e < book_.layer(layer).layout.n_expert; e++) {
            const hybrimoe::residency at = runtime_->cache().lookup(layer, e);
            if (at.device == device && at.slot >= 0 && at.state != slot_state::loading) {
                copy_now(device, layer, e, at.slot, false);
            }
        }
    }
    settle_fills();
}

// Loads missing experts of layers that have room for more: whole layers of the static placement.
void hybrid_dispatch::fill_layers(int device) {
    for (int layer = 0; layer < book_.n_layers(); layer++) {
        for (int32_t e = 0; e < book_.layer(layer).layout.n_expert; e++) {
            load_result loaded;
            if (runtime_->cache().n_slots(layer, device) > 0 &&
                runtime_->cache().lookup(layer, e).state == slot_state::absent &&
                runtime_->cache().n_available(layer, device, 1) > 0 &&
                runtime_->cache().n_slots(layer, device) >= book_.layer(layer).layout.n_expert &&
                runtime_->cache().begin_load(layer, e, device, false, loaded).ok()) {
                note(trace_kind::load, layer, e, device);
                copy_now(device, layer, e, loaded.slot, true);
            }
        }
    }
    settle_fills();
}

void hybrid_dispatch::watch_memory() {
    if (config_.reproducible) {
        return;
    }
    const auto margin         = static_cast<double>(config_.fit_margin_bytes);
    const fault_plan & faults = config_.faults;
    n_looks_++;
    const bool is_scarce = faults.scarce_from > 0 && n_looks_ >= faults.scarce_from &&
                           (faults.scarce_until == 0 || n_looks_ < faults.scarce_until);
    for (size_t d = 0; d < devices_.size(); d++) {
        const bool is_own_memory = !devices_[d]->port.is_cpu() || faults.free_bytes >= 0;
        if (config_.expert_cache.is != expert_cache_size::kind::automatic || !is_own_memory ||
            governor_.level().level() == guard_level::static_layers) {
            continue; // a size that the user gave stays
        }
        const auto free =
            static_cast<double>(is_scarce ? faults.scarce_bytes : static_cast<int64_t>(devices_[d]->port.free_bytes()));
        double wanted = 0.0;
        for (int layer = 0; layer < book_.n_layers(); layer++) {
            wanted += static_cast<double>(book_.layer(layer).layout.expert_bytes()) *
                      wanted_slots_[d][static_cast<size_t>(layer)];
        }
        double share = shrink_[d];
        if (free < margin / 2) {
            share = std::max(0.0, share - std::max(0.1, (margin - free) / std::max(wanted, 1.0)));
        } else if (share < 1.0 && free > margin * 1.25 + 0.1 * wanted) {
            share = std::min(1.0, share + 0.1);
        }
        if (share != shrink_[d]) {
            log_.add("%s has %.2f GiB free, %.2f GiB are kept: expert cache %.0f %% -> %.0f %% of its size",
                     devices_[d]->port.name().c_str(), gib(free), gib(margin), 100.0 * shrink_[d], 100.0 * share);
            shrink_[d] = share;
            relayout(static_cast<int>(d), current_slots(d));
        }
    }
}

std::vector<int> hybrid_dispatch::current_slots(size_t device) const {
    std::vector<int> slots = wanted_slots_[device];
    for (int & n : slots) {
        n = static_cast<int>(std::floor(n * shrink_[device] + 1e-9));
    }
    return slots;
}

// The first layers whole, as many as the memory of the cache holds.
std::vector<int> hybrid_dispatch::static_slots(size_t device) const {
    double budget = 0.0;
    for (int layer = 0; layer < book_.n_layers(); layer++) {
        budget += static_cast<double>(book_.layer(layer).layout.expert_bytes()) *
                  static_cast<double>(wanted_slots_[device][static_cast<size_t>(layer)]) * shrink_[device];
    }
    std::vector<bool> may_take(static_cast<size_t>(book_.n_layers()), false);
    for (int layer = 0; layer < book_.n_layers(); layer++) {
        bool is_free = wanted_slots_[device][static_cast<size_t>(layer)] > 0;
        for (size_t other = 0; other < device; other++) {
            is_free = is_free && devices_[other]->slots[static_cast<size_t>(layer)].n_slots() !=
                                     book_.layer(layer).layout.n_expert;
        }
        may_take[static_cast<size_t>(layer)] = is_free;
    }
    return whole_layers(budget, may_take);
}

} // namespace hybrimoe
