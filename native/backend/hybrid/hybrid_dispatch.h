// Experts on GPU and CPU together: asks the policy core for a plan, hands each accelerator its share, and tells the CPU
// kernels which pairs are theirs.
//
// A block runs as: prepare (calling thread) -> look_ahead, route (inside the team) -> CPU pairs -> finish.
#pragma once

#include "core/governor.h"
#include "counters.h"
#include "hybrid/device_step.h"
#include "hybrid/event_log.h"
#include "hybrid/layer_book.h"
#include "hybrid/look_ahead.h"
#include "hybrid/route_trace.h"
#include "hybrid/sharing_pause.h"
#include "kernel_executor.h"
#include "settings.h"
#include "trace_recorder.h"

#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace hybrimoe {

// Times expert FFNs on the CPU for the calibration: microseconds for `n_tokens` tokens on each of `experts`.
class cpu_timer {
public:
    virtual ~cpu_timer()                                                                                  = default;
    virtual double time_us(const known_layer & layer, const std::vector<int32_t> & experts, int n_tokens) = 0;
};

class hybrid_dispatch : public block_share {
public:
    // `kernels` compute look-ahead routers; may be null, then there is no look-ahead.
    hybrid_dispatch(const settings & config, std::shared_ptr<counters> data, cpu_timer & timer,
                    const kernels::kernel_set * kernels);
    ~hybrid_dispatch() override;

    // Before a block runs, on the calling thread: learns the layers in the first pass, then sets everything up; later
    // looks after memory and guard between two tokens. True when route() must be called for this block.
    bool prepare(const moe_block & block, const described_block & described, bool exact);

    // The step's x, [n_embd, n_tokens], whether the router reads the same, and where else it is; before route().
    void set_input(const float * x, size_t x_token_bytes, bool is_gate_input, const device_rows & there);
    const uint8_t * route(int32_t * ids, const float * weights, const float * scores) override;
    bool wants_scores() const override;
    void look_ahead(int thread, int n_threads) override;

    // For the recording: when the block at hand began, its router and its CPU's experts ended, on the calling thread.
    void mark_router_end();
    void mark_cpu_end();
    void mark_kernels(const kernel_executor::result & done);

    // After the CPU's pairs are computed: waits for the accelerators. What they could not compute is left to the CPU:
    // rest() then says which pairs ([top_k, n_tokens]), else it is null.
    void finish();
    const uint8_t * rest() const { return any_rest_ ? rest_.data() : nullptr; }
    // The accelerators' weighted rows are added to y [n_embd, n_tokens].
    void add_to(float * y, size_t y_token_bytes) const;
    // The row of one pair, null when it is the CPU's; only if `exact` was asked for, or with one token.
    const float * row(int64_t token, int32_t k) const;
    void end_block();

    const expert_layout & layout() const { return book_.layer(layer_).layout; }
    const routed_pairs & pairs() const { return pairs_; }
    // Whether the block at hand was planned, so that the two counts below are its.
    bool was_planned() const { return routed_; }
    int n_experts_gpu() const { return n_gpu_; }
    int n_experts_cpu() const { return n_cpu_; }
    const event_log & log() const { return log_; }
    // What stands where, as one JSON object: devices, slots, costs, guard, statistics.
    std::string describe_state() const;
    // device[e] of the layer: the accelerator that holds expert e, or -1. False for an unknown layer.
    bool residency(int llama_layer, std::vector<int32_t> & device) const;

    // The block at hand is only recorded: every expert is the CPU's.
    bool only_records() const { return phase_ != phase::ready && !trace_.is_active(); }
    // The recording; see instance_view.
    int64_t read_trace(uint8_t * out, size_t size) const;
    bool stop_trace() const;
    std::string describe_trace() const;

private:
    enum class phase { learning, ready, off };
    static constexpr double drain_timeout_us = 5e6;

    // setup
    void set_up();
    bool open_devices();
    bool may_cache(const accelerator & device, int layer) const;
    void size_caches(std::vector<std::vector<int>> & slots);
    std::vector<int> slots_for_budget(const accelerator & device, double budget) const;
    std::vector<std::vector<int>> fixed_slots(const std::vector<double> & free) const;
    std::vector<int> whole_layers(double budget, const std::vector<bool> & may_take) const;
    double whole_layer_bytes() const;
    void check_fixed_placement();
    void announce_fixed_placement() const;
    void not_reproducible(const char * why);
    void allocate_slots(std::vector<std::vector<int>> & slots);
    bool make_costs(cost_model & out);
    status make_governor(const cost_model & costs);
    status make_runtime(const cost_model & costs, const std::vector<std::vector<int>> & slots);
    void pin_experts();
    void fill_caches();
    void fill_layers(int device);
    void copy_now(int device, int layer, int expert, int slot, bool is_load);
    void settle_fills();
    void announce() const;
    void save_state();

