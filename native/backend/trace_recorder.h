// Records of a live run, for docs/trace-format.md: routing, and in order every event that moved a decision. The
// computing thread gathers a pass of the model and hands it over whole through a ring; what finds no room is counted,
// not waited for.
#pragma once

#include "core/runtime.h"
#include "hybrimoe.h"
#include "trace_ring.h"

#include <atomic>
#include <string>
#include <vector>

namespace hybrimoe {

// Kinds of records, as in docs/trace-format.md; those below 64 are the core's (hm_event_type).
enum class trace_kind : int32_t {
    layer      = 0,
    complete   = 1,
    fail       = 2,
    prompt     = 3,
    limits     = 4,
    resize     = 5,
    costs      = 6,
    layer_done = 7,
    load       = 8,
    loaded     = 9,
    trial      = 10, // before the layer that it is part of
    step       = 64,
    transfer   = 65,
    measured   = 66,
    routed     = 67,
    phases     = 69,
    copied     = 70,
};

// When the phases of one block ended, microseconds of the instance's clock; each begins where the one before it ended.
struct block_times {
    double begin        = 0.0; // of the router
    double router_end   = 0.0; // then look-ahead and planning
    double launch_begin = 0.0;
    double launch_end   = 0.0; // then the CPU's experts
    double cpu_end      = 0.0;
    double wait_end     = 0.0; // for accelerators; then the merge
    double end          = 0.0;
    double gpu_end      = 0.0;   // of the accelerators' experts, which begin at launch_begin
    double gpu_busy     = 0.0;   // summed over accelerators
    bool gpu_is_known   = false; // measured; else what the cost model says
    double predicted = 0.0, predicted_cpu = 0.0, predicted_gpu = 0.0; // of the plan, from launch_begin on
    int n_cpu = 0, n_gpu = 0;                                         // experts
};

// All but pop() and the counts are for the computing thread.
class trace_recorder {
public:
    trace_recorder(size_t ring_bytes, bool with_scores, bool with_spans)
        : ring_(ring_bytes), with_scores_(with_scores), with_spans_(with_spans) {}

    bool is_on() const { return on_.load(std::memory_order_relaxed); }
    bool with_scores() const { return with_scores_; }
    bool with_spans() const { return with_spans_; }

    // A pass begins; the one before it is handed over.
    void begin_pass(int64_t n_tokens, double now_us);
    void commit();
    // Hands over what there is. Nothing is recorded any more.
    void stop();

    // What the runtime was told, or, not `planned`, would have been told if it planned this layer.
    void add_layer(const layer_event & event, int n_expert, double now_us, bool planned);
    void add_transfers(const decision & made);
    // Of the layer added last: device per expert (below 0: the CPU), and times.
    void add_devices(const std::vector<int32_t> & where);
    void add_measured(int layer, double cpu_us, double gpu_us, double wait_us, double now_us, bool planned);
    void add_phases(int layer, int64_t n_tokens, const block_times & times, bool planned);
    // A copy that has ended, with its own time on the link.
    void add_copied(int64_t id, double begin_us, double end_us, double bytes, double now_us);
    // An event without arrays; the fields mean what docs/trace-format.md says for its kind.
    void add(trace_kind kind, double now_us, int layer = 0, int64_t id = 0, int a = 0, int b = 0, int c = 0);
    // The cost section of a calibration, JSON.
    void add_costs(const std::string & json, double now_us);

    // Consumer; see trace_ring::pop. A message is a hybrimoe_trace_pass with its arrays.
    int64_t pop(uint8_t * out, size_t size) { return ring_.pop(out, size); }

    // Passes handed over and lost, and what recording cost the computing thread.
    int64_t n_passes() const { return n_passes_; }
    int64_t n_dropped() const { return n_dropped_; }
    double us_per_decode_pass() const { return n_decode_ == 0 ? 0.0 : 1e-3 * decode_ns_ / n_decode_; }
    double us_per_prefill_pass() const {
        const int64_t n = n_passes_ + n_dropped_ - n_decode_;
        return n == 0 ? 0.0 : 1e-3 * (all_ns_ - decode_ns_) / n;
    }

private:
    class timed;

    hybrimoe_trace_event & new_event(trace_kind kind, double now_us);
    void hand_over();
    template <class body> void gather(body run);

    trace_ring ring_;
    const bool with_scores_, with_spans_;
    std::atomic<bool> on_{true};

    // The pass at hand.
    std::vector<hybrimoe_trace_event> events_;
    std::vector<int32_t> ids_;
    std::vector<float> weights_, scores_, lookahead_;
    std::vector<int8_t> devices_;
    std::string text_;
    bool is_decode_    = false;
    bool is_lost_      = false; // no memory to gather it
    size_t last_layer_ = 0;     // first id of the layer added last
    int64_t pass_ns_   = 0;

    int64_t n_lost_   = 0; // since the last pass that was handed over
    int64_t n_passes_ = 0, n_dropped_ = 0, n_decode_ = 0;
    double all_ns_ = 0.0, decode_ns_ = 0.0;
};

} // namespace hybrimoe
