// The composition: routing in, plan out. The engine and the simulator drive this same object; time and costs come in as
// arguments, so the same events give the same decisions, bit for bit.
#pragma once

#include "admission/admission_policy.h"
#include "expert_cache.h"
#include "prefetch/adaptive_horizon.h"
#include "prefetch/pay_back.h"
#include "prefetch/prefetcher.h"
#include "scheduling/scheduler.h"
#include "trials.h"

#include <memory>
#include <vector>

namespace hybrimoe {

// What the router of one layer said, and when the devices are free. Pointers last for the call only.
struct layer_event {
    int layer             = 0;
    int n_rows            = 1;
    int top_k             = 0;
    const int32_t * ids   = nullptr;          // [n_rows, top_k]
    const float * weights = nullptr;          // [n_rows, top_k] or null
    const float * scores  = nullptr;          // [n_rows, n_expert] or null
    const float * lookahead[max_lookahead]{}; // see prefetch_view

    double cpu_ready_us = 0.0; // from now
    double gpu_ready_us[max_devices]{};
    double gap_us = 0.0;   // from the end of this layer's experts to the next layer's event, as measured
    bool scratch  = false; // demanded copies may stream through scratch slots when none is free (prefill)

    trial_request trial; // one expert, or one copy, is given to a resource that the plan does not use
    const cost_model * calibrated = nullptr; // for trial.must_be_useful; may be null
};

enum class transfer_kind : uint8_t {
    demand,   // this layer waits for it; stays in the cache
    scratch,  // this layer waits for it; has no slot
    admit,    // a missed expert that the CPU computes now, copied in idle time for later
    prefetch, // speculative
};

struct transfer {
    int64_t id         = 0;
    transfer_kind kind = transfer_kind::demand;
    int layer = 0, expert = 0, device = 0;
    int slot        = -1; // index in its pool; -1: scratch
    int evicted     = -1; // key of the expert that loses the slot
    double bytes    = 0.0;
    double start_us = 0.0; // predicted, on the caller's clock
    double end_us   = 0.0;
    double saved_us = 0.0; // prefetch: predicted gain
};

// Valid until the next call to the runtime.
struct decision {
    layer_plan plan;
    std::vector<work_item> items;    // active experts, in order of first appearance
    std::vector<int> slots;          // per item: slot it is computed from; -1: the CPU or scratch
    std::vector<transfer> transfers; // to be issued, in this order per link
    double now_us = 0.0;
    int n_hits = 0, n_misses = 0, n_late = 0;
    int horizon = 0; // layers ahead that prefetch looked

    bool is_tried     = false; // the event's trial is part of the plan
    double untried_us = 0.0;   // makespan of the plan without it
    double refused_us = 0.0;   // what the event's trial would have taken longer, which is more than its budget
};

struct runtime_stats {
    int64_t n_events = 0, n_cpu = 0, n_gpu = 0, n_hits = 0, n_misses = 0, n_late = 0;
    int64_t n_transfers[4]       = {}; // per transfer_kind
    double bytes[4]              = {}; // issued, per transfer_kind
    int64_t n_failed             = 0;
    double prefetch_useful_bytes = 0.0, prefetch_late_bytes = 0.0, prefetch_wasted_bytes = 0.0;
    int64_t n_delayed_demands   = 0;   // demanded copies that found their link busy with an idle-time one
    double stall_us             = 0.0; // predicted waits for copies that came late
    double makespan_us          = 0.0; // predicted, summed
    int64_t n_prefetch_switches = 0;
    int64_t n_tried             = 0;                       // trials that were part of a plan
    uint64_t decision_hash      = 14695981039346656037ULL; // FNV-1a over every decision
};

// Steps of the guard, lightest first: no prefetch, no demanded copies, a frozen cache.
struct runtime_limits {
    bool prefetch      = true;
    bool demand_copies = true;
    bool admission     = true;
};

struct runtime_config {
    cache_config cache;
    cost_model costs;
    std::unique_ptr<eviction_policy> eviction;
    std::unique_ptr<admission_policy> admission;
    std::unique_ptr<scheduler> schedule;
    std::unique_ptr<prefetcher> prefetch;
    // Idle-time copies must end before the next layer begins. Larger than 1, and as long as a whole token went by
    // without any demanded copy, they may take so many layers: then there is none that they could delay.
    int max_window_layers = 1;
    bool pay_back         = true;  // switch prefetch off while it does not pay
    bool preload          = false; // start with experts 0.. resident
};

class runtime {
public:
    static status create(runtime_config config, std::unique_ptr<runtime> & out);

