#include "../replay/cache_replay.h"
#include "../replay/clock_replay.h"
#include "../replay/recall.h"
#include "handles.h"

#include <algorithm>
#include <limits>

using namespace hybrimoe;

namespace hybrimoe {

status read_trace(const hm_trace * t, replay_trace & out) {
    if (!t || !t->experts || !t->prompt_offsets) {
        return null_argument("trace, its experts or its prompt_offsets");
    }
    if (t->n_layers < 1 || t->n_layers > max_layers || t->n_expert < 1 || t->n_expert > max_experts || t->top_k < 1 ||
        t->top_k > t->n_expert) {
        return status::fail(error_code::invalid_argument,
                            "trace of %d layers, %d experts, top-%d: must be 1..%d, 1..%d and 1..n_expert", t->n_layers,
                            t->n_expert, t->top_k, max_layers, max_experts);
    }
    out.shape          = {t->n_layers, t->n_expert, t->top_k};
    out.experts        = t->experts;
    out.weights        = t->weights;
    out.scores         = t->scores;
    out.n_tokens       = t->n_tokens;
    out.prompt_offsets = t->prompt_offsets;
    out.n_prompts      = t->n_prompts;
    return {};
}

status same_shape(const model_shape & a, const model_shape & b) {
    if (a.n_layers != b.n_layers || a.n_expert != b.n_expert || a.top_k != b.top_k) {
        return status::fail(error_code::invalid_argument,
                            "the trace has %d layers, %d experts, top-%d, the cache %d, %d and %d", a.n_layers,
                            a.n_expert, a.top_k, b.n_layers, b.n_expert, b.top_k);
    }
    return {};
}

} // namespace hybrimoe

namespace {

// Arrays of one recorded layer event, bounds checked.
status read_layer_event(const hm_event & e, const hm_event_arrays & arrays, const model_shape & shape,
                        layer_event & out) {
    const int64_t n = static_cast<int64_t>(e.n_rows) * e.a;
    if (e.n_rows < 1 || e.a < 1 || e.offset < 0 || e.offset + n > arrays.n_ids) {
        return status::fail(error_code::invalid_argument, "ids of the event lie outside the array of %lld",
                            static_cast<long long>(arrays.n_ids));
    }
    out.layer        = e.layer;
    out.n_rows       = e.n_rows;
    out.top_k        = e.a;
    out.scratch      = e.b != 0;
    out.ids          = arrays.ids + e.offset;
    out.weights      = arrays.weights ? arrays.weights + e.offset : nullptr;
    out.cpu_ready_us = e.cpu_ready_us;
    out.gap_us       = e.gap_us;
    std::copy(e.gpu_ready_us, e.gpu_ready_us + max_devices, out.gpu_ready_us);
    if (e.scores_offset >= 0) {
        if (!arrays.scores || e.scores_offset + static_cast<int64_t>(e.n_rows) * shape.n_expert > arrays.n_scores) {
            return status::fail(error_code::invalid_argument, "scores of the event lie outside the array of %lld",
                                static_cast<long long>(arrays.n_scores));
        }
        out.scores = arrays.scores + e.scores_offset;
    }
    if (e.lookahead_offset >= 0) {
        if (!arrays.lookahead ||
            e.lookahead_offset + static_cast<int64_t>(max_lookahead) * shape.n_expert > arrays.n_lookahead) {
            return status::fail(error_code::invalid_argument, "look-ahead of the event lies outside the array of %lld",
                                static_cast<long long>(arrays.n_lookahead));
        }
        for (int d = 0; d < max_lookahead; ++d) {
            const bool known = e.c == 0 || (e.c >> d & 1) != 0;
            out.lookahead[d] = known ? arrays.lookahead + e.lookahead_offset + d * shape.n_expert : nullptr;
        }
    }
    return {};
}

status replay_event(hm_runtime & handle, const hm_event & e, const hm_event_arrays & arrays,
                    const hm_costs * const * costs, int32_t n_costs) {
    runtime & rt = *handle.rt;
    switch (e.type) {
    case HM_EVENT_LAYER: {
        layer_event event;
        const decision * ignored = nullptr;
        HYBRIMOE_TRY(read_layer_event(e, arrays, rt.cache().shape(), event));
        event.trial  = handle.trial;
        handle.trial = {};
        return rt.on_layer(event, e.now_us, ignored);
    }
    case HM_EVENT_COMPLETE:
        return rt.on_complete(e.id, e.now_us);
    case HM_EVENT_FAIL:
        return rt.on_fail(e.id, e.now_us);
    case HM_EVENT_PROMPT:
        rt.begin_prompt();
        return {};
    case HM_EVENT_LIMITS:
        rt.set_limits({e.a != 0, e.b != 0, e.c != 0});
        return {};
    case HM_EVENT_RESIZE:
        return rt.resize(e.layer, e.a, e.b, handle.moves);
    case HM_EVENT_COSTS:
        if (e.a < 0 || e.a >= n_costs || !costs || !costs[e.a]) {
            return status::fail(error_code::invalid_argument, "cost model %d is outside 0..%d", e.a, n_costs - 1);
        }
        return rt.set_costs(costs[e.a]->model);
    case HM_EVENT_LAYER_DONE:
        rt.on_layer_done();
        return {};
    case HM_EVENT_LOAD: {
        load_result ignored;
        return rt.cache().begin_load(e.layer, e.a, e.b, false, ignored);
    }
    case HM_EVENT_LOADED:
        return e.b != 0 ? rt.cache().complete_load(e.layer, e.a) : rt.cache().fail_load(e.layer, e.a);
    case HM_EVENT_TRIAL: { // what was tried has happened, whatever it was expected to cost
        const bool on_cpu = e.a == static_cast<int32_t>(resource_kind::cpu);
        if (e.a < 0 || e.a > static_cast<int32_t>(resource_kind::link) ||
            (!on_cpu && (e.b < 0 || e.b >= rt.costs().n_devices()))) {
            return status::fail(error_code::invalid_argument, "trial: there is no resource %d on device %d", e.a, e.b);
        }
        handle.trial.wanted    = true;
        handle.trial.what      = {static_cast<resource_kind>(e.a), on_cpu ? cpu_device : e.b};
        handle.trial.budget_us = std::numeric_limits<double>::infinity();
        return {};
    }
    default:
        return status::fail(error_code::invalid_argument, "event type %d is outside 0..%d", e.type,
                            HM_N_EVENT_TYPES - 1);
    }
}

} // namespace