    // between tokens
    void on_pass_end();
    void watch_memory();
    void apply_guard(const guard_change & change);
    void relayout(int device, const std::vector<int> & slots);
    std::vector<int> current_slots(size_t device) const;
    std::vector<int> static_slots(size_t device) const;
    bool drain(double timeout_us);

    // recording
    bool is_recording() const { return recorder_ != nullptr && recorder_->is_on(); }
    void note(trace_kind kind, int layer = 0, int a = 0, int b = 0, int c = 0);
    void note_copy(trace_kind kind, int64_t id, double now_us);
    void note_copied(const copy_result & result, double now_us);
    void note_costs();
    void note_unplanned(const float * scores);
    void note_step(double wait_begin_us, double end_us);
    void note_gpu_times(double wait_begin_us, double end_us);
    void note_trial(double now_us);
    bool has_spans() const { return is_recording() && recorder_->with_spans(); }
    void note_block_end();

    // in a step
    void take_results();
    bool is_paused();
    void pause(const char * reason);
    void give_up_step() noexcept;
    layer_event event_of(const float * scores); // what the router said of the block at hand
    bool plan(const float * scores);
    const float * widened(const float * scores);
    bool has_scratch() const;
    void share_out();
    copy_order order_of(const transfer & t);
    int64_t transfer_of(int layer, int expert) const;
    void find_rest();
    void log_drift(const drift_report & drift) const;
    void count_step(double wait_begin_us, double end_us);
    void judge_step();

    const settings config_;
    std::shared_ptr<counters> counters_;
    cpu_timer & timer_;
    const kernels::kernel_set * kernels_;
    mutable event_log log_;
    step_clock clock_;
    phase phase_ = phase::learning;

    layer_book book_;
    std::vector<std::unique_ptr<accelerator>> devices_;
    std::vector<std::unique_ptr<device_step>> steps_; // per device
    std::unique_ptr<runtime> runtime_;
    governor governor_;
    bool needs_scores_ = false;
    int horizon_       = 0; // layers that a prefetcher may look ahead
    look_ahead_routers routers_;
    route_trace trace_;
    bool is_reproducible_ = true;                // with the setting: so far every expert was computed where it belongs
    std::vector<std::vector<int>> wanted_slots_; // [device][layer]: after set-up, before memory became scarce
    std::vector<double> shrink_;                 // per device: share of the wanted slots that it has now

    // the block at hand
    int layer_ = -1;
    routed_pairs pairs_;
    int64_t n_expert_          = 0;
    bool routed_               = false;
    const decision * decision_ = nullptr;
    std::vector<uint8_t> take_, rest_;
    bool any_rest_ = false;
    std::vector<int32_t> where_;                  // per expert: accelerator, or -1
    std::vector<std::vector<copy_order>> orders_; // per device, of this step's own items
    std::vector<copy_result> results_;
    std::vector<int32_t> active_;
    std::vector<float> wide_scores_;
    int next_scratch_ = 0;
    int n_gpu_ = 0, n_cpu_ = 0;
    layer_event event_;   // what was asked of the runtime
    layer_timing timing_; // how it went
    double begin_us_ = 0.0, route_begin_us_ = 0.0, route_end_us_ = 0.0, finish_end_us_ = 0.0;
    std::vector<double> launch_us_;   // per device: when its launch began ...
    double computed_inline_us_ = 0.0; // ... and what a CPU as device computed within it

    // the pass at hand
    int last_layer_      = -1;
    bool pass_is_decode_ = true, was_prompt_ = false;
    bool pass_is_shared_ = true; // every block was planned
    int64_t pass_tokens_ = 1;
    double last_end_us_ = 0.0, gap_us_ = 0.0;
    int64_t n_passes_ = 0, n_looks_ = 0;
    std::vector<bool> told_memory_, told_copy_; // per device: said once
    std::vector<bool> is_suspended_;            // per device: a copy got stuck
    sharing_pause pause_;                       // a step failed
    int64_t n_planned_ = 0;                     // steps that were planned, for the fault plan

    std::unique_ptr<trace_recorder> recorder_; // null: nothing is recorded
    std::string recorded_costs_;               // those the runtime was made with
    double unplanned_us_ = 0.0;                // when a block that was not planned was routed
    block_times times_;                        // of the block at hand, where spans are recorded

    mutable std::mutex mutex_; // runtime_ and what describe_state reads
};

} // namespace hybrimoe
