#include "handles.h"

#include <algorithm>

using namespace hybrimoe;

namespace {

template <class policy>
status make_online(const policy_table<policy> & table, const hm_policy & given, const model_shape & shape,
                   std::unique_ptr<policy> & out) {
    HYBRIMOE_TRY(make_from(table, &given, shape, out));
    const policy_entry<policy> * entry = nullptr;
    HYBRIMOE_TRY(find_entry(table, given.name, entry));
    if (entry->traits.oracle) {
        return status::fail(error_code::invalid_argument, "%s '%s' is an oracle: it cannot run live", table.kind,
                            given.name);
    }
    return {};
}

void export_decision(const decision & d, const model_shape & shape, hm_runtime & handle, hm_decision & out) {
    handle.placements.clear();
    handle.transfers.clear();
    for (const placement & p : d.plan.placements) {
        handle.placements.push_back(
            {p.expert, p.device, p.copied, p.start_us, p.end_us, p.copy_start_us, p.copy_end_us});
    }
    for (const transfer & t : d.transfers) {
        hm_transfer c    = {};
        c.id             = t.id;
        c.kind           = static_cast<int32_t>(t.kind);
        c.layer          = t.layer;
        c.expert         = t.expert;
        c.device         = t.device;
        c.slot           = t.slot;
        c.evicted_layer  = t.evicted < 0 ? -1 : shape.layer_of(t.evicted);
        c.evicted_expert = t.evicted < 0 ? -1 : shape.expert_of(t.evicted);
        c.bytes          = t.bytes;
        c.start_us       = t.start_us;
        c.end_us         = t.end_us;
        c.saved_us       = t.saved_us;
        handle.transfers.push_back(c);
    }
    out             = hm_decision();
    out.n_items     = static_cast<int32_t>(d.items.size());
    out.n_transfers = static_cast<int32_t>(d.transfers.size());
    out.placements  = handle.placements.data();
    out.slots       = d.slots.data();
    out.transfers   = handle.transfers.data();
    out.makespan_us = d.plan.makespan_us;
    out.cpu_end_us  = d.plan.cpu_end_us;
    out.dram_us     = d.plan.dram_us;
    out.n_hits      = d.n_hits;
    out.n_misses    = d.n_misses;
    out.n_late      = d.n_late;
    out.n_cpu       = d.plan.n_cpu;
    out.n_gpu       = d.plan.n_gpu;
    out.n_copies    = d.plan.n_copies;
    out.horizon     = d.horizon;
}

void fill_stats(const runtime & rt, hm_runtime_stats & out) {
    const runtime_stats & s = rt.stats();
    out                     = hm_runtime_stats();
    out.n_events            = s.n_events;
    out.n_cpu               = s.n_cpu;
    out.n_gpu               = s.n_gpu;
    out.n_hits              = s.n_hits;
    out.n_misses            = s.n_misses;
    out.n_late              = s.n_late;
    std::copy(s.n_transfers, s.n_transfers + 4, out.n_transfers);
    std::copy(s.bytes, s.bytes + 4, out.bytes);
    out.n_failed              = s.n_failed;
    out.prefetch_useful_bytes = s.prefetch_useful_bytes;
    out.prefetch_late_bytes   = s.prefetch_late_bytes;
    out.prefetch_wasted_bytes = s.prefetch_wasted_bytes;
    out.n_delayed_demands     = s.n_delayed_demands;
    out.stall_us              = s.stall_us;
    out.makespan_us           = s.makespan_us;
    out.n_prefetch_switches   = s.n_prefetch_switches;
    out.prefetch_on           = rt.prefetch_on();
    out.horizon               = rt.horizon();
    out.decision_hash         = s.decision_hash;
}

} // namespace

