/* C interface of the policy core: the only thing that Python (or any other language) sees of it.
 *
 * Conventions
 * - A function that can fail returns an hm_error code; 0 is success. On failure a message that names the value and its
 *   range is written to `message` (at most message_size bytes, always terminated; may be NULL with size 0) and nothing
 *   has changed.
 * - Times are microseconds, rates bytes per microsecond (1 GB/s = 1,000). Devices are accelerators, counted from 0;
 *   HM_CPU (-1) is the CPU. Layers are MoE layers, counted from 0.
 * - Arrays are row-major; shapes stand in brackets. The library keeps no pointer that it is given.
 * - Handles may be used from any thread, one thread at a time.
 */
#ifndef HYBRIMOE_CORE_H
#define HYBRIMOE_CORE_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define HM_API __declspec(dllexport)
#else
#define HM_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define HM_CORE_API_VERSION 1
#define HM_CPU (-1)
#define HM_MAX_DEVICES 8
#define HM_MAX_LOOKAHEAD 3
#define HM_MAX_EXPERTS 1024

typedef enum hm_error {
    HM_OK               = 0,
    HM_INVALID_ARGUMENT = 1,
    HM_UNKNOWN_NAME     = 2,
    HM_OUT_OF_ORDER     = 3,
    HM_MISSING_COST     = 4,
    HM_NO_SLOT          = 5,
    HM_MISSING_SCORES   = 6,
    HM_OUT_OF_MEMORY    = 7,
    HM_INTERNAL         = 8
} hm_error;

HM_API int hm_core_api_version(void);

/* ---- policies describe themselves ---------------------------------------------------------------------------- */

typedef enum hm_kind { HM_SCHEDULER, HM_EVICTION, HM_ADMISSION, HM_PREFETCH, HM_ALLOCATION, HM_N_KINDS } hm_kind;

typedef struct hm_policy_info {
    const char * name;
    const char * doc;    /* one sentence */
    const char * source; /* paper section or repository; "" for a textbook policy */
    int32_t needs_scores, oracle, needs_costs;
    int32_t n_params;
} hm_policy_info;

typedef struct hm_param_info {
    const char * name;
    const char * doc;
    double default_value, min_value, max_value;
    int32_t integer;
} hm_param_info;

HM_API const char * hm_kind_name(int32_t kind);
HM_API int32_t hm_policy_count(int32_t kind);
HM_API int hm_policy_describe(int32_t kind, int32_t index, hm_policy_info * out);
HM_API int hm_policy_param(int32_t kind, int32_t index, int32_t param, hm_param_info * out);

typedef struct hm_param {
    const char * name;
    double value;
} hm_param;

/* A policy by name, with the parameters that differ from their defaults. */
typedef struct hm_policy {
    const char * name;
    const hm_param * params; /* [n_params] */
    int32_t n_params;
} hm_policy;

/* ---- cost model ---------------------------------------------------------------------------------------------- */

typedef struct hm_costs hm_costs;

/* n_points = 0: fixed_us + per_token_us x tokens; else linear between (n_tokens, us) points. */
typedef struct hm_curve {
    double fixed_us, per_token_us;
    int32_t n_points;
    const double * n_tokens;
    const double * us;
} hm_curve;

HM_API int hm_costs_create(int32_t n_layers, int32_t n_classes, int32_t n_devices, hm_costs ** out, char * message,
                           size_t message_size);
HM_API void hm_costs_destroy(hm_costs * costs);
HM_API int hm_costs_set_layer_class(hm_costs * costs, int32_t layer, int32_t cls, char * message, size_t message_size);
HM_API int hm_costs_set_bytes(hm_costs * costs, int32_t cls, double bytes, char * message, size_t message_size);
HM_API int hm_costs_set_cpu(hm_costs * costs, int32_t cls, const hm_curve * curve, double first_us, char * message,
                            size_t message_size);
HM_API int hm_costs_set_gpu(hm_costs * costs, int32_t cls, int32_t device, const hm_curve * curve, char * message,
                            size_t message_size);
HM_API int hm_costs_set_link(hm_costs * costs, int32_t device, double latency_us, double bytes_per_us, char * message,
                             size_t message_size);
HM_API int hm_costs_set_step(hm_costs * costs, int32_t device, double step_us, char * message, size_t message_size);
HM_API int hm_costs_set_dram(hm_costs * costs, double bytes_per_us, char * message, size_t message_size);
/* HM_MISSING_COST, naming the first cost that was never set. */
HM_API int hm_costs_check(const hm_costs * costs, char * message, size_t message_size);
/* Reading back; NaN for what is unknown or out of range. */
HM_API int hm_costs_link(const hm_costs * costs, int32_t device, double * latency_us, double * bytes_per_us,
                         char * message, size_t message_size);