extern "C" {

int hm_replay_cache(const hm_trace * given, const hm_replay_options * options, const hm_cache_config * config,
                    const hm_policy * eviction, const hm_policy * admission, const hm_costs * costs,
                    hm_replay_result * out, int64_t * hits_per_layer, int64_t * queries_per_layer, char * message,
                    size_t message_size) {
    return guarded(message, message_size, [&]() -> status {
        if (!options || !out) {
            return null_argument("options or out");
        }
        replay_trace trace;
        cache_config read;
        HYBRIMOE_TRY(read_trace(given, trace));
        HYBRIMOE_TRY(read_cache_config(config, read));
        HYBRIMOE_TRY(same_shape(trace.shape, read.shape));
        std::unique_ptr<eviction_policy> policy;
        std::unique_ptr<admission_policy> gate;
        const policy_entry<eviction_policy> * eviction_entry   = nullptr;
        const policy_entry<admission_policy> * admission_entry = nullptr;
        HYBRIMOE_TRY(make_from(eviction_policies(), eviction, read.shape, policy));
        HYBRIMOE_TRY(make_from(admission_policies(), admission, read.shape, gate));
        HYBRIMOE_TRY(find_entry(eviction_policies(), eviction->name, eviction_entry));
        HYBRIMOE_TRY(find_entry(admission_policies(), admission->name, admission_entry));
        if (admission_entry->traits.needs_costs && !costs) {
            return status::fail(error_code::missing_cost, "admission '%s' needs a cost model", admission->name);
        }
        if (costs) {
            HYBRIMOE_TRY(costs->model.check());
            if (costs->model.n_layers() != read.shape.n_layers || costs->model.n_devices() != read.n_devices) {
                return status::fail(
                    error_code::invalid_argument, "the cost model has %d layers and %d devices, the cache %d and %d",
                    costs->model.n_layers(), costs->model.n_devices(), read.shape.n_layers, read.n_devices);
            }
            gate->set_costs(&costs->model);
        }
        expert_cache cache;
        HYBRIMOE_TRY(expert_cache::create(read, std::move(policy), cache));
        replay_options o;
        o.cold     = options->cold != 0;
        o.preload  = options->preload != 0;
        o.resident = options->resident;
        replay_result result;
        HYBRIMOE_TRY(replay_cache(trace, o, cache, *gate, eviction_entry->traits.oracle, result));
        *out = {result.n_queries, result.n_hits, result.n_loads, result.n_evictions};
        if (hits_per_layer) {
            std::copy(result.hits_per_layer.begin(), result.hits_per_layer.end(), hits_per_layer);
        }
        if (queries_per_layer) {
            std::copy(result.queries_per_layer.begin(), result.queries_per_layer.end(), queries_per_layer);
        }
        return {};
    });
}

int hm_replay_recall(const hm_trace * given, const hm_policy * prefetch, int32_t distance, int64_t n_warm,
                     const int32_t * n_best, int32_t n, double * recall, char * message, size_t message_size) {
    return guarded(message, message_size, [&]() -> status {
        if (!n_best || !recall || n < 1) {
            return null_argument("n_best or recall");
        }
        replay_trace trace;
        HYBRIMOE_TRY(read_trace(given, trace));
        std::unique_ptr<prefetcher> policy;
        HYBRIMOE_TRY(make_from(prefetchers(), prefetch, trace.shape, policy));
        return replay_recall(trace, *policy, distance, n_warm, n_best, n, recall);
    });
}

int hm_runtime_replay_events(hm_runtime * runtime, const hm_event * events, int64_t n_events,
                             const hm_event_arrays * arrays, const hm_costs * const * costs, int32_t n_costs,
                             int64_t * n_done, char * message, size_t message_size) {
    return guarded(message, message_size, [&]() -> status {
        if (!runtime || !events || !arrays || !n_done || (arrays->n_ids > 0 && !arrays->ids)) {
            return null_argument("runtime, events, arrays or n_done");
        }
        for (*n_done = 0; *n_done < n_events; ++*n_done) {
            HYBRIMOE_TRY(replay_event(*runtime, events[*n_done], *arrays, costs, n_costs));
        }
        return {};
    });
}

int hm_runtime_replay_clock(hm_runtime * runtime, const hm_trace * given, const hm_clock_options * options,
                            hm_clock_layer * records, int64_t capacity, hm_clock_result * out, char * message,
                            size_t message_size) {
    return guarded(message, message_size, [&]() -> status {
        if (!runtime || !options || !out) {
            return null_argument("runtime, options or out");
        }
        replay_trace trace;
        HYBRIMOE_TRY(read_trace(given, trace));
        HYBRIMOE_TRY(same_shape(trace.shape, runtime->rt->cache().shape()));
        clock_options o;
        o.step_offsets = options->step_offsets;
        o.n_steps      = options->n_steps;
        o.gap_us       = options->gap_us;
        o.shared_us    = options->shared_us;
        o.scratch      = options->scratch != 0;
        o.lookahead    = options->lookahead;
        std::vector<clock_layer> rows(records ? static_cast<size_t>(std::max<int64_t>(0, capacity)) : 0);
        clock_result result;
        HYBRIMOE_TRY(replay_clock(trace, o, *runtime->rt, records ? rows.data() : nullptr, capacity, result));
        const auto n = static_cast<size_t>(std::min<int64_t>(result.n_layers_run, static_cast<int64_t>(rows.size())));
        for (size_t i = 0; i < n; ++i) {
            const clock_layer & r = rows[i];
            records[i] = {r.step,     r.layer,        r.n_rows,   r.n_hits,      r.n_misses, r.n_cpu,  r.n_gpu,
                          r.n_copies, r.n_prefetched, r.start_us, r.makespan_us, r.cpu_us,   r.gpu_us, r.link_us};
        }
        *out = {result.total_us,    result.experts_us,   result.cpu_busy_us,
                result.gpu_busy_us, result.link_busy_us, result.n_layers_run};
        return {};
    });
}

} // extern "C"