    // Plans and commits one layer. On error nothing has changed.
    status on_layer(const layer_event & event, double now_us, const decision *& out);
    status on_complete(int64_t transfer_id, double now_us);
    status on_fail(int64_t transfer_id, double now_us);
    // The layer has been computed: its experts may be evicted again. Implied by the next on_layer.
    void on_layer_done() { cache_.end_step(); }

    void begin_prompt();
    void set_limits(const runtime_limits & limits) { limits_ = limits; }
    const runtime_limits & limits() const { return limits_; }
    status set_costs(const cost_model & costs); // of the same layers and devices
    status resize(int layer, int device, int n_slots, std::vector<slot_move> & moves) {
        return cache_.resize(layer, device, n_slots, moves);
    }

    const expert_cache & cache() const { return cache_; }
    expert_cache & cache() { return cache_; }
    const cost_model & costs() const { return costs_; }
    const runtime_stats & stats() const { return stats_; }
    const std::vector<transfer> & in_flight() const { return in_flight_; }
    bool has_prefetch() const { return prefetch_->horizon() > 0; }
    bool prefetch_on() const { return limits_.prefetch && pay_back_.enabled(); }
    int horizon() const { return horizon_.value(); }

private:
    runtime(runtime_config && config, expert_cache && cache);

    status check(const layer_event & event, double now_us) const;
    void gather(const layer_event & event);
    void describe_items(const layer_event & event, double now_us);
    void note_outcomes(const layer_event & event);
    void commit_demands(const layer_event & event, double now_us);
    void leave_to_cpu(int index);
    void commit_prefetch(const layer_event & event, double now_us);
    void commit_admissions(const layer_event & event, double now_us);
    void order_slots(int layer, layer_problem & problem);
    void try_compute(const layer_event & event, const layer_problem & problem);
    void try_copy(const layer_event & event, double now_us);
    bool issue_idle(transfer_kind kind, int layer, int expert, int device, double saved_us, double now_us);
    bool issue(transfer_kind kind, int layer, int expert, int device, double saved_us, double now_us);
    void record(transfer t);
    void note_eviction(const load_result & loaded, bool by_prefetch);
    void open_window(const layer_event & event, double now_us);
    void reseed_horizon();
    void hash_decision();
    size_t find_transfer(int64_t id) const;
    int target_device(int layer, double now_us) const;

    model_shape shape_;
    cost_model costs_;
    expert_cache cache_;
    std::unique_ptr<admission_policy> admission_;
    std::unique_ptr<scheduler> schedule_;
    std::unique_ptr<prefetcher> prefetch_;
    int max_window_layers_;
    bool use_pay_back_;
    runtime_limits limits_;
    pay_back pay_back_;
    adaptive_horizon horizon_;
    runtime_stats stats_;

    // Reused from step to step; sized once.
    decision decision_;
    layer_plan tried_; // the plan with a trial, or the calibration's
    proposal_list proposals_;
    std::vector<transfer> in_flight_;
    std::vector<int32_t> active_, loads_, load_of_; // load_of_: [n_expert], zero between events
    std::vector<int64_t> pushed_out_;               // per key: layer steps until which a miss is prefetch's fault
    std::vector<int> device_of_layer_, copy_order_;
    std::vector<slot_offer> offers_;
    std::vector<int8_t> slot_order_; // devices of offers_
    router_step step_;

    int64_t next_id_        = 1;
    int64_t n_quiet_layers_ = 0; // layers since the last demanded copy
    double link_free_us_[max_devices];
    bool link_speculative_[max_devices]; // what keeps the link busy is an idle-time copy
    double window_end_us_ = 0.0;
    double spare_bytes_   = 0.0; // DRAM bytes that idle-time copies may read in this window
    double last_event_us_ = 0.0;
    double layer_us_      = 0.0;                                    // moving average from event to event
    double used_bytes_ = 0.0, wasted_bytes_ = 0.0, stall_us_ = 0.0; // since the last look of the horizon
};

} // namespace hybrimoe