HM_API int hm_costs_expert_us(const hm_costs * costs, int32_t layer, int32_t device, double n_tokens, int32_t first,
                              double * us, char * message, size_t message_size);
HM_API double hm_costs_step_us(const hm_costs * costs, int32_t device);
HM_API double hm_costs_dram(const hm_costs * costs);

/* ---- calibration: fits ---------------------------------------------------------------------------------------- */

#define HM_MAX_FIT_PARAMS 3

typedef struct hm_fit {
    double params[HM_MAX_FIT_PARAMS];
    double median_error, p90_error; /* of |y / prediction - 1| */
    int32_t n_outliers;
} hm_fit;

/* Robust fit of y = sum_i x[i] params[i] with params >= 0 on relative residuals (Huber). */
HM_API int hm_fit_costs(const double * x /* [n_samples, n_params] */, const double * y /* [n_samples] */,
                        int32_t n_samples, int32_t n_params, hm_fit * out, char * message, size_t message_size);

/* ---- scheduling one layer ------------------------------------------------------------------------------------- */

typedef struct hm_work_item {
    int32_t expert, n_tokens;
    int32_t device;   /* that holds or is loading it; HM_CPU: a miss */
    int32_t loading;  /* its copy is under way and ends at ready_us */
    int32_t may_copy; /* a miss that may be copied */
    double ready_us;
} hm_work_item;

typedef struct hm_problem {
    int32_t layer, n_items;
    const hm_work_item * items;
    double cpu_ready_us;
    double gpu_ready_us[HM_MAX_DEVICES];
    double link_ready_us[HM_MAX_DEVICES];
    int32_t max_copies[HM_MAX_DEVICES];
} hm_problem;

typedef struct hm_placement {
    int32_t expert, device, copied;
    double start_us, end_us, copy_start_us, copy_end_us;
} hm_placement;

typedef struct hm_plan {
    int32_t n_placements;      /* in the order of the items */
    hm_placement * placements; /* room for n_items, given by the caller */
    double makespan_us, cpu_end_us, dram_us, cpu_bytes, copy_bytes;
    double gpu_end_us[HM_MAX_DEVICES];
    double link_end_us[HM_MAX_DEVICES];
    int32_t n_cpu, n_gpu, n_copies;
} hm_plan;

typedef struct hm_scheduler hm_scheduler;

HM_API int hm_scheduler_create(const hm_policy * policy, hm_scheduler ** out, char * message, size_t message_size);
HM_API void hm_scheduler_destroy(hm_scheduler * scheduler);
HM_API int hm_scheduler_plan(const hm_scheduler * scheduler, const hm_costs * costs, const hm_problem * problem,
                             hm_plan * out, char * message, size_t message_size);

/* ---- expert cache ------------------------------------------------------------------------------------------------ */

typedef enum hm_slot_state { HM_ABSENT, HM_LOADING, HM_RESIDENT, HM_PINNED } hm_slot_state;

typedef struct hm_cache_config {
    int32_t n_layers, n_expert, top_k, n_devices;
    int32_t pooled;                 /* one pool per device and class instead of one per layer */
    const int32_t * n_slots;        /* [n_devices, n_layers]; a pool gets the sum over its layers */
    const int32_t * class_of_layer; /* [n_layers] or NULL: one class */
} hm_cache_config;

typedef struct hm_cache_stats {
    int64_t n_queries, n_hits, n_misses, n_late, n_loads, n_failed_loads, n_evictions, n_refused;
    int64_t n_prefetched, n_prefetch_used, n_prefetch_wasted;
} hm_cache_stats;

typedef struct hm_step {
    int32_t layer, n_rows, top_k;
    const int32_t * ids;   /* [n_rows, top_k] */
    const float * weights; /* [n_rows, top_k] or NULL */
    const float * scores;  /* [n_rows, n_expert] or NULL */
} hm_step;

typedef struct hm_slot_move {
    int32_t layer, expert, from_slot, to_slot;
} hm_slot_move;

typedef struct hm_cache hm_cache;

HM_API int hm_cache_create(const hm_cache_config * config, const hm_policy * eviction, hm_cache ** out, char * message,
                           size_t message_size);
HM_API void hm_cache_destroy(hm_cache * cache);
HM_API int hm_cache_lookup(const hm_cache * cache, int32_t layer, int32_t expert, int32_t * state, int32_t * device,
                           int32_t * slot, char * message, size_t message_size);
