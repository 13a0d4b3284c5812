// The recording of a live run: an observer that the other parts tell what happens, and the only one that knows the
// recorder. Owns the recorder and the phases of the block at hand. Called by the computing thread, under the instance's
// mutex where stop() and describe() may come from another; feed() takes none. Where nothing is recorded, every call
// returns at once.
#pragma once

#include "core/runtime.h"
#include "hybrid/common.h"
#include "kernel_executor.h"
#include "observer/trace_feed.h"
#include "trace_recorder.h"

#include <memory>
#include <string>
#include <vector>

namespace hybrimoe {

class fleet;

// A planned block when the accelerators are done. Microseconds of the instance's clock.
struct done_block {
    int layer = 0;
    int n_cpu = 0, n_gpu = 0;
    const decision * planned             = nullptr;
    const std::vector<int32_t> * devices = nullptr; // per expert; below 0: the CPU
    double launch_begin_us = 0.0, launch_end_us = 0.0;
    double wait_begin_us = 0.0, end_us = 0.0;
};

class recording {
public:
    explicit recording(const common & shared);

    bool is_on() const { return recorder_ != nullptr && recorder_->is_on(); }
    bool wants_scores() const { return is_on() && recorder_->with_scores(); }

    void on_pass(int64_t n_tokens); // begins
    // A block begins; its router and its CPU's experts ended.
    void on_block();
    void on_router_end();
    void on_cpu_end();
    void on_kernels(const kernel_executor::result & done);
    // A block that the runtime was not asked about: while the layers are learnt, without accelerators, and while one is
    // set aside.
    void on_routed(const layer_event & event);
    void on_planned(const layer_event & event, const decision & made, double now_us);
    void on_done(const done_block & done, const fleet & devices, const cost_model & costs);
    // `is_last`: of its pass.
    void on_block_end(int layer, int64_t n_tokens, bool was_planned, bool is_last);

    // What else moves decisions.
    void on_costs(const cost_model & costs);
    void on_prompt();
    void on_limits(const runtime_limits & limits);
    void on_resize(int layer, int device, int n_slots);
    void on_load(int layer, int expert, int device);
    void on_loaded(int layer, int expert, bool ok);
    void on_complete(int64_t transfer, double now_us);
    void on_fail(int64_t transfer, double now_us);
    void on_copied(const copy_result & result, double now_us);

    // The costs that the runtime is made with.
    void keep_costs(const cost_model & costs);
    // See instance_view.
    trace_feed * feed() const { return feed_.get(); }
    bool stop() const;
    // `rt` may be null.
    std::string describe(bool is_set_up, const runtime * rt, const fleet & devices) const;

private:
    bool has_spans() const { return is_on() && recorder_->with_spans(); }
    void note(trace_kind kind, int layer = 0, int a = 0, int b = 0, int c = 0);
    void note_gpu_times(const done_block & done, const fleet & devices, const cost_model & costs);

    const common & shared_;
    std::unique_ptr<trace_recorder> recorder_; // null: nothing is recorded
    std::unique_ptr<trace_feed> feed_;         // what has been recorded; null likewise
    std::string costs_;                        // those the runtime was made with
    double unplanned_us_ = 0.0;                // when a block that was not planned was routed
    block_times times_;                        // of the block at hand, where spans are recorded
};

} // namespace hybrimoe
