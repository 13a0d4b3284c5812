#include "hybrid/recording.h"

#include "hybrid/cost_source.h"
#include "hybrid/device_step.h"
#include "hybrid/fleet.h"

#include "nlohmann/json.hpp"

#include <algorithm>

namespace hybrimoe {

namespace {

// Room for the largest passes of large models without their scores. Pages that no recording reaches are never touched.
constexpr int64_t observer_ring_bytes = int64_t{32} << 20;

nlohmann::json counters_of(const runtime & rt) {
    const runtime_stats & s = rt.stats();
    const cache_stats & c   = rt.cache().stats();
    return {{"n_events", s.n_events},
            {"n_cpu", s.n_cpu},
            {"n_gpu", s.n_gpu},
            {"n_hits", s.n_hits},
            {"n_misses", s.n_misses},
            {"n_late", s.n_late},
            {"n_transfers", s.n_transfers},
            {"bytes", s.bytes},
            {"n_failed", s.n_failed},
            {"prefetch_useful_bytes", s.prefetch_useful_bytes},
            {"prefetch_late_bytes", s.prefetch_late_bytes},
            {"prefetch_wasted_bytes", s.prefetch_wasted_bytes},
            {"n_delayed_demands", s.n_delayed_demands},
            {"stall_us", s.stall_us},
            {"makespan_us", s.makespan_us},
            {"n_prefetch_switches", s.n_prefetch_switches},
            {"prefetch_on", rt.prefetch_on() ? 1 : 0},
            {"horizon", rt.horizon()},
            {"decision_hash", s.decision_hash},
            {"cache",
             {{"n_queries", c.n_queries},
              {"n_hits", c.n_hits},
              {"n_misses", c.n_misses},
              {"n_late", c.n_late},
              {"n_loads", c.n_loads},
              {"n_failed_loads", c.n_failed_loads},
              {"n_evictions", c.n_evictions},
              {"n_refused", c.n_refused},
              {"n_prefetched", c.n_prefetched},
              {"n_prefetch_used", c.n_prefetch_used},
              {"n_prefetch_wasted", c.n_prefetch_wasted}}}};
}

} // namespace

// A host that asks for a recording gets what it asks for and reads it. An observer needs the routing alone.
recording::recording(const common & shared) : shared_(shared) {
    const settings & config = shared.config;
    const bool for_host     = config.trace_bytes > 0;
    if (for_host || config.observe) {
        recorder_ =
            std::make_unique<trace_recorder>(static_cast<size_t>(for_host ? config.trace_bytes : observer_ring_bytes),
                                             for_host && config.trace_scores, for_host && config.trace_spans);
        feed_ = std::make_unique<trace_feed>([this](uint8_t * out, size_t size) { return recorder_->pop(out, size); },
                                             for_host);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// events without arrays

void recording::note(trace_kind kind, int layer, int a, int b, int c) {
    if (is_on()) {
        recorder_->add(kind, shared_.clock.now_us(), layer, 0, a, b, c);
    }
}

void recording::on_prompt() {
    note(trace_kind::prompt);
}

void recording::on_limits(const runtime_limits & limits) {
    note(trace_kind::limits, 0, limits.prefetch, limits.demand_copies, limits.admission);
}

void recording::on_resize(int layer, int device, int n_slots) {
    note(trace_kind::resize, layer, device, n_slots);
}

void recording::on_load(int layer, int expert, int device) {
    note(trace_kind::load, layer, expert, device);
}

void recording::on_loaded(int layer, int expert, bool ok) {
    note(trace_kind::loaded, layer, expert, ok);
}

void recording::on_complete(int64_t transfer, double now_us) {
    if (is_on()) {
        recorder_->add(trace_kind::complete, now_us, 0, transfer);
    }
}

void recording::on_fail(int64_t transfer, double now_us) {
    if (is_on()) {
        recorder_->add(trace_kind::fail, now_us, 0, transfer);
    }
}

void recording::on_copied(const copy_result & result, double now_us) {
    if (has_spans()) {
        recorder_->add_copied(result.id, result.end_us - result.us, result.end_us, result.bytes, now_us);
    }
}

void recording::on_costs(const cost_model & costs) {
    if (is_on()) {
        recorder_->add_costs(describe_costs(costs), shared_.clock.now_us());
    }
}

void recording::keep_costs(const cost_model & costs) {
    if (is_on()) {
        costs_ = describe_costs(costs);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// a block

void recording::on_pass(int64_t n_tokens) {
    if (is_on()) {
        recorder_->begin_pass(n_tokens, shared_.clock.now_us());
    }
}

void recording::on_block() {
    if (has_spans()) {
        times_       = {};
        times_.begin = shared_.clock.now_us();
    }
}

void recording::on_router_end() {
    if (has_spans()) {
        times_.router_end = shared_.clock.now_us();
    }
}

void recording::on_cpu_end() {
    if (has_spans()) {
        times_.cpu_end = shared_.clock.now_us();
    }
}

void recording::on_kernels(const kernel_executor::result & done) {
    if (has_spans()) {
        times_.begin      = shared_.clock.of_ns(done.begin_ns);
        times_.router_end = shared_.clock.of_ns(done.begin_ns + done.router_ns);
        times_.cpu_end    = shared_.clock.of_ns(done.begin_ns + done.router_ns + done.experts_ns);
    }
}

void recording::on_routed(const layer_event & event) {
    if (is_on()) {
        unplanned_us_ = shared_.clock.now_us();
        recorder_->add_layer(event, shared_.book.max_experts(), unplanned_us_, false);
    }
}

void recording::on_planned(const layer_event & event, const decision & made, double now_us) {
    if (!is_on()) {
        return;
    }
    if (made.is_tried) { // recorded apart: a replay cannot know it, since it depends on the clock
        recorder_->add(trace_kind::trial, now_us, event.layer, 0, static_cast<int>(event.trial.what.kind),
                       event.trial.what.device);
    }
    recorder_->add_layer(event, shared_.book.max_experts(), now_us, true);
    recorder_->add_transfers(made);
}

// What accelerators did of a planned block. ggml does not tell how long a graph ran on an asynchronous device: where it
// was waited for and nothing else held it up, it is known; else the cost model's time stands in.
void recording::note_gpu_times(const done_block & done, const fleet & devices, const cost_model & costs) {
    const layer_plan & plan = done.planned->plan;
    times_.launch_begin     = done.launch_begin_us;
    times_.launch_end       = done.launch_end_us;
    times_.wait_end         = done.end_us;
    times_.predicted        = plan.makespan_us;
    times_.predicted_cpu    = plan.cpu_end_us;
    times_.gpu_is_known     = true;
    times_.n_cpu            = done.n_cpu;
    times_.n_gpu            = done.n_gpu;
    for (int d = 0; d < devices.size(); d++) {
        const device_step & share = *devices[d].share;
        if (!share.has_work()) {
            continue;
        }
        double predicted = costs.step_us(d);
        bool is_waiting  = false;
        for (const device_item & item : share.items()) {
            predicted += costs.t_gpu(done.layer, d, item.n_tokens);
            is_waiting = is_waiting || item.transfer != 0;
        }
        times_.predicted_gpu += predicted;
        if (devices[d].port.is_cpu()) { // computes within the call
            times_.gpu_busy += share.computed_us();
            times_.gpu_end = std::max(times_.gpu_end, shared_.clock.of_us(share.computed_until()));
            continue;
        }
        const double begin_us  = done.launch_begin_us;
        const bool was_waited  = done.end_us - done.wait_begin_us > least_wait_us;
        times_.gpu_is_known    = times_.gpu_is_known && was_waited && !is_waiting;
        const double until_us  = was_waited ? done.end_us : std::min(done.wait_begin_us, begin_us + predicted);
        times_.gpu_end         = std::max(times_.gpu_end, until_us);
        const double passed_us = until_us - begin_us;
        times_.gpu_busy += is_waiting ? std::min(passed_us, predicted) : passed_us;
    }
}

void recording::on_done(const done_block & done, const fleet & devices, const cost_model & costs) {
    if (!is_on()) {
        return;
    }
    if (has_spans()) {
        note_gpu_times(done, devices, costs);
    }
    const bool is_gpu = done.n_gpu > 0;
    recorder_->add_devices(*done.devices);
    recorder_->add_measured(done.layer, done.wait_begin_us - done.launch_end_us,
                            is_gpu ? done.end_us - done.launch_end_us : 0.0,
                            is_gpu ? done.end_us - done.wait_begin_us : 0.0, done.end_us, true);
}

void recording::on_block_end(int layer, int64_t n_tokens, bool was_planned, bool is_last) {
    if (!is_on()) {
        return;
    }
    const double now_us = shared_.clock.now_us();
    if (was_planned) {
        recorder_->add(trace_kind::layer_done, now_us, layer);
    } else {
        recorder_->add_measured(layer, now_us - unplanned_us_, 0.0, 0.0, now_us, false);
    }
    if (recorder_->with_spans()) {
        times_.end = now_us;
        recorder_->add_phases(layer, n_tokens, times_, was_planned);
    }
    if (is_last) {
        recorder_->commit();
    }
}

// ---------------------------------------------------------------------------------------------------------------
// what belongs to a recording beside its records

bool recording::stop() const {
    if (recorder_ == nullptr) {
        return false;
    }
    recorder_->stop();
    return true;
}

std::string recording::describe(bool is_set_up, const runtime * rt, const fleet & devices) const {
    nlohmann::json out;
    out["is_set_up"] = is_set_up;
    out["layers"]    = nlohmann::json::array();
    for (int layer = 0; layer < shared_.book.n_layers(); layer++) {
        out["layers"].push_back(shared_.book.layer(layer).llama_layer);
    }
    out["run"]      = nullptr;
    out["counters"] = nullptr;
    if (recorder_ != nullptr) {
        out["n_passes"]            = recorder_->n_passes();
        out["n_dropped"]           = recorder_->n_dropped() + feed_->n_lost(trace_feed::host);
        out["us_per_decode_pass"]  = recorder_->us_per_decode_pass();
        out["us_per_prefill_pass"] = recorder_->us_per_prefill_pass();
    }
    if (rt != nullptr && !costs_.empty()) {
        const settings & config = shared_.config;
        const runtime_config defaults{};
        out["run"]      = {{"n_slots", devices.wanted()},
                           {"eviction", config.cache_policy},
                           {"admission", config.admission},
                           {"schedule", config.schedule},
                           {"prefetch", config.prefetch},
                           {"pooled", false},
                           {"max_window_layers", defaults.max_window_layers},
                           {"pay_back", defaults.pay_back},
                           {"preload", defaults.preload},
                           {"costs", nlohmann::json::parse(costs_)}};
        out["counters"] = counters_of(*rt);
    }
    return out.dump();
}

} // namespace hybrimoe
