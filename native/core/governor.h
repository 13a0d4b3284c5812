// Keeps decisions right while the machine changes: follows the costs (cost_estimator), tries what is not used (trials),
// and compares with plain llama.cpp (guard). The engine and the closed loop (replay/closed_loop.h) drive this same
// object; like the runtime it has no clock, thread or I/O.
//
// One span counts for plan, prediction, observation, guard and floor: from the layer's input being complete on the
// device that made it to its result being usable by llama.cpp's next node. `overhead` is the part of it that does not
// depend on who computes what: input down, router, plan, launch calls, merge, result up.
//
// Use, on one thread:
//   governor.begin_pass();                       // before the first layer of a pass
//   governor.begin_layer(event);                 // sets what to try; costs may have moved (then costs() is new)
//   runtime.on_layer(event, now_us, decision);
//   governor.end_layer(event, decision, timing); // after the layer; timing.is_complete says whether it teaches
//   governor.on_copy(device, bytes, us, now_us); // after a copy has completed
//   governor.end_pass(is_decode, change);        // after the last layer
#pragma once

#include "calibration/cost_estimator.h"
#include "guard.h"
#include "runtime.h"
#include "trials.h"

#include <vector>

namespace hybrimoe {

struct governor_options {
    bool live  = true; // costs follow timings
    bool guard = true;
    trial_options trials;
    estimator_options estimator;
    guard_options levels;
};

// How one planned layer went, in microseconds.
struct layer_timing {
    bool is_complete    = true; // everything was computed where it was planned
    double span_us      = 0.0;
    double overhead_us  = 0.0;
    double cpu_us       = -1.0;   // the CPU's experts, from when the CPU was free for them; below 0: none or not known
    double cpu_begin_us = 0.0;    // when that was, on the clock of now_us
    double gpu_us[max_devices]{}; // from the launch on
    bool gpu_is_known[max_devices]{}; // false: no experts there, or nothing is known
    bool gpu_at_most[max_devices]{};  // it had ended by then; when is not known
    double now_us = 0.0;
};

class governor {
public:
    // Speculation and parallel clients decode several tokens in a pass; a bigger batch is a prompt's.
    static constexpr int64_t most_decode_tokens = 16;

    // Refuses a cost model that lacks a cost. `rt` must outlive the governor, and has the same costs.
    static status create(const cost_model & calibrated, const governor_options & options, runtime & rt, governor & out);

    void begin_pass();
    // True when the runtime has got new costs.
    bool begin_layer(layer_event & event);
    void end_layer(const layer_event & event, const decision & made, const layer_timing & timing);
    void on_copy(int device, double bytes, double us, double now_us);
    // True when the guard's level changed; the runtime has its new limits. Slots are the caller's to lay out
    // (allocation/whole_layers.h), and what that takes is told to on_refill().
    bool end_pass(bool is_decode, guard_change & change);
    void on_refill(double us) { guard_.on_refill(us); }

    // What the best plain placement would take for the pass that ended last, or for the one at hand: all experts on the
    // CPU, or as many whole layers on the accelerators as the cache's memory holds. An estimate, without our overhead.
    double floor_us() const { return floor_us_; }
    double overhead_us() const { return last_overhead_us_; }
    const cost_model & costs() const { return costs_; }
    const cost_estimator & estimator() const { return estimator_; }
    cost_estimator & estimator() { return estimator_; }
    const guard & level() const { return guard_; }
    const trials & tried() const { return trials_; }
    bool is_live() const { return options_.live; }
    // Costs that somebody else knows (the oracle of a simulation).
    status set_costs(const cost_model & costs);

private:
    struct plain_layer {
        double cpu_us = 0.0;
        double gpu_us[max_devices]{};
    };
    // What read the memory lately: CPU batches (device cpu_device) and copies.
    struct reading {
        int device      = cpu_device;
        double begin_us = 0.0, end_us = 0.0, bytes = 0.0;
        double asked = 0.0; // bytes per microsecond that it would have read alone
    };
    static constexpr size_t n_readings = 128;
    struct layer_sample { // what end_layer() was told
        bool is_new = false;
        layer_timing timing;
        reading cpu; // the CPU's batch, where it has one
        int layer = 0;
        std::vector<int32_t> loads[max_devices + 1]; // of the CPU's experts, then of each device's without copies
        bool is_tried = false;
        resource tried;
        double price_us = 0.0;
    };
    void keep(const reading & one);
    memory_share beside(const reading & own) const;
    void settle();
    double plain_us() const;
    double judged_us();

    governor_options options_;
    runtime * runtime_ = nullptr;
    cost_model costs_;
    cost_estimator estimator_;
    guard guard_;
    trials trials_;
    std::vector<plain_layer> plain_; // [n_layers], of the pass at hand
    struct planned_layer {
        double span_us, ratio; // ratio: over what was planned
        bool has_copies;       // it waited for some
    };
    std::vector<planned_layer> planned_; // of the pass at hand
    // Moving averages: the share of layers far slower than planned, and of the time that those with copies lost by it.
    double rare_ = 0.0, lost_in_copies_ = 0.0;
    layer_sample sample_;
    std::vector<reading> copies_; // that ended since settle()
    reading readings_[n_readings];
    size_t next_reading_ = 0;
    double link_end_us_[max_devices]{}; // of the last copy that ended
    int64_t n_changes_seen_ = 0;
    double pass_us_ = 0.0, overhead_us_ = 0.0, price_us_ = 0.0;
    double floor_us_ = 0.0, last_overhead_us_ = 0.0, last_pass_us_ = 0.0;
};

} // namespace hybrimoe