HM_API int hm_cache_begin_step(hm_cache * cache, const hm_step * step, char * message, size_t message_size);
HM_API void hm_cache_end_step(hm_cache * cache);
HM_API void hm_cache_begin_prompt(hm_cache * cache);
/* evicted_* are -1 when a free slot was taken. */
HM_API int hm_cache_begin_load(hm_cache * cache, int32_t layer, int32_t expert, int32_t device, int32_t speculative,
                               int32_t * slot, int32_t * evicted_layer, int32_t * evicted_expert, char * message,
                               size_t message_size);
HM_API int hm_cache_complete_load(hm_cache * cache, int32_t layer, int32_t expert, char * message, size_t message_size);
HM_API int hm_cache_fail_load(hm_cache * cache, int32_t layer, int32_t expert, char * message, size_t message_size);
HM_API int hm_cache_pin(hm_cache * cache, int32_t layer, int32_t expert, int32_t pinned, char * message,
                        size_t message_size);
/* Moves are to be carried out in order; at most `capacity` are written, n_moves is their true number. */
HM_API int hm_cache_resize(hm_cache * cache, int32_t layer, int32_t device, int32_t n_slots, hm_slot_move * moves,
                           int32_t capacity, int32_t * n_moves, char * message, size_t message_size);
HM_API void hm_cache_get_stats(const hm_cache * cache, hm_cache_stats * out);
HM_API int hm_cache_verify(const hm_cache * cache, char * message, size_t message_size);

/* ---- slot allocation -----------------------------------------------------------------------------------------------
 */

HM_API int hm_allocate_slots(const hm_policy * policy, int32_t n_layers, int32_t n_expert, int32_t n_total,
                             const double * demand /* [n_layers] or NULL */, int32_t * n_slots /* [n_layers] */,
                             char * message, size_t message_size);

/* ---- replay of routing traces
 * ---------------------------------------------------------------------------------------- */

typedef struct hm_trace {
    int32_t n_layers, n_expert, top_k;
    int64_t n_tokens, n_prompts;
    const int32_t * experts;        /* [n_tokens, n_layers, top_k]; -1: the layer did not run */
    const float * weights;          /* the same shape, or NULL */
    const float * scores;           /* [n_tokens, n_layers, n_expert], or NULL */
    const int64_t * prompt_offsets; /* [n_prompts + 1] */
} hm_trace;

typedef struct hm_replay_options {
    int32_t cold;             /* every prompt from a cold cache and fresh statistics */
    int32_t preload;          /* caches start with experts 0.. */
    const uint8_t * resident; /* [n_layers, n_expert] start with these instead; NULL: as preload says */
} hm_replay_options;

typedef struct hm_replay_result {
    int64_t n_queries, n_hits, n_loads, n_evictions;
} hm_replay_result;

/* Event-atomic replay of one eviction policy. costs may be NULL unless admission needs them. */
HM_API int hm_replay_cache(const hm_trace * trace, const hm_replay_options * options, const hm_cache_config * config,
                           const hm_policy * eviction, const hm_policy * admission, const hm_costs * costs,
                           hm_replay_result * out, int64_t * hits_per_layer /* [n_layers] or NULL */,
                           int64_t * queries_per_layer /* [n_layers] or NULL */, char * message, size_t message_size);

/* Recall of a prefetcher's scores: share of the experts used by layer l + distance among the n_best[i] best predicted
 * at layer l. The first n_warm tokens are learned from, but not counted. */
HM_API int hm_replay_recall(const hm_trace * trace, const hm_policy * prefetch, int32_t distance, int64_t n_warm,
                            const int32_t * n_best, int32_t n, double * recall /* [n] */, char * message,
                            size_t message_size);

/* ---- runtime
 * ------------------------------------------------------------------------------------------------------------ */

typedef struct hm_runtime hm_runtime;

typedef struct hm_runtime_config {
    hm_cache_config cache;
    hm_policy eviction, admission, schedule, prefetch;
    int32_t max_window_layers; /* 1: an idle-time copy never delays a demanded one */
    int32_t pay_back;          /* switch prefetch off while it does not pay */
    int32_t preload;           /* start with experts 0.. resident */
} hm_runtime_config;

typedef struct hm_layer_event {
    int32_t layer, n_rows, top_k;
    int32_t scratch;                           /* demanded copies may stream through scratch slots */
    const int32_t * ids;                       /* [n_rows, top_k] */
    const float * weights;                     /* [n_rows, top_k] or NULL */
    const float * scores;                      /* [n_rows, n_expert] or NULL */
    const float * lookahead[HM_MAX_LOOKAHEAD]; /* [n_expert] summed over the rows, or NULL */
    double cpu_ready_us;
    double gpu_ready_us[HM_MAX_DEVICES];
    double gap_us;
} hm_layer_event;

