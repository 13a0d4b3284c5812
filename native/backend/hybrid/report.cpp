#include "hybrid/report.h"

#include "hybrid/hybrid.h"

#include "nlohmann/json.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>

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

void announce(const common & shared, const fleet & devices, const reproducibility & promise, const cost_model & costs) {
    if (shared.config.reproducible) {
        promise.announce(devices);
        return;
    }
    for (int d = 0; d < devices.size(); d++) {
        const accelerator & device = devices[d];
        double bytes               = 0.0;
        int64_t n_slots            = 0;
        int64_t n_experts          = 0;
        for (int layer = 0; layer < shared.book.n_layers(); layer++) {
            bytes += static_cast<double>(device.of_layer(layer).n_bytes());
            n_slots += device.of_layer(layer).n_slots();
            n_experts += shared.book.layer(layer).layout.n_expert;
        }
        shared.log.add(
            "%s caches %lld of %lld experts (%.2f GiB, %.0f %%); an expert: CPU %.0f us, %s %.0f us, copy %.0f us",
            device.port.name().c_str(), static_cast<long long>(n_slots), static_cast<long long>(n_experts), gib(bytes),
            100.0 * static_cast<double>(n_slots) / static_cast<double>(std::max<int64_t>(1, n_experts)),
            costs.t_cpu(0, 1, false), device.port.name().c_str(), costs.t_gpu(0, d, 1),
            costs.t_copy(d, costs.of_layer(0).bytes));
    }
}

// For a user who started another program than ours, and sees only its output: once the layers are known.
void hybrid::introduce() const {
    const layer_book & book = shared_.book;
    if (!shared_.config.log_to_stderr || book.n_layers() == 0) {
        return;
    }
    std::string where;
    for (int d = 0; phase_ == phase::ready && d < fleet_.size(); d++) {
        double bytes    = 0.0;
        int64_t n_slots = 0;
        for (int layer = 0; layer < book.n_layers(); layer++) {
            bytes += static_cast<double>(fleet_[d].of_layer(layer).n_bytes());
            n_slots += fleet_[d].of_layer(layer).n_slots();
        }
        char text[128];
        std::snprintf(text, sizeof(text), ", %s with %lld slots (%.2f GiB)", fleet_[d].port.name().c_str(),
                      static_cast<long long>(n_slots), gib(bytes));
        where += text;
    }
    std::fprintf(stderr, "HybriMoE runs %d MoE layers: %d experts, top-%d; CPU kernels %s%s\n", book.n_layers(),
                 static_cast<int>(book.max_experts()), static_cast<int>(book.max_top_k()),
                 shared_.config.kernels == cpu_kernels::ggml || kernels_ == nullptr
                     ? "ggml"
                     : kernels::kernel_set_name(kernels_),
                 where.empty() ? ", all experts on the CPU" : where.c_str());
}

std::string hybrid::describe_residency() const {
    std::lock_guard<std::mutex> lock(mutex_);
    std::string out = "[";
    for (int layer = 0; layer < shared_.book.n_layers(); layer++) {
        out += layer == 0 ? "[" : ",[";
        const int32_t n_experts = runtime_ == nullptr ? 0 : shared_.book.layer(layer).layout.n_expert;
        for (int32_t e = 0; e < n_experts; e++) {
            out += (e == 0 ? "" : ",") + std::to_string(fleet_.holder(layer, e));
        }
        out += "]";
    }
    return out + "]";
}

std::string hybrid::describe_state() const {
    std::lock_guard<std::mutex> lock(mutex_);
    nlohmann::json out;
    out["phase"]  = phase_ == phase::learning ? "learning" : phase_ == phase::ready ? "ready" : "cpu-only";
    out["layers"] = nlohmann::json::array();
    for (int layer = 0; layer < shared_.book.n_layers(); layer++) {
        const known_layer & one = shared_.book.layer(layer);
        out["layers"].push_back({{"layer", one.llama_layer},
                                 {"n_experts", one.layout.n_expert},
                                 {"top_k", one.top_k},
                                 {"expert_bytes", one.layout.expert_bytes()}});
    }
    out["given_up"] = given_up_.empty() ? nlohmann::json(nullptr) : nlohmann::json(given_up_);
    out["paused"]   = nlohmann::json::array(); // what is tried again later, and why
    if (pause_.is_on()) {
        const double now_us = shared_.clock.now_us();
        out["paused"].push_back({{"kind", "failed-step"},
                                 {"what", "sharing"},
                                 {"reason", pause_.reason()},
                                 {"since_s", (now_us - pause_.since_us()) * 1e-6},
                                 {"retry_in_s", std::max(0.0, pause_.until_us() - now_us) * 1e-6}});
    }
    for (int d = 0; d < fleet_.size(); d++) {
        if (fleet_[d].is_lost) {
            out["given_up"] = fleet_[d].port.name() + ": its slots are in disorder";
        }
        if (fleet_[d].is_suspended) {
            out["paused"].push_back(
                {{"kind", "stuck-copy"}, {"what", fleet_[d].port.name()}, {"reason", "a copy did not end"}});
        }
    }
    const cost_model & costs = governor_.costs();
    out["devices"]           = nlohmann::json::array();
    for (int d = 0; d < fleet_.size(); d++) {
        const accelerator & device = fleet_[d];
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
        one["suspended"]    = device.is_suspended;
        if (runtime_ != nullptr && !shared_.config.reproducible) {
            one["gpu_expert_us"]  = costs.t_gpu(0, d, 1);
            one["copy_expert_us"] = costs.t_copy(d, costs.of_layer(0).bytes);
            one["step_us"]        = costs.step_us(d);
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
        out["guard"]                = {{"on", shared_.config.guard},
                                       {"level", guard_level_name(governor_.level().level())},
                                       {"n_changes", governor_.level().n_changes()},
                                       {"token_us", governor_.level().token_us()},
                                       {"overhead_us", governor_.overhead_us()},
                                       {"floor_us", governor_.floor_us()},
                                       {"floor_is", "estimated"}};
        out["trials"]               = {{"n", governor_.tried().n_trials()}, {"us", governor_.tried().spent_us()}};
        if (governor_.is_live()) {
            out["beliefs"] = describe_beliefs(governor_, shared_.clock.now_us());
        }
        nlohmann::json recall = nlohmann::json::array();
        for (int d = 1; d <= max_lookahead; d++) {
            recall.push_back(
                {{"distance", d}, {"n_wanted", routers_.n_predicted(d)}, {"n_right", routers_.n_right(d)}});
        }
        out["look_ahead"] = recall;
    }
    // Whether it was asked for, and whether it has held.
    out["reproducible"] = {{"on", shared_.config.reproducible}, {"holds", reproducibility_.holds()}};
    if (shared_.config.reproducible) { // no costs are known
        for (const char * key : {"cpu_expert_us", "cpu_first_us", "dram_bytes_per_us"}) {
            out.erase(key);
        }
    }
    return out.dump();
}

} // namespace hybrimoe
