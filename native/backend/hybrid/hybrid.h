// Experts on GPU and CPU together. Learns the layers in the first pass, sets the parts up before the second one, then
// has every block planned and shared, and looks after guard, costs and memory between passes. Owns all the parts, the
// runtime, and the mutex that protects them while another thread asks for facts.
//
// A block runs as: prepare (calling thread) -> look_ahead, route (inside the team) -> CPU pairs -> finish.
#pragma once

#include "core/governor.h"
#include "counters.h"
#include "hybrid/common.h"
#include "hybrid/cost_source.h"
#include "hybrid/fleet.h"
#include "hybrid/look_ahead.h"
#include "hybrid/memory_watch.h"
#include "hybrid/recording.h"
#include "hybrid/reproducibility.h"
#include "hybrid/route_trace.h"
#include "hybrid/sharing_pause.h"
#include "hybrid/step.h"
#include "kernel_executor.h"
#include "settings.h"

#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace hybrimoe {

class hybrid : public block_share {
public:
    // `kernels` compute look-ahead routers; may be null, then there is no look-ahead.
    // `inner`: see common.
    hybrid(const settings & config, std::shared_ptr<counters> data, cpu_timer & timer,
           const kernels::kernel_set * kernels, ggml_backend_dev_t inner);
    ~hybrid() override;

    // Before a block runs, on the calling thread: learns the layers in the first pass, then sets everything up; later
    // looks after memory and guard between two tokens. True when route() must be called for this block.
    // `in_graph`: see step; a graph's block may have its hits computed there when the layer has_slots().
    bool prepare(const moe_block & block, const described_block & described, bool exact, bool in_graph = false);
    bool knows(const described_block & described) const { return shared_.book.is_known(described); }
    // The accelerator's slots of the block at hand, null where it has none; in a graph, and the calls of step for it.
    const slot_set * slots_in_graph() const;
    const uint8_t * settle_in_graph();
    int slot_in_graph(int32_t expert) const { return step_.slot_in_graph(expert); }
    bool is_watched() const { return step_.is_watched(); }
    void watch(ggml_backend_t compute) { step_.watch(compute); }
    void add_inline_us(double us) { step_.add_inline_us(us); }

    // The step's x, [n_embd, n_tokens], whether the router reads the same, and where else it is; before route().
    void set_input(const float * x, size_t x_token_bytes, bool is_gate_input, const device_rows & there);
    // In a graph, while the device still computes what the block needs: applies later routers to an earlier layer's
    // gate input x [n_embd, n_tokens], so that the plan need not wait for that.
    void look_ahead_from(const described_block & described, const float * x, size_t x_token_bytes, int64_t n_tokens);
    const uint8_t * route(int32_t * ids, const float * weights, const float * scores) override;
    bool wants_scores() const override;
    void look_ahead(int thread, int n_threads) override;

    // For the recording: when the block at hand began, its router and its CPU's experts ended, on the calling thread.
    void mark_router_end() { recording_.on_router_end(); }
    void mark_cpu_end() { recording_.on_cpu_end(); }
    void mark_kernels(const kernel_executor::result & done) { recording_.on_kernels(done); }

    // After the CPU's pairs are computed: waits for the accelerators. What they could not compute is left to the CPU:
    // rest() then says which pairs ([top_k, n_tokens]), else it is null.
    void finish();
    const uint8_t * rest() const { return step_.rest(); }
    // The accelerators' weighted rows are added to y [n_embd, n_tokens].
    void add_to(float * y, size_t y_token_bytes) const { step_.add_to(y, y_token_bytes); }
    // The row of one pair, null when it is the CPU's; only if `exact` was asked for, or with one token.
    const float * row(int64_t token, int32_t k) const { return step_.row(token, k); }
    void end_block();

    // The layer of a block, whether or not it is shared; null for experts that cannot be moved, and until it was met.
    const known_layer * find_layer(const described_block & described) const { return shared_.book.find(described); }
    const expert_layout & layout() const { return shared_.book.layer(step_.layer()).layout; }
    const routed_pairs & pairs() const { return step_.pairs(); }
    // Whether the block at hand was planned, so that the two counts below are its.
    bool was_planned() const { return step_.is_planned(); }
    int n_experts_gpu() const { return step_.n_gpu(); }
    int n_experts_cpu() const { return step_.n_cpu(); }
    // The block at hand is only recorded: every expert is the CPU's.
    bool only_records() const { return phase_ != phase::ready && !trace_.is_active(); }

    // From any thread.
    const event_log & log() const { return shared_.log; }
    // What stands where, as one JSON object: devices, slots, costs, guard, statistics.
    std::string describe_state() const;
    // Layer by layer, as one JSON array: the accelerator that holds each expert, or -1; empty where nothing is shared.
    std::string describe_residency() const;
    // The recording; see instance_view.
    trace_feed * feed() const { return recording_.feed(); }
    bool stop_trace() const;
    std::string describe_trace() const;

private:
    enum class phase { learning, ready, off };

    void on_learnt_pass();
    void set_up();
    void introduce() const;
    bool make_parts(std::string & why_not);
    void save_state();
    std::vector<std::vector<int32_t>> read_residents() const;
    void on_pass_end();
    bool plan(const float * scores);
    bool is_paused();
    void pause(const char * reason) noexcept;
    void fail_step(const char * reason) noexcept;
    void give_up(const char * reason);

    common shared_;
    std::shared_ptr<counters> counters_;
    cpu_timer & timer_;
    const kernels::kernel_set * kernels_;
    phase phase_ = phase::learning;

    reproducibility reproducibility_{shared_};
    recording recording_{shared_};
    governor governor_;
    std::unique_ptr<runtime> runtime_;
    fleet fleet_{shared_, recording_, reproducibility_}; // after the runtime, which its workers' results go to
    memory_watch memory_watch_{shared_, fleet_};
    look_ahead_routers routers_;
    step step_;
    route_trace trace_;
    sharing_pause pause_;  // a step failed
    std::string given_up_; // why the caches that were asked for are not used; empty: they are, or none were
    bool needs_scores_ = false;
    int looked_for_    = -1; // the layer that look_ahead_from() was called for
    int horizon_       = 0;  // layers that a prefetcher may look ahead

    // the pass at hand
    int last_layer_      = -1;
    bool pass_is_decode_ = true, was_prompt_ = false;
    bool pass_is_shared_ = true; // every block was planned
    int64_t pass_tokens_ = 1;
    int64_t n_passes_    = 0;
    int n_learnt_        = 0; // passes

    mutable std::mutex mutex_; // all that describe_state reads
};

} // namespace hybrimoe
