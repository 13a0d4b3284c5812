#include "handles.h"

#include <algorithm>

namespace hybrimoe {

status read_cache_config(const hm_cache_config * c, cache_config & out) {
    if (!c || (c->n_devices > 0 && !c->n_slots)) {
        return null_argument("cache config or its n_slots");
    }
    if (c->n_layers < 1 || c->n_layers > max_layers || c->n_devices < 0 || c->n_devices > max_devices) {
        return status::fail(error_code::invalid_argument, "%d layers on %d devices, must be 1..%d on 0..%d",
                            c->n_layers, c->n_devices, max_layers, max_devices);
    }
    out           = cache_config();
    out.shape     = {c->n_layers, c->n_expert, c->top_k};
    out.n_devices = c->n_devices;
    out.pooled    = c->pooled != 0;
    out.n_slots.assign(c->n_slots, c->n_slots + static_cast<size_t>(c->n_devices) * static_cast<size_t>(c->n_layers));
    if (c->class_of_layer) {
        out.class_of_layer.assign(c->class_of_layer, c->class_of_layer + c->n_layers);
    }
    // Checked before any policy sees it: policies size their tables by the shape.
    if (c->n_expert < 1 || c->n_expert > max_experts) {
        return status::fail(error_code::invalid_argument, "n_expert = %d is outside 1..%d", c->n_expert, max_experts);
    }
    if (c->top_k < 1 || c->top_k > c->n_expert) {
        return status::fail(error_code::invalid_argument, "top_k = %d is outside 1..%d (experts)", c->top_k,
                            c->n_expert);
    }
    return {};
}

status copy_moves(const model_shape & shape, const std::vector<slot_move> & moves, hm_slot_move * out, int32_t capacity,
                  int32_t * n_moves) {
    for (size_t i = 0; out && i < moves.size() && static_cast<int32_t>(i) < capacity; ++i) {
        out[i] = {shape.layer_of(moves[i].key), shape.expert_of(moves[i].key), moves[i].from_slot, moves[i].to_slot};
    }
    if (n_moves) {
        *n_moves = static_cast<int32_t>(moves.size());
    }
    return {};
}

} // namespace hybrimoe

using namespace hybrimoe;

namespace {

status gather(const hm_step & s, const model_shape & shape, hm_gathered_step & buffers, router_step & out) {
    if (s.layer < 0 || s.layer >= shape.n_layers) {
        return status::fail(error_code::invalid_argument, "layer %d is outside 0..%d", s.layer, shape.n_layers - 1);
    }
    if (s.n_rows < 1 || s.top_k < 1 || s.top_k > shape.n_expert || !s.ids) {
        return status::fail(error_code::invalid_argument, "%d tokens of top-%d, must be at least 1 of 1..%d", s.n_rows,
                            s.top_k, shape.n_expert);
    }
    const size_t n = static_cast<size_t>(s.n_rows) * static_cast<size_t>(s.top_k);
    for (size_t i = 0; i < n; ++i) {
        if (s.ids[i] < 0 || s.ids[i] >= shape.n_expert) {
            return status::fail(error_code::invalid_argument, "expert %d is outside 0..%d", s.ids[i],
                                shape.n_expert - 1);
        }
    }
    buffers.active.clear();
    buffers.loads.clear();
    buffers.load_of.assign(static_cast<size_t>(shape.n_expert), 0);
    for (size_t i = 0; i < n; ++i) {
        if (buffers.load_of[static_cast<size_t>(s.ids[i])]++ == 0) {
            buffers.active.push_back(s.ids[i]);
        }
    }
    for (const int32_t e : buffers.active) {
        buffers.loads.push_back(buffers.load_of[static_cast<size_t>(e)]);
    }
    out           = router_step();
    out.layer     = s.layer;
    out.experts   = buffers.active.data();
    out.n_tokens  = buffers.loads.data();
    out.n_experts = static_cast<int>(buffers.active.size());
    out.n_rows    = s.n_rows;
    out.top_k     = s.top_k;
    out.ids       = s.ids;
    out.weights   = s.weights;
    out.scores    = s.scores;
    return {};
}

status check_expert(const expert_cache & cache, int32_t layer, int32_t expert) {
    const model_shape & s = cache.shape();
    if (layer < 0 || layer >= s.n_layers || expert < 0 || expert >= s.n_expert) {
        return status::fail(error_code::invalid_argument, "expert %d of layer %d is outside 0..%d of 0..%d", expert,
                            layer, s.n_expert - 1, s.n_layers - 1);
    }
    return {};
}

} // namespace

