// hybrid_dispatch: what others may ask while it runs.
#include "hybrid/hybrid_dispatch.h"

#include "nlohmann/json.hpp"

#include <algorithm>
#include <cmath>

namespace hybrimoe {

namespace {

// How well each cost is known: `slowdown` is today's over the calibration's, `disturbed` the part of it that may pass.
nlohmann::json describe_beliefs(const governor & gov, double now_us) {
    nlohmann::json out = nlohmann::json::array();
    const auto add     = [&](resource_kind kind, int device) {
        const cost_state s = gov.estimator().state({kind, device});
        out.push_back({{"resource", resource_name(kind)},
                       {"device", device},
                       {"slowdown", s.slowdown},
                       {"disturbed", s.disturbed},
                       {"error", s.residual},
                       {"n_samples", s.n_samples},
                       {"age_s", s.n_samples > 0 ? nlohmann::json(std::max(0.0, now_us - s.last_us) * 1e-6)
                                                 : nlohmann::json(nullptr)},
                       {"confidence", s.confidence(now_us)}});
    };
    add(resource_kind::cpu, cpu_device);
    for (int d = 0; d < gov.costs().n_devices(); d++) {
        add(resource_kind::gpu, d);
        add(resource_kind::link, d);
    }
    return out;
}

} // namespace

std::string hybrid_dispatch::describe_state() const {
    std::lock_guard<std::mutex> lock(mutex_);
    nlohmann::json out;
    out["phase"]    = phase_ == phase::learning ? "learning" : phase_ == phase::ready ? "ready" : "cpu-only";
    out["n_layers"] = book_.n_layers();
    out["paused"]   = nlohmann::json::array(); // what is tried again later, and why
    if (pause_.is_on()) {
        const double now_us = clock_.now_us();
        out["paused"].push_back({{"kind", "failed-step"},
                                 {"what", "sharing"},
                                 {"reason", pause_.reason()},
                                 {"since_s", (now_us - pause_.since_us()) * 1e-6},
                                 {"retry_in_s", std::max(0.0, pause_.until_us() - now_us) * 1e-6}});
    }
    for (size_t d = 0; d < devices_.size() && d < is_suspended_.size(); d++) {
        if (is_suspended_[d]) {
            out["paused"].push_back(
                {{"kind", "stuck-copy"}, {"what", devices_[d]->port.name()}, {"reason", "a copy did not end"}});
        }
    }
    const cost_model & costs = governor_.costs();
    out["devices"]           = nlohmann::json::array();
    for (size_t d = 0; d < devices_.size(); d++) {
        const accelerator & device = *devices_[d];
        nlohmann::json one;
        double bytes = 0.0;
        std::vector<int> slots;
        for (const slot_set & set : device.slots) {
            slots.push_back(set.n_slots());
            bytes += static_cast<double>(set.n_bytes());
        }
        one["name"]         = device.port.name();
        one["description"]  = device.port.description();
        one["cache_bytes"]  = bytes;
        one["n_slots"]      = slots;
        one["free_bytes"]   = device.port.free_bytes();
        one["total_bytes"]  = device.port.total_bytes();
        one["copied_bytes"] = device.worker.n_bytes_copied();
        one["copy_busy_us"] = device.worker.busy_us();
        one["suspended"]    = static_cast<bool>(is_suspended_[d]);
        if (runtime_ != nullptr && !config_.reproducible) {
            const int index       = static_cast<int>(d);
            one["gpu_expert_us"]  = costs.t_gpu(0, index, 1);
            one["copy_expert_us"] = costs.t_copy(index, costs.of_layer(0).bytes);
            one["step_us"]        = costs.step_us(index);
        }
        out["devices"].push_back(one);
    }
    if (runtime_ != nullptr) {
        const runtime_stats & stats = runtime_->stats();
        out["cpu_expert_us"]        = costs.t_cpu(0, 1, false);
        out["cpu_first_us"]         = costs.t_cpu(0, 1, true) - costs.t_cpu(0, 1, false);
        const double dram           = costs.dram_bytes_per_us();
        out["dram_bytes_per_us"]    = std::isfinite(dram) ? nlohmann::json(dram) : nlohmann::json(nullptr);
        out["stats"]                = {{"n_events", stats.n_events},
                                       {"n_cpu", stats.n_cpu},
                                       {"n_gpu", stats.n_gpu},
                                       {"n_hits", stats.n_hits},
                                       {"n_misses", stats.n_misses},
                                       {"n_late", stats.n_late},
                                       {"n_failed", stats.n_failed},
                                       {"n_evictions", runtime_->cache().stats().n_evictions},
                                       {"n_demanded", stats.n_transfers[0]},
                                       {"n_streamed", stats.n_transfers[1]},
                                       {"n_admitted", stats.n_transfers[2]},
                                       {"n_prefetched", stats.n_transfers[3]},
                                       {"n_prefetch_used", runtime_->cache().stats().n_prefetch_used},
                                       {"prefetch_useful_bytes", stats.prefetch_useful_bytes},
                                       {"prefetch_late_bytes", stats.prefetch_late_bytes},
                                       {"prefetch_wasted_bytes", stats.prefetch_wasted_bytes},
                                       {"prefetch_on", runtime_->prefetch_on()},
                                       {"decision_hash", std::to_string(stats.decision_hash)}};
        out["guard"]                = {{"on", config_.guard},
                                       {"level", guard_level_name(governor_.level().level())},
                                       {"n_changes", governor_.level().n_changes()},
                                       {"token_us", governor_.level().token_us()},
                                       {"overhead_us", governor_.overhead_us()},
                                       {"floor_us", governor_.floor_us()},
                                       {"floor_is", "estimated"}};
        out["trials"]               = {{"n", governor_.tried().n_trials()}, {"us", governor_.tried().spent_us()}};
        if (governor_.is_live()) {
            out["beliefs"] = describe_beliefs(governor_, clock_.now_us());
        }
        nlohmann::json recall = nlohmann::json::array();
        for (int d = 1; d <= max_lookahead; d++) {
            recall.push_back(
                {{"distance", d}, {"n_wanted", routers_.n_predicted(d)}, {"n_right", routers_.n_right(d)}});
        }
        out["look_ahead"] = recall;
    }
    // Whether it was asked for, and whether it has held.
    out["reproducible"] = {{"on", config_.reproducible}, {"holds", config_.reproducible && is_reproducible_}};
    if (config_.reproducible) { // no costs are known
        for (const char * key : {"cpu_expert_us", "cpu_first_us", "dram_bytes_per_us"}) {
            out.erase(key);
        }
    }
    return out.dump();
}

bool hybrid_dispatch::residency(int llama_layer, std::vector<int32_t> & device) const {
    std::lock_guard<std::mutex> lock(mutex_);
    for (int layer = 0; runtime_ != nullptr && layer < book_.n_layers(); layer++) {
        if (book_.layer(layer).llama_layer == llama_layer) {
            device.clear();
            for (int32_t e = 0; e < book_.layer(layer).layout.n_expert; e++) {
                const hybrimoe::residency at = runtime_->cache().lookup(layer, e);
                const bool there             = at.state == slot_state::resident || at.state == slot_state::pinned;
                device.push_back(there ? at.device : cpu_device);
            }
            return true;
        }
    }
    return false;
}

} // namespace hybrimoe
