// hybrid_dispatch: what the recorder is told, and what belongs to a recording beside its records.
#include "hybrid/cost_source.h"
#include "hybrid/hybrid_dispatch.h"

#include "nlohmann/json.hpp"

#include <algorithm>

namespace hybrimoe {

namespace {

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

void hybrid_dispatch::note(trace_kind kind, int layer, int a, int b, int c) {
    if (is_recording()) {
        recorder_->add(kind, clock_.now_us(), layer, 0, a, b, c);
    }
}

void hybrid_dispatch::note_copy(trace_kind kind, int64_t id, double now_us) {
    if (is_recording()) {
        recorder_->add(kind, now_us, 0, id);
    }
}

void hybrid_dispatch::note_copied(const copy_result & result, double now_us) {
    if (has_spans()) {
        recorder_->add_copied(result.id, result.end_us - result.us, result.end_us, result.bytes, now_us);
    }
}

void hybrid_dispatch::mark_router_end() {
    if (has_spans()) {
        times_.router_end = clock_.now_us();
    }
}

void hybrid_dispatch::mark_cpu_end() {
    if (has_spans()) {
        times_.cpu_end = clock_.now_us();
    }
}

void hybrid_dispatch::mark_kernels(const kernel_executor::result & done) {
    if (has_spans()) {
        times_.begin      = clock_.of_ns(done.begin_ns);
        times_.router_end = clock_.of_ns(done.begin_ns + done.router_ns);
        times_.cpu_end    = clock_.of_ns(done.begin_ns + done.router_ns + done.experts_ns);
    }
}

void hybrid_dispatch::note_costs() {
    if (is_recording()) {
        recorder_->add_costs(describe_costs(governor_.costs()), clock_.now_us());
    }
}

// What was tried is a fact of its own: whether to try depends on the clock.
void hybrid_dispatch::note_trial(double now_us) {
    if (decision_->is_tried) {
        recorder_->add(trace_kind::trial, now_us, layer_, 0, static_cast<int>(event_.trial.what.kind),
                       event_.trial.what.device);
    }
}

// A block that the runtime was not asked about: while the layers are learnt, without accelerators, and while one is
// set aside.
void hybrid_dispatch::note_unplanned(const float * scores) {
    if (!is_recording()) {
        return;
    }
    layer_event event = event_of(scores);
    event.gap_us      = phase_ == phase::learning ? 0.0 : gap_us_;
    unplanned_us_     = clock_.now_us();
    recorder_->add_layer(event, book_.max_experts(), unplanned_us_, false);
}

// What accelerators did of a planned block. ggml does not tell how long a graph ran on an asynchronous device: where it
// was waited for and nothing else held it up, it is known; else the cost model's time stands in.
void hybrid_dispatch::note_gpu_times(double wait_begin_us, double end_us) {
    const cost_model & costs = governor_.costs();
    const layer_plan & plan  = decision_->plan;
    times_.wait_end          = end_us;
    times_.predicted         = plan.makespan_us;
    times_.predicted_cpu     = plan.cpu_end_us;
    times_.gpu_is_known      = true;
    times_.n_cpu             = n_cpu_;
    times_.n_gpu             = n_gpu_;
    for (size_t d = 0; d < devices_.size(); d++) {
        if (!steps_[d]->has_work()) {
            continue;
        }
        const int index  = static_cast<int>(d);
        double predicted = costs.step_us(index);
        bool is_waiting  = false;
        for (const device_item & item : steps_[d]->items()) {
            predicted += costs.t_gpu(layer_, index, item.n_tokens);
            is_waiting = is_waiting || item.transfer != 0;
        }
        times_.predicted_gpu += predicted;
        if (devices_[d]->port.is_cpu()) { // computes within the call
            times_.gpu_busy += steps_[d]->computed_us();
            times_.gpu_end = std::max(times_.gpu_end, clock_.of_us(steps_[d]->computed_until()));
            continue;
        }
        const double begin_us  = times_.launch_begin;
        const bool was_waited  = end_us - wait_begin_us > least_wait_us;
        times_.gpu_is_known    = times_.gpu_is_known && was_waited && !is_waiting;
        const double until_us  = was_waited ? end_us : std::min(wait_begin_us, begin_us + predicted);
        times_.gpu_end         = std::max(times_.gpu_end, until_us);
        const double passed_us = until_us - begin_us;
        times_.gpu_busy += is_waiting ? std::min(passed_us, predicted) : passed_us;
    }
}

// A planned block, when the accelerators are done.
void hybrid_dispatch::note_step(double wait_begin_us, double end_us) {
    if (!is_recording()) {
        return;
    }
    const bool is_gpu = n_gpu_ > 0;
    if (has_spans()) {
        note_gpu_times(wait_begin_us, end_us);
    }
    recorder_->add_devices(where_);
    recorder_->add_measured(layer_, wait_begin_us - route_end_us_, is_gpu ? end_us - route_end_us_ : 0.0,
                            is_gpu ? end_us - wait_begin_us : 0.0, end_us, true);
}

void hybrid_dispatch::note_block_end() {
    if (!is_recording()) {
        return;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    const double now_us = clock_.now_us();
    if (routed_) {
        recorder_->add(trace_kind::layer_done, now_us, layer_);
    } else {
        recorder_->add_measured(layer_, now_us - unplanned_us_, 0.0, 0.0, now_us, false);
    }
    if (recorder_->with_spans()) {
        times_.end = now_us;
        recorder_->add_phases(layer_, pairs_.n_tokens, times_, routed_);
    }
    // Which layer is the last one is known once all have been seen.
    if (phase_ != phase::learning && layer_ == book_.n_layers() - 1) {
        recorder_->commit();
    }
}

int64_t hybrid_dispatch::read_trace(uint8_t * out, size_t size) const {
    return recorder_ == nullptr ? -1 : recorder_->pop(out, size);
}

bool hybrid_dispatch::stop_trace() const {
    std::lock_guard<std::mutex> lock(mutex_);
    if (recorder_ == nullptr) {
        return false;
    }
    recorder_->stop();
    return true;
}

std::string hybrid_dispatch::describe_trace() const {
    std::lock_guard<std::mutex> lock(mutex_);
    nlohmann::json out;
    out["is_set_up"] = phase_ != phase::learning;
    out["layers"]    = nlohmann::json::array();
    for (int layer = 0; layer < book_.n_layers(); layer++) {
        out["layers"].push_back(book_.layer(layer).llama_layer);
    }
    out["run"]      = nullptr;
    out["counters"] = nullptr;
    if (recorder_ != nullptr) {
        out["n_passes"]            = recorder_->n_passes();
        out["n_dropped"]           = recorder_->n_dropped();
        out["us_per_decode_pass"]  = recorder_->us_per_decode_pass();
        out["us_per_prefill_pass"] = recorder_->us_per_prefill_pass();
    }
    if (runtime_ != nullptr && !recorded_costs_.empty()) {
        const runtime_config defaults{};
        out["run"]      = {{"n_slots", wanted_slots_},
                           {"eviction", config_.cache_policy},
                           {"admission", config_.admission},
                           {"schedule", config_.schedule},
                           {"prefetch", config_.prefetch},
                           {"pooled", false},
                           {"max_window_layers", defaults.max_window_layers},
                           {"pay_back", defaults.pay_back},
                           {"preload", defaults.preload},
                           {"costs", nlohmann::json::parse(recorded_costs_)}};
        out["counters"] = counters_of(*runtime_);
    }
    return out.dump();
}

} // namespace hybrimoe
