#include "expert_cache.h"

#include <algorithm>

namespace hybrimoe {

status expert_cache::create(const cache_config & config, std::unique_ptr<eviction_policy> policy, expert_cache & out) {
    const model_shape & s = config.shape;
    if (s.n_layers < 1 || s.n_layers > max_layers) {
        return status::fail(error_code::invalid_argument, "n_layers = %d is outside 1..%d", s.n_layers, max_layers);
    }
    if (s.n_expert < 1 || s.n_expert > max_experts) {
        return status::fail(error_code::invalid_argument, "n_expert = %d is outside 1..%d", s.n_expert, max_experts);
    }
    if (s.top_k < 1 || s.top_k > s.n_expert) {
        return status::fail(error_code::invalid_argument, "top_k = %d is outside 1..%d (experts)", s.top_k, s.n_expert);
    }
    if (config.n_devices < 0 || config.n_devices > max_devices) {
        return status::fail(error_code::invalid_argument, "n_devices = %d is outside 0..%d", config.n_devices,
                            max_devices);
    }
    const auto n_entries = static_cast<size_t>(config.n_devices) * static_cast<size_t>(s.n_layers);
    if (config.n_slots.size() != n_entries) {
        return status::fail(error_code::invalid_argument, "%zu slot counts given, must be %zu (devices x layers)",
                            config.n_slots.size(), n_entries);
    }
    if (!config.class_of_layer.empty() && config.class_of_layer.size() != static_cast<size_t>(s.n_layers)) {
        return status::fail(error_code::invalid_argument, "%zu layer classes given, must be %d",
                            config.class_of_layer.size(), s.n_layers);
    }
    for (const int n : config.n_slots) {
        if (n < 0 || n > s.n_expert) {
            return status::fail(error_code::invalid_argument, "%d slots for one layer is outside 0..%d (experts)", n,
                                s.n_expert);
        }
    }
    for (const int cls : config.class_of_layer) {
        if (cls < 0 || cls >= s.n_layers) {
            return status::fail(error_code::invalid_argument, "layer class %d is outside 0..%d", cls, s.n_layers - 1);
        }
    }

    expert_cache cache;
    cache.shape_      = s;
    cache.n_devices_  = config.n_devices;
    cache.policy_     = std::move(policy);
    cache.may_bypass_ = cache.policy_->may_bypass();
    cache.pool_of_.assign(n_entries, -1);
    for (int d = 0; d < config.n_devices; ++d) {
        std::vector<int> pool_of_class(static_cast<size_t>(s.n_layers), -1);
        for (int layer = 0; layer < s.n_layers; ++layer) {
            const auto entry = static_cast<size_t>(d * s.n_layers + layer);
            const auto n     = static_cast<size_t>(config.n_slots[entry]);
            const int cls    = config.class_of_layer.empty() ? 0 : config.class_of_layer[static_cast<size_t>(layer)];
            int & shared     = pool_of_class[static_cast<size_t>(cls)];
            if (config.pooled && shared >= 0) {
                pool & p = cache.pools_[static_cast<size_t>(shared)];
                p.slots.resize(p.slots.size() + n);
                ++p.n_layers_served;
                cache.pool_of_[entry] = shared;
                continue;
            }
            shared                = static_cast<int>(cache.pools_.size());
            cache.pool_of_[entry] = shared;
            cache.pools_.emplace_back();
            cache.pools_.back().device = d;
            cache.pools_.back().slots.resize(n);
        }
    }
    out = std::move(cache);
    out.reset(false);
    return {};
}

void expert_cache::reset(bool preload) {
    const auto n_keys = static_cast<size_t>(shape_.n_keys());
    where_.assign(n_keys, {});
    last_use_.assign(n_keys, 0);
    used_in_.assign(n_keys, 0);
    shield_.assign(n_keys, 0);
    n_steps_.assign(static_cast<size_t>(shape_.n_layers), 0);
    tick_ = step_id_ = 0;
    protected_from_  = 1;
    policy_->reset();
    for (size_t i = 0; i < pools_.size(); ++i) {
        std::fill(pools_[i].slots.begin(), pools_[i].slots.end(), slot());
        pools_[i].n_used = 0;
        policy_->on_pool_size(static_cast<int>(i), static_cast<int>(pools_[i].slots.size()));
    }
    if (preload) {
        load_result ignored;
        for (int expert = 0; expert < shape_.n_expert; ++expert) {
            for (int layer = 0; layer < shape_.n_layers; ++layer) {
                for (int d = 0; d < n_devices_; ++d) {
                    pool & p = pools_[static_cast<size_t>(pool_of(layer, d))];
                    if (static_cast<size_t>(p.n_used) < p.slots.size() &&
                        begin_load(layer, expert, d, false, ignored).ok()) {
                        complete_load(layer, expert);
                        break;
                    }
                }
            }
        }
    }
    stats_ = {};
}

status expert_cache::check_expert(int layer, int expert) const {
    if (layer < 0 || layer >= shape_.n_layers) {
        return status::fail(error_code::invalid_argument, "layer %d is outside 0..%d", layer, shape_.n_layers - 1);
    }
    if (expert < 0 || expert >= shape_.n_expert) {
        return status::fail(error_code::invalid_argument, "expert %d is outside 0..%d", expert, shape_.n_expert - 1);
    }
    return {};
}

status expert_cache::begin_step(const router_step & step) {
    for (int i = 0; i < step.n_experts; ++i) {
        HYBRIMOE_TRY(check_expert(step.layer, step.experts[i]));
    }
    HYBRIMOE_TRY(policy_->check(step));
    const int64_t id = ++step_id_;
    protected_from_  = id;
    ++n_steps_[static_cast<size_t>(step.layer)];
    stats_.n_queries += step.n_experts;
    policy_->on_step(step);
    for (int i = 0; i < step.n_experts; ++i) {
        const int key   = shape_.key(step.layer, step.experts[i]);
        const auto k    = static_cast<size_t>(key);
        const where & w = where_[k];
        last_use_[k]    = ++tick_;
        used_in_[k]     = id;
        if (w.pool < 0) {
            ++stats_.n_misses;
            continue;
        }
        slot & s = pools_[static_cast<size_t>(w.pool)].slots[static_cast<size_t>(w.slot)];
        if (s.speculative) {
            s.speculative = false;
            ++stats_.n_prefetch_used;
        }
        if (s.state == slot_state::loading) {
            ++stats_.n_misses;
            ++stats_.n_late;
        } else {
            ++stats_.n_hits;
            policy_->on_hit(w.pool, key);
        }
    }
    return {};
}

// Nothing reads or writes the slot.
bool expert_cache::may_leave(const slot & s) const {
    // An expert that may be bypassed may also leave within its own step; only oracles bypass, and they run no kernels.
    return s.state == slot_state::resident && (used_in_[static_cast<size_t>(s.key)] < protected_from_ || may_bypass_);
}

// ... and no prediction keeps the expert.
bool expert_cache::may_go(const slot & s) const {
    if (!may_leave(s)) {
        return false;
    }
    const auto key = static_cast<size_t>(s.key);
    return shield_[key] == 0 || n_steps_[static_cast<size_t>(shape_.layer_of(s.key))] >= shield_[key];
}

int expert_cache::find_victim(const pool & p) const {
    if (!policy_->may_evict()) {
        return -1;
    }
    slot_offer best;
    const double * values = policy_->values();
    for (size_t i = 0; i < p.slots.size(); ++i) {
        const slot & s = p.slots[i];
        if (s.state != slot_state::resident) {
            continue;
        }
        const slot_offer offer = offer_of(p, static_cast<int>(i), values);
        // Last, because it is the dearest question and few slots get this far.
        if ((best.slot < 0 || offer < best) && may_go(s)) {
            best = offer;
        }
    }
    return best.slot;
}

bool slot_offer::operator<(const slot_offer & other) const {
    if (is_free != other.is_free || is_dud != other.is_dud) {
        return is_free != other.is_free ? is_free : is_dud;
    }
    if (value != other.value) {
        return value < other.value;
    }
    return last_use != other.last_use ? last_use < other.last_use : key < other.key;
}

slot_offer expert_cache::offer_of(const pool & p, int index, const double * values) const {
    const slot & s = p.slots[static_cast<size_t>(index)];
    slot_offer out;
    out.slot    = index;
    out.device  = p.device;
    out.key     = s.key;
    out.is_free = s.key < 0;
    if (!out.is_free) {
        out.is_dud   = s.speculative && n_steps_[static_cast<size_t>(shape_.layer_of(s.key))] > s.loaded_step;
        out.value    = values ? values[s.key] : policy_->keep_value(s.key);
        out.last_use = last_use_[static_cast<size_t>(s.key)];
    }
    return out;
}

void expert_cache::offers(int layer, int n_wanted, std::vector<slot_offer> & out) const {
    out.clear();
    const double * values = policy_->values();
    const bool may_evict  = policy_->may_evict();
    for (int d = 0; d < n_devices_; ++d) {
        const pool & p   = pools_[static_cast<size_t>(pool_of(layer, d))];
        const auto first = static_cast<std::ptrdiff_t>(out.size());
        for (size_t i = 0; i < p.slots.size(); ++i) {
            if (p.slots[i].state == slot_state::absent || (may_evict && may_go(p.slots[i]))) {
                out.push_back(offer_of(p, static_cast<int>(i), values));
            }
        }
        const auto n = static_cast<std::ptrdiff_t>(out.size()) - first;
        if (n > n_wanted) {
            std::nth_element(out.begin() + first, out.begin() + first + n_wanted, out.end());
            out.resize(static_cast<size_t>(first) + static_cast<size_t>(n_wanted));
        }
    }
    std::sort(out.begin(), out.end());
}

bool expert_cache::first_offer(int layer, int device, slot_offer & out) const {
    const pool & p = pools_[static_cast<size_t>(pool_of(layer, device))];
    int index      = -1;
    if (static_cast<size_t>(p.n_used) < p.slots.size()) {
        index = 0;
        while (p.slots[static_cast<size_t>(index)].state != slot_state::absent) {
            ++index;
        }
    } else {
        index = find_victim(p);
    }
    if (index < 0) {
        return false;
    }
    out = offer_of(p, index, policy_->values());
    return true;
}

void expert_cache::vacate(int pool_id, int slot_index, load_result * out) {
    pool & p = pools_[static_cast<size_t>(pool_id)];
    slot & s = p.slots[static_cast<size_t>(slot_index)];
    if (out) {
        out->evicted_key    = s.key;
        out->evicted_unused = s.speculative;
    }
    if (s.speculative) {
        ++stats_.n_prefetch_wasted;
    }
    ++stats_.n_evictions;
    policy_->on_evict(pool_id, s.key);
    where_[static_cast<size_t>(s.key)] = {};
    s                                  = slot();
    --p.n_used;
}

status expert_cache::begin_load(int layer, int expert, int device, bool speculative, load_result & out) {
    HYBRIMOE_TRY(check_expert(layer, expert));
    if (device < 0 || device >= n_devices_) {
        return status::fail(error_code::invalid_argument, "device %d is outside 0..%d", device, n_devices_ - 1);
    }
    const int key = shape_.key(layer, expert);
    const auto k  = static_cast<size_t>(key);
    if (where_[k].pool >= 0) {
        return status::fail(error_code::out_of_order, "expert %d of layer %d is already resident or loading", expert,
                            layer);
    }
    const int pool_id = pool_of(layer, device);
    pool & p          = pools_[static_cast<size_t>(pool_id)];
    out               = load_result();
    int index         = -1;
    const bool full   = static_cast<size_t>(p.n_used) == p.slots.size();
    if (!full || n_available(layer, device, 1) > 0) {
        policy_->on_miss(pool_id, key);
    }
    if (!full) {
        index = 0;
        while (p.slots[static_cast<size_t>(index)].state != slot_state::absent) {
            ++index;
        }
    } else {
        index = find_victim(p);
        if (index >= 0 && may_bypass_ &&
            policy_->keep_value(key) <= policy_->keep_value(p.slots[static_cast<size_t>(index)].key)) {
            index = -1;
        }
        if (index < 0) {
            ++stats_.n_refused;
            return status::fail(error_code::no_slot, "layer %d, device %d: none of %zu slots may be evicted", layer,
                                device, p.slots.size());
        }
        vacate(pool_id, index, &out);
    }
    slot & s      = p.slots[static_cast<size_t>(index)];
    s.key         = key;
    s.state       = slot_state::loading;
    s.speculative = speculative;
    s.loaded_step = n_steps_[static_cast<size_t>(layer)];
    where_[k]     = {static_cast<int16_t>(pool_id), index};
    ++p.n_used;
    ++stats_.n_loads;
    stats_.n_prefetched += speculative;
    out.slot = index;
    return {};
}

status expert_cache::find_loading(int layer, int expert, const char * what, slot *& out) {
    HYBRIMOE_TRY(check_expert(layer, expert));
    const where & w = where_[static_cast<size_t>(shape_.key(layer, expert))];
    if (w.pool >= 0) {
        out = &pools_[static_cast<size_t>(w.pool)].slots[static_cast<size_t>(w.slot)];
    }
    if (w.pool < 0 || out->state != slot_state::loading) {
        return status::fail(error_code::out_of_order, "%s: expert %d of layer %d is not loading", what, expert, layer);
    }
    return {};
}

status expert_cache::complete_load(int layer, int expert) {
    slot * s = nullptr;
    HYBRIMOE_TRY(find_loading(layer, expert, "complete", s));
    s->state = slot_state::resident;
    policy_->on_admit(where_[static_cast<size_t>(s->key)].pool, s->key);
    return {};
}

status expert_cache::fail_load(int layer, int expert) {
    slot * s = nullptr;
    HYBRIMOE_TRY(find_loading(layer, expert, "fail", s));
    where & w = where_[static_cast<size_t>(s->key)];
    --pools_[static_cast<size_t>(w.pool)].n_used;
    w  = {};
    *s = slot();
    ++stats_.n_failed_loads;
    return {};
}

status expert_cache::pin(int layer, int expert) {
    HYBRIMOE_TRY(check_expert(layer, expert));
    const where & w = where_[static_cast<size_t>(shape_.key(layer, expert))];
    slot * s        = w.pool < 0 ? nullptr : &pools_[static_cast<size_t>(w.pool)].slots[static_cast<size_t>(w.slot)];
    if (!s || s->state != slot_state::resident) {
        return status::fail(error_code::out_of_order, "pin: expert %d of layer %d is not resident and unpinned", expert,
                            layer);
    }
    s->state = slot_state::pinned;
    return {};
}

status expert_cache::unpin(int layer, int expert) {
    HYBRIMOE_TRY(check_expert(layer, expert));
    const where & w = where_[static_cast<size_t>(shape_.key(layer, expert))];
    slot * s        = w.pool < 0 ? nullptr : &pools_[static_cast<size_t>(w.pool)].slots[static_cast<size_t>(w.slot)];
    if (!s || s->state != slot_state::pinned) {
        return status::fail(error_code::out_of_order, "unpin: expert %d of layer %d is not pinned", expert, layer);
    }
    s->state = slot_state::resident;
    return {};
}

void expert_cache::shield(int layer, int expert) {
    shield_[static_cast<size_t>(shape_.key(layer, expert))] = n_steps_[static_cast<size_t>(layer)] + 1;
}

int expert_cache::n_available(int layer, int device, int n_wanted) const {
    const pool & p = pools_[static_cast<size_t>(pool_of(layer, device))];
    int n          = static_cast<int>(p.slots.size()) - p.n_used;
    if (!policy_->may_evict()) {
        return std::min(n, n_wanted);
    }
    for (size_t i = 0; i < p.slots.size() && n < n_wanted; ++i) {
        n += may_go(p.slots[i]);
    }
    return std::min(n, n_wanted);
}

int expert_cache::n_slots(int layer, int device) const {
    return static_cast<int>(pools_[static_cast<size_t>(pool_of(layer, device))].slots.size());
}

int expert_cache::next_victim(int layer, int device) const {
    const pool & p = pools_[static_cast<size_t>(pool_of(layer, device))];
    const int i    = find_victim(p);
    return i < 0 ? -1 : p.slots[static_cast<size_t>(i)].key;
}

status expert_cache::resize(int layer, int device, int n_slots, std::vector<slot_move> & moves) {
    HYBRIMOE_TRY(check_expert(layer, 0));
    if (device < 0 || device >= n_devices_) {
        return status::fail(error_code::invalid_argument, "device %d is outside 0..%d", device, n_devices_ - 1);
    }
    const int pool_id = pool_of(layer, device);
    pool & p          = pools_[static_cast<size_t>(pool_id)];
    const int n_max   = p.n_layers_served * shape_.n_expert;
    if (n_slots < 0 || n_slots > n_max) {
        return status::fail(error_code::invalid_argument, "%d slots is outside 0..%d (experts of the pool)", n_slots,
                            n_max);
    }
    int n_kept = 0; // those that may not go
    for (size_t i = 0; i < p.slots.size(); ++i) {
        const slot & s = p.slots[i];
        n_kept += s.state != slot_state::absent && !may_leave(s);
        if (static_cast<int>(i) >= n_slots &&
            (s.state == slot_state::loading ||
             (s.key >= 0 && used_in_[static_cast<size_t>(s.key)] >= protected_from_))) {
            return status::fail(error_code::no_slot, "slot %zu is in use: shrinking to %d slots must wait", i, n_slots);
        }
    }
    if (n_kept > n_slots) {
        return status::fail(error_code::no_slot, "%d slots are pinned or in use: the pool cannot shrink to %d", n_kept,
                            n_slots);
    }
    moves.clear();
    for (const slot & s : p.slots) { // fewer slots outrank predictions
        if (s.key >= 0 && p.n_used > n_slots) {
            shield_[static_cast<size_t>(s.key)] = 0;
        }
    }
    while (p.n_used > n_slots) {
        int victim = find_victim(p);
        for (size_t i = 0; victim < 0; ++i) { // a policy that never evicts still has to shrink
            victim = may_go(p.slots[i]) ? static_cast<int>(i) : -1;
        }
        vacate(pool_id, victim, nullptr);
    }
    int to = 0;
    for (size_t from = static_cast<size_t>(n_slots); from < p.slots.size(); ++from) {
        if (p.slots[from].state == slot_state::absent) {
            continue;
        }
        while (p.slots[static_cast<size_t>(to)].state != slot_state::absent) {
            ++to;
        }
        p.slots[static_cast<size_t>(to)]      = p.slots[from];
        p.slots[from]                         = slot();
        const int key                         = p.slots[static_cast<size_t>(to)].key;
        where_[static_cast<size_t>(key)].slot = to;
        moves.push_back({key, static_cast<int>(from), to});
    }
    p.slots.resize(static_cast<size_t>(n_slots));
    policy_->on_pool_size(pool_id, n_slots);
    return {};
}

status expert_cache::verify() const {
    int n_placed = 0;
    for (size_t i = 0; i < pools_.size(); ++i) {
        const pool & p = pools_[i];
        int n_used     = 0;
        for (size_t k = 0; k < p.slots.size(); ++k) {
            const slot & s = p.slots[k];
            if ((s.key >= 0) != (s.state != slot_state::absent)) {
                return status::fail(error_code::internal, "pool %zu slot %zu: key %d does not match its state", i, k,
                                    s.key);
            }
            if (s.key < 0) {
                continue;
            }
            ++n_used;
            const where & w = where_[static_cast<size_t>(s.key)];
            if (w.pool != static_cast<int>(i) || w.slot != static_cast<int>(k) ||
                pool_of(shape_.layer_of(s.key), p.device) != static_cast<int>(i)) {
                return status::fail(error_code::internal, "pool %zu slot %zu: key %d is elsewhere", i, k, s.key);
            }
        }
        if (n_used != p.n_used) {
            return status::fail(error_code::internal, "pool %zu: %d used, counted %d", i, n_used, p.n_used);
        }
        n_placed += n_used;
    }
    for (const where & w : where_) {
        n_placed -= w.pool >= 0;
    }
    if (n_placed != 0) {
        return status::fail(error_code::internal, "%d experts have no slot", -n_placed);
    }
    return {};
}

} // namespace hybrimoe