typedef enum hm_transfer_kind { HM_DEMAND, HM_SCRATCH, HM_ADMIT, HM_SPECULATIVE } hm_transfer_kind;

typedef struct hm_transfer {
    int64_t id;
    int32_t kind, layer, expert, device;
    int32_t slot;                          /* -1: scratch */
    int32_t evicted_layer, evicted_expert; /* -1: the slot was free */
    double bytes, start_us, end_us, saved_us;
} hm_transfer;

/* Pointers are valid until the next call with the same runtime. */
typedef struct hm_decision {
    int32_t n_items, n_transfers;
    const hm_placement * placements; /* [n_items], experts in order of first appearance */
    const int32_t * slots;           /* [n_items] slot computed from; -1: CPU or scratch */
    const hm_transfer * transfers;   /* [n_transfers] to be issued, in this order per link */
    double makespan_us, cpu_end_us, dram_us;
    int32_t n_hits, n_misses, n_late, n_cpu, n_gpu, n_copies, horizon;
} hm_decision;

typedef struct hm_runtime_stats {
    int64_t n_events, n_cpu, n_gpu, n_hits, n_misses, n_late;
    int64_t n_transfers[4]; /* per hm_transfer_kind */
    double bytes[4];
    int64_t n_failed;
    double prefetch_useful_bytes, prefetch_late_bytes, prefetch_wasted_bytes;
    int64_t n_delayed_demands;
    double stall_us, makespan_us;
    int64_t n_prefetch_switches;
    int32_t prefetch_on, horizon;
    uint64_t decision_hash; /* over all decisions: equal hashes, equal decisions */
} hm_runtime_stats;

HM_API int hm_runtime_create(const hm_runtime_config * config, const hm_costs * costs, hm_runtime ** out,
                             char * message, size_t message_size);
HM_API void hm_runtime_destroy(hm_runtime * runtime);
HM_API int hm_runtime_on_layer(hm_runtime * runtime, const hm_layer_event * event, double now_us, hm_decision * out,
                               char * message, size_t message_size);
HM_API void hm_runtime_on_layer_done(hm_runtime * runtime);
HM_API int hm_runtime_on_complete(hm_runtime * runtime, int64_t transfer_id, double now_us, char * message,
                                  size_t message_size);
HM_API int hm_runtime_on_fail(hm_runtime * runtime, int64_t transfer_id, double now_us, char * message,
                              size_t message_size);
HM_API void hm_runtime_begin_prompt(hm_runtime * runtime);
HM_API void hm_runtime_set_limits(hm_runtime * runtime, int32_t prefetch, int32_t demand_copies, int32_t admission);
HM_API int hm_runtime_set_costs(hm_runtime * runtime, const hm_costs * costs, char * message, size_t message_size);
HM_API int hm_runtime_resize(hm_runtime * runtime, int32_t layer, int32_t device, int32_t n_slots, hm_slot_move * moves,
                             int32_t capacity, int32_t * n_moves, char * message, size_t message_size);
HM_API int hm_runtime_lookup(const hm_runtime * runtime, int32_t layer, int32_t expert, int32_t * state,
                             int32_t * device, int32_t * slot, char * message, size_t message_size);
HM_API int hm_runtime_warm(hm_runtime * runtime, int32_t layer, int32_t expert, int32_t device, int32_t * slot,
                           char * message, size_t message_size);
HM_API void hm_runtime_get_stats(const hm_runtime * runtime, hm_runtime_stats * out);
HM_API void hm_runtime_get_cache_stats(const hm_runtime * runtime, hm_cache_stats * out);

/* A recorded run, replayed in one call: every event that moved a decision, in order. */
typedef enum hm_event_type {
    HM_EVENT_LAYER,    /* layer, n_rows, a = top_k, b = scratch, c: bit d - 1 set where look-ahead at distance d was
                          known (0: at all, if any); arrays at `offset` (in rows x top_k) */
    HM_EVENT_COMPLETE, /* id */
    HM_EVENT_FAIL,     /* id */
    HM_EVENT_PROMPT,
    HM_EVENT_LIMITS, /* a: prefetch, b: demanded copies, c: admission */
    HM_EVENT_RESIZE, /* layer, a: device, b: slots */
    HM_EVENT_COSTS,  /* a: index into `costs` */
    HM_EVENT_LAYER_DONE,
    HM_EVENT_LOAD,   /* layer, a: expert, b: device: a load that no plan asked for begins (a warm start) */
    HM_EVENT_LOADED, /* layer, a: expert, b: 0 if it failed */
    HM_EVENT_TRIAL,  /* layer, a: kind of resource (0 CPU, 1 GPU, 2 link), b: device: tried with the next layer */
    HM_N_EVENT_TYPES
} hm_event_type;