extern "C" {

int hm_runtime_create(const hm_runtime_config * config, const hm_costs * costs, hm_runtime ** out, char * message,
                      size_t message_size) {
    return guarded(message, message_size, [&]() -> status {
        if (!config || !costs || !out) {
            return null_argument("config, costs or out");
        }
        runtime_config c;
        HYBRIMOE_TRY(read_cache_config(&config->cache, c.cache));
        c.costs = costs->model;
        HYBRIMOE_TRY(make_online(eviction_policies(), config->eviction, c.cache.shape, c.eviction));
        HYBRIMOE_TRY(make_online(admission_policies(), config->admission, c.cache.shape, c.admission));
        HYBRIMOE_TRY(make_online(schedulers(), config->schedule, c.cache.shape, c.schedule));
        HYBRIMOE_TRY(make_online(prefetchers(), config->prefetch, c.cache.shape, c.prefetch));
        c.max_window_layers = config->max_window_layers;
        c.pay_back          = config->pay_back != 0;
        c.preload           = config->preload != 0;
        auto made           = std::make_unique<hm_runtime>();
        made->placements.reserve(static_cast<size_t>(c.cache.shape.n_expert));
        made->transfers.reserve(static_cast<size_t>(c.cache.shape.n_expert) + proposal_list::capacity);
        HYBRIMOE_TRY(runtime::create(std::move(c), made->rt));
        *out = made.release();
        return {};
    });
}

void hm_runtime_destroy(hm_runtime * runtime) {
    delete runtime;
}

int hm_runtime_on_layer(hm_runtime * runtime, const hm_layer_event * event, double now_us, hm_decision * out,
                        char * message, size_t message_size) {
    return guarded(message, message_size, [&]() -> status {
        if (!runtime || !event || !out) {
            return null_argument("runtime, event or out");
        }
        layer_event e;
        e.layer        = event->layer;
        e.n_rows       = event->n_rows;
        e.top_k        = event->top_k;
        e.ids          = event->ids;
        e.weights      = event->weights;
        e.scores       = event->scores;
        e.cpu_ready_us = event->cpu_ready_us;
        e.gap_us       = event->gap_us;
        e.scratch      = event->scratch != 0;
        std::copy(event->lookahead, event->lookahead + max_lookahead, e.lookahead);
        std::copy(event->gpu_ready_us, event->gpu_ready_us + max_devices, e.gpu_ready_us);
        const decision * d = nullptr;
        HYBRIMOE_TRY(runtime->rt->on_layer(e, now_us, d));
        export_decision(*d, runtime->rt->cache().shape(), *runtime, *out);
        return {};
    });
}

void hm_runtime_on_layer_done(hm_runtime * runtime) {
    if (runtime) {
        runtime->rt->on_layer_done();
    }
}

int hm_runtime_on_complete(hm_runtime * runtime, int64_t transfer_id, double now_us, char * message,
                           size_t message_size) {
    return guarded(message, message_size,
                   [&] { return runtime ? runtime->rt->on_complete(transfer_id, now_us) : null_argument("runtime"); });
}

int hm_runtime_on_fail(hm_runtime * runtime, int64_t transfer_id, double now_us, char * message, size_t message_size) {
    return guarded(message, message_size,
                   [&] { return runtime ? runtime->rt->on_fail(transfer_id, now_us) : null_argument("runtime"); });
}

void hm_runtime_begin_prompt(hm_runtime * runtime) {
    if (runtime) {
        runtime->rt->begin_prompt();
    }
}

void hm_runtime_set_limits(hm_runtime * runtime, int32_t prefetch, int32_t demand_copies, int32_t admission) {
    if (runtime) {
        runtime->rt->set_limits({prefetch != 0, demand_copies != 0, admission != 0});
    }
}

int hm_runtime_set_costs(hm_runtime * runtime, const hm_costs * costs, char * message, size_t message_size) {
    return guarded(message, message_size, [&] {
        return runtime && costs ? runtime->rt->set_costs(costs->model) : null_argument("runtime or costs");
    });
}

int hm_runtime_resize(hm_runtime * runtime, int32_t layer, int32_t device, int32_t n_slots, hm_slot_move * moves,
                      int32_t capacity, int32_t * n_moves, char * message, size_t message_size) {
    return guarded(message, message_size, [&]() -> status {
        if (!runtime) {
            return null_argument("runtime");
        }
        HYBRIMOE_TRY(runtime->rt->resize(layer, device, n_slots, runtime->moves));
        return copy_moves(runtime->rt->cache().shape(), runtime->moves, moves, capacity, n_moves);
    });
}

int hm_runtime_lookup(const hm_runtime * runtime, int32_t layer, int32_t expert, int32_t * state, int32_t * device,
                      int32_t * slot, char * message, size_t message_size) {
    return guarded(message, message_size, [&]() -> status {
        if (!runtime || !state || !device || !slot) {
            return null_argument("runtime, state, device or slot");
        }
        const model_shape & s = runtime->rt->cache().shape();
        if (layer < 0 || layer >= s.n_layers || expert < 0 || expert >= s.n_expert) {
            return status::fail(error_code::invalid_argument, "expert %d of layer %d is outside 0..%d of 0..%d", expert,
                                layer, s.n_expert - 1, s.n_layers - 1);
        }
        const residency at = runtime->rt->cache().lookup(layer, expert);
        *state             = static_cast<int32_t>(at.state);
        *device            = at.device;
        *slot              = at.slot;
        return {};
    });
}

int hm_runtime_warm(hm_runtime * runtime, int32_t layer, int32_t expert, int32_t device, int32_t * slot, char * message,
                    size_t message_size) {
    return guarded(message, message_size, [&]() -> status {
        if (!runtime) {
            return null_argument("runtime");
        }
        load_result loaded;
        HYBRIMOE_TRY(runtime->rt->cache().begin_load(layer, expert, device, false, loaded));
        if (slot) {
            *slot = loaded.slot;
        }
        return runtime->rt->cache().complete_load(layer, expert);
    });
}

void hm_runtime_get_stats(const hm_runtime * runtime, hm_runtime_stats * out) {
    fill_stats(*runtime->rt, *out);
}

void hm_runtime_get_cache_stats(const hm_runtime * runtime, hm_cache_stats * out) {
    const cache_stats & s = runtime->rt->cache().stats();
    *out = {s.n_queries,   s.n_hits,    s.n_misses,     s.n_late,          s.n_loads,          s.n_failed_loads,
            s.n_evictions, s.n_refused, s.n_prefetched, s.n_prefetch_used, s.n_prefetch_wasted};
}

} // extern "C"
