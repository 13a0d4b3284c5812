// One block that is shared, from the router's word to the sum: asks the runtime for a plan, hands every accelerator its
// items, waits for them, says what is left to the CPU, and tells counters, governor and recording how it went. Owns the
// block at hand: pairs, decision, times. Called by the computing thread (routing and plan by the team's thread 0, which
// is the same one), in the order of the methods; `hybrid` holds the mutex.
#pragma once

#include "counters.h"
#include "hybrid/common.h"
#include "hybrid/device_step.h"
#include "hybrid/fleet.h"
#include "hybrid/look_ahead.h"
#include "match.h"

#include "core/governor.h"

#include <vector>

namespace hybrimoe {

constexpr double copy_patience_us = 1e7; // of every copy: a first launch may compile shaders

class step {
public:
    step(const common & shared, fleet & devices, governor & gov, look_ahead_routers & routers, recording & record,
         reproducibility & promise, counters & data)
        : shared_(shared), devices_(devices), governor_(gov), routers_(routers), record_(record), promise_(promise),
          counters_(data) {}
    // Blocks are planned from now on; `looks_ahead`: routers of later layers are applied.
    void start(runtime & rt, bool looks_ahead);

    // `in_graph`: the accelerator's share is computed by the graph of whoever calls.
    void begin(int layer, const moe_block & block, bool exact, bool in_graph);
    void set_input(const float * x, size_t x_token_bytes, const device_rows & there);
    void set_routing(const int32_t * ids, const float * weights);
    layer_event event_of(const float * scores); // what the router said
    status plan(const float * scores);
    // In a graph of ours, after share_out(): waits for copies that the plan wants now. The CPU's pairs then, as
    // share_out() gives them; what did not come is theirs, too.
    const uint8_t * settle_in_graph();
    // The slot of a pair's expert in the only accelerator, after settle_in_graph(); -1: the pair is the CPU's.
    int slot_in_graph(int32_t expert) const;
    // Whether someone wants to know when the accelerator ends; then watch() is called once its work is queued.
    bool is_watched() const { return event_.trial.wanted && event_.trial.what.kind == resource_kind::gpu; }
    void watch(ggml_backend_t compute);
    // Time in which the calling thread itself did the accelerator's work.
    void add_inline_us(double us) { computed_inline_us_ += us; }
    // Launches what accelerators compute. The CPU's pairs ([top_k, n_tokens], non-zero: compute); null: all of them.
    const uint8_t * share_out();
    // The block failed on its way to the accelerators, whatever was done of it: waits for what was started, since it
    // reads the block's rows, and takes back the copies that never were.
    void give_up() noexcept;
    void finish();
    // finish() threw: all that accelerators were to compute is left to the CPU.
    void leave_to_cpu() noexcept;
    // The block's result stands.
    void end();

    int layer() const { return layer_; }
    const routed_pairs & pairs() const { return pairs_; }
    bool in_graph() const { return in_graph_; }
    bool is_planned() const { return is_planned_; }
    int n_cpu() const { return n_cpu_; }
    int n_gpu() const { return n_gpu_; }
    // Results, after finish(); see hybrid.
    const uint8_t * rest() const { return any_rest_ ? rest_.data() : nullptr; }
    void add_to(float * y, size_t y_token_bytes) const;
    const float * row(int64_t token, int32_t k) const;

private:
    const float * widened(const float * scores);
    int64_t transfer_of(int layer, int expert) const;
    copy_order order_of(const transfer & t);
    void add_items();
    void launch();
    double patience_us() const;
    void mark_cpu_pairs();
    void find_rest();
    void judge_step();
    void count_step(double wait_begin_us, double end_us);

    const common & shared_;
    fleet & devices_;
    governor & governor_;
    look_ahead_routers & routers_;
    recording & record_;
    reproducibility & promise_;
    counters & counters_;
    runtime * runtime_ = nullptr;
    bool looks_ahead_  = false;

    int layer_ = -1;
    routed_pairs pairs_;
    int64_t n_expert_          = 0;
    bool is_planned_           = false;
    const decision * decision_ = nullptr;
    std::vector<uint8_t> take_, rest_;
    bool any_rest_   = false;
    bool in_graph_   = false;
    bool is_settled_ = false;    // in a graph: what came and what did not is known
    std::vector<int32_t> where_; // per expert: accelerator, or -1
    std::vector<int32_t> active_;
    std::vector<float> wide_scores_;
    int next_scratch_ = 0;
    int n_gpu_ = 0, n_cpu_ = 0;
    int64_t n_shared_ = 0, n_finished_ = 0; // blocks, for the fault plan
    layer_event event_;                     // what was asked of the runtime
    layer_timing timing_;                   // how it went
    double begin_us_ = 0.0, route_begin_us_ = 0.0, launch_begin_us_ = 0.0, route_end_us_ = 0.0, finish_end_us_ = 0.0;
    double computed_inline_us_ = 0.0; // what a CPU as device computed within its launch
    double last_end_us_ = 0.0, gap_us_ = 0.0;
};

} // namespace hybrimoe