typedef struct hm_event {
    int32_t type, layer, n_rows, a, b, c;
    int64_t id;
    int64_t offset;           /* of the first id in event_arrays.ids */
    int64_t scores_offset;    /* of the first score, -1: none */
    int64_t lookahead_offset; /* of the first look-ahead score [HM_MAX_LOOKAHEAD, n_expert], -1: none */
    double now_us, cpu_ready_us, gap_us;
    double gpu_ready_us[HM_MAX_DEVICES];
} hm_event;

typedef struct hm_event_arrays {
    const int32_t * ids;
    int64_t n_ids;
    const float * weights; /* as ids, or NULL */
    const float * scores;
    int64_t n_scores;
    const float * lookahead;
    int64_t n_lookahead;
} hm_event_arrays;

/* Stops at the first event that fails; *n_done is the number that succeeded. */
HM_API int hm_runtime_replay_events(hm_runtime * runtime, const hm_event * events, int64_t n_events,
                                    const hm_event_arrays * arrays, const hm_costs * const * costs, int32_t n_costs,
                                    int64_t * n_done, char * message, size_t message_size);

typedef struct hm_clock_options {
    const int64_t * step_offsets; /* [n_steps + 1] tokens of each step; several tokens: prefill */
    int64_t n_steps;
    double gap_us;    /* attention and all else between two MoE layers */
    double shared_us; /* shared experts, first on device 0 */
    int32_t scratch;
    const float * lookahead; /* [n_tokens, n_layers, HM_MAX_LOOKAHEAD, n_expert] or NULL */
} hm_clock_options;

typedef struct hm_clock_layer {
    int64_t step;
    int32_t layer, n_rows, n_hits, n_misses, n_cpu, n_gpu, n_copies, n_prefetched;
    double start_us, makespan_us, cpu_us, gpu_us, link_us;
} hm_clock_layer;

typedef struct hm_clock_result {
    double total_us, experts_us, cpu_busy_us, gpu_busy_us, link_busy_us;
    int64_t n_layers_run;
} hm_clock_result;

/* Drives a fresh runtime over a trace on a virtual clock. All times are simulated. */
HM_API int hm_runtime_replay_clock(hm_runtime * runtime, const hm_trace * trace, const hm_clock_options * options,
                                   hm_clock_layer * records, int64_t capacity, hm_clock_result * out, char * message,
                                   size_t message_size);

/* What is true of a machine from one token on. */
typedef struct hm_machine_phase {
    int64_t from_token;
    const hm_costs * costs;
    double noise;         /* standard deviation of the logarithm of every time */
    double outlier_share; /* of all times that take outlier_factor times as long */
    double outlier_factor;
    int32_t waits_every_layers; /* an accelerator's batch waits in each so-manyth layer; 0: never */
    double waits_us;
} hm_machine_phase;

typedef struct hm_loop_options {
    const hm_machine_phase * phases; /* [n_phases], the first one from token 0 on */
    int32_t n_phases;
    int64_t n_tokens; /* the trace is repeated until there are so many */
    double gap_us;
    double overhead_us; /* per layer, of what no plan changes */
    uint64_t seed;
    int32_t live, guard, trials; /* 0: costs follow no timings; no guard; nothing is tried */
    int32_t is_told;             /* the runtime is told each phase's costs: the oracle */
} hm_loop_options;

typedef struct hm_loop_token {
    double us, cpu_only_us, whole_layers_us; /* of the MoE layers; the same by the two plain placements */
    double trying_us;                        /* of `us`: trials, and slots filled anew */
    int32_t n_trials, n_gpu, n_copies;
    int32_t level; /* the guard's, after the token: 0 full .. 4 static layers */
    /* What is believed over what is true, after the token: times of one expert, or of a byte under the ceiling. */
    double believed_cpu, believed_gpu, believed_link, believed_dram;
} hm_loop_token;

/* A fresh runtime decides by the costs that it was made with and learns; a virtual machine executes at the true ones.
 */
HM_API int hm_runtime_closed_loop(hm_runtime * runtime, const hm_trace * trace, const hm_loop_options * options,
                                  hm_loop_token * tokens /* [n_tokens] */, char * message, size_t message_size);

#ifdef __cplusplus
}
#endif

#endif