extern "C" {

int hm_cache_create(const hm_cache_config * config, const hm_policy * eviction, hm_cache ** out, char * message,
                    size_t message_size) {
    return guarded(message, message_size, [&]() -> status {
        if (!out) {
            return null_argument("out");
        }
        cache_config read;
        HYBRIMOE_TRY(read_cache_config(config, read));
        std::unique_ptr<eviction_policy> policy;
        HYBRIMOE_TRY(make_from(eviction_policies(), eviction, read.shape, policy));
        auto made = std::make_unique<hm_cache>();
        HYBRIMOE_TRY(expert_cache::create(read, std::move(policy), made->cache));
        *out = made.release();
        return {};
    });
}

void hm_cache_destroy(hm_cache * cache) {
    delete cache;
}

int hm_cache_lookup(const hm_cache * cache, int32_t layer, int32_t expert, int32_t * state, int32_t * device,
                    int32_t * slot, char * message, size_t message_size) {
    return guarded(message, message_size, [&]() -> status {
        if (!cache) {
            return null_argument("cache");
        }
        HYBRIMOE_TRY(check_expert(cache->cache, layer, expert));
        const residency at = cache->cache.lookup(layer, expert);
        if (state) {
            *state = static_cast<int32_t>(at.state);
        }
        if (device) {
            *device = at.device;
        }
        if (slot) {
            *slot = at.slot;
        }
        return {};
    });
}

int hm_cache_begin_step(hm_cache * cache, const hm_step * step, char * message, size_t message_size) {
    return guarded(message, message_size, [&]() -> status {
        if (!cache || !step) {
            return null_argument("cache or step");
        }
        router_step gathered;
        HYBRIMOE_TRY(gather(*step, cache->cache.shape(), cache->step, gathered));
        return cache->cache.begin_step(gathered);
    });
}

void hm_cache_end_step(hm_cache * cache) {
    if (cache) {
        cache->cache.end_step();
    }
}

void hm_cache_begin_prompt(hm_cache * cache) {
    if (cache) {
        cache->cache.begin_prompt();
    }
}

int hm_cache_begin_load(hm_cache * cache, int32_t layer, int32_t expert, int32_t device, int32_t speculative,
                        int32_t * slot, int32_t * evicted_layer, int32_t * evicted_expert, char * message,
                        size_t message_size) {
    return guarded(message, message_size, [&]() -> status {
        if (!cache) {
            return null_argument("cache");
        }
        load_result loaded;
        HYBRIMOE_TRY(cache->cache.begin_load(layer, expert, device, speculative != 0, loaded));
        const model_shape & s = cache->cache.shape();
        if (slot) {
            *slot = loaded.slot;
        }
        if (evicted_layer) {
            *evicted_layer = loaded.evicted_key < 0 ? -1 : s.layer_of(loaded.evicted_key);
        }
        if (evicted_expert) {
            *evicted_expert = loaded.evicted_key < 0 ? -1 : s.expert_of(loaded.evicted_key);
        }
        return {};
    });
}

int hm_cache_complete_load(hm_cache * cache, int32_t layer, int32_t expert, char * message, size_t message_size) {
    return guarded(message, message_size,
                   [&] { return cache ? cache->cache.complete_load(layer, expert) : null_argument("cache"); });
}

int hm_cache_fail_load(hm_cache * cache, int32_t layer, int32_t expert, char * message, size_t message_size) {
    return guarded(message, message_size,
                   [&] { return cache ? cache->cache.fail_load(layer, expert) : null_argument("cache"); });
}

int hm_cache_pin(hm_cache * cache, int32_t layer, int32_t expert, int32_t pinned, char * message, size_t message_size) {
    return guarded(message, message_size, [&] {
        return !cache   ? null_argument("cache")
               : pinned ? cache->cache.pin(layer, expert)
                        : cache->cache.unpin(layer, expert);
    });
}

int hm_cache_resize(hm_cache * cache, int32_t layer, int32_t device, int32_t n_slots, hm_slot_move * moves,
                    int32_t capacity, int32_t * n_moves, char * message, size_t message_size) {
    return guarded(message, message_size, [&]() -> status {
        if (!cache) {
            return null_argument("cache");
        }
        HYBRIMOE_TRY(cache->cache.resize(layer, device, n_slots, cache->moves));
        return copy_moves(cache->cache.shape(), cache->moves, moves, capacity, n_moves);
    });
}

void hm_cache_get_stats(const hm_cache * cache, hm_cache_stats * out) {
    const cache_stats & s = cache->cache.stats();
    *out = {s.n_queries,   s.n_hits,    s.n_misses,     s.n_late,          s.n_loads,          s.n_failed_loads,
            s.n_evictions, s.n_refused, s.n_prefetched, s.n_prefetch_used, s.n_prefetch_wasted};
}

int hm_cache_verify(const hm_cache * cache, char * message, size_t message_size) {
    return leave(cache ? cache->cache.verify() : null_argument("cache"), message, message_size);
}

} // extern "C"
