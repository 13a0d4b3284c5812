// hybrid_dispatch: from the first pass to the first plan, and changes of the caches' size.
#include "hybrid/cost_source.h"
#include "hybrid/hybrid_dispatch.h"
#include "hybrid/policy_text.h"
#include "hybrid/state_file.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

namespace hybrimoe {

namespace {

double gib(double bytes) {
    return bytes / (1 << 30);
}

// Ids of copies that no plan has asked for.
int64_t fill_id(int key) {
    return -2 - static_cast<int64_t>(key);
}

int key_of_fill(int64_t id) {
    return static_cast<int>(-2 - id);
}

} // namespace

bool hybrid_dispatch::open_devices() {
    try {
        for (ggml_backend_dev_t device : choose_devices(config_)) {
            if (devices_.size() == max_devices) {
                log_.add("more than %d accelerators: the others are not used", max_devices);
                break;
            }
            auto made = std::make_unique<accelerator>(device, static_cast<int>(devices_.size()), config_, clock_);
            made->slots.resize(static_cast<size_t>(book_.n_layers()));
            made->scratch.resize(static_cast<size_t>(book_.n_classes()));
            std::vector<const expert_layout *> layouts;
            for (int layer = 0; layer < book_.n_layers(); layer++) {
                layouts.push_back(&book_.layer(layer).layout);
            }
            if (!made->compute.reserve(layouts, book_.max_top_k())) {
                log_.add("%s has no memory left: all experts on the CPU", made->port.name().c_str());
                not_reproducible("an accelerator cannot be used");
                continue;
            }
            devices_.push_back(std::move(made));
        }
    } catch (const std::exception & error) {
        log_.add("no accelerator: %s", error.what());
        not_reproducible("an accelerator cannot be used");
        devices_.clear();
    }
    for (auto & device : devices_) {
        steps_.push_back(std::make_unique<device_step>(*device));
    }
    return !devices_.empty();
}

bool hybrid_dispatch::may_cache(const accelerator & device, int layer) const {
    return book_.layer(layer).llama_layer >= config_.n_cpu_layers &&
           device_compute::supports(device.port, book_.layer(layer).layout);
}

// As many slots for each layer as the budget holds, then one more for as many layers as the rest allows.
std::vector<int> hybrid_dispatch::slots_for_budget(const accelerator & device, double budget) const {
    const int n_layers = book_.n_layers();
    std::vector<int> slots(static_cast<size_t>(n_layers), 0);
    std::vector<double> bytes(static_cast<size_t>(n_layers), 0.0);
    double sum = 0.0;
    for (int layer = 0; layer < n_layers; layer++) {
        const expert_layout & layout = book_.layer(layer).layout;
        if (may_cache(device, layer)) {
            bytes[static_cast<size_t>(layer)] =
                static_cast<double>(slot_set::needed_bytes(device.port, layout, 16)) / 16.0;
            sum += bytes[static_cast<size_t>(layer)];
        }
    }
    if (sum <= 0.0 || budget <= 0.0) {
        return slots;
    }
    const int each = static_cast<int>(std::min(budget / sum, 1e6));
    double left    = budget - each * sum;
    for (size_t layer = 0; layer < slots.size(); layer++) {
        const bool one_more = bytes[layer] > 0.0 && bytes[layer] <= left;
        left -= one_more ? bytes[layer] : 0.0;
        slots[layer] = bytes[layer] > 0.0 ? each + (one_more ? 1 : 0) : 0;
    }
    return slots;
}

void hybrid_dispatch::size_caches(std::vector<std::vector<int>> & slots) {
    const expert_cache_size & size = config_.expert_cache;
    std::vector<double> free;
    for (const auto & device : devices_) {
        double work = 0.0;
        for (int cls = 0; cls < book_.n_classes(); cls++) {
            const expert_layout & layout = book_.of_class(cls).layout;
            work = std::max(work, static_cast<double>(device_compute::batch_bytes(layout, config_.max_batch_tokens,
                                                                                  book_.max_top_k())));
            work += n_scratch_slots * static_cast<double>(layout.expert_bytes());
        }
        free.push_back(std::max(0.0, static_cast<double>(device->port.free_bytes()) - work));
    }
    if (config_.reproducible) {
        slots = fixed_slots(free);
        return;
    }
    const double all_free = std::accumulate(free.begin(), free.end(), 0.0);
    slots.clear();
    for (size_t d = 0; d < devices_.size(); d++) {
        const double share = all_free > 0.0 ? free[d] / all_free : 1.0 / static_cast<double>(devices_.size());
        switch (size.is) {
        case expert_cache_size::kind::automatic:
            slots.push_back(slots_for_budget(*devices_[d], free[d] - static_cast<double>(config_.fit_margin_bytes)));
            break;
        case expert_cache_size::kind::bytes:
            slots.push_back(slots_for_budget(*devices_[d], size.n_bytes * share));
            break;
        default: {
            std::vector<int> one;
            for (int layer = 0; layer < book_.n_layers(); layer++) {
                const double n    = size.is == expert_cache_size::kind::slots
                                        ? static_cast<double>(size.n_slots)
                                        : std::round(size.fraction * book_.layer(layer).layout.n_expert);
                const bool usable = may_cache(*devices_[d], layer);
                one.push_back(usable ? static_cast<int>(std::ceil(n * share - 1e-9)) : 0);
            }
            slots.push_back(std::move(one));
        }
        }
    }
    // No layer has more slots than experts, on all devices together.
    for (int layer = 0; layer < book_.n_layers(); layer++) {
        int left = book_.layer(layer).layout.n_expert;
        for (auto & of_device : slots) {
            int & n = of_device[static_cast<size_t>(layer)];
            n       = std::min(n, left);
            left -= n;
        }
    }
}

void hybrid_dispatch::allocate_slots(std::vector<std::vector<int>> & slots) {
    for (size_t d = 0; d < devices_.size(); d++) {
        accelerator & device = *devices_[d];
        int most             = book_.max_experts();
        bool told            = false;
        for (int layer = 0; layer < book_.n_layers(); layer++) {
            int & n = slots[d][static_cast<size_t>(layer)];
            n       = std::min(n, most);
            while (n > 0 &&
                   !device.slots[static_cast<size_t>(layer)].allocate(device.port, book_.layer(layer).layout, n)) {
                n    = config_.reproducible ? 0 : n / 2; // half a layer is no fixed placement
                most = n;
                if (!told) {
                    log_.add("%s ran out of memory while slots were made: fewer experts are cached",
                             device.port.name().c_str());
                    told = true;
                    if (config_.expert_cache.is != expert_cache_size::kind::automatic) {
                        not_reproducible("memory does not hold the expert cache that was asked for");
                    }
                }
            }
        }
        bool has_any = false;
        for (const int n : slots[d]) {
            has_any = has_any || n > 0;
        }
        // Nothing is streamed where nothing is copied.
        for (int cls = 0; has_any && !config_.reproducible && cls < book_.n_classes(); cls++) {
            const expert_layout & layout = book_.of_class(cls).layout;
            if (device_compute::supports(device.port, layout) &&
                !device.scratch[static_cast<size_t>(cls)].allocate(device.port, layout, n_scratch_slots)) {
                log_.add("%s has no memory left to stream experts through: prompts use the cached ones only",
                         device.port.name().c_str());
            }
        }
    }
}

bool hybrid_dispatch::make_costs(cost_model & out) {
    const int n_devices = static_cast<int>(devices_.size());
    status made;
    if (config_.simple) {
        made = simple_cost_model(*config_.simple, book_, n_devices, out);
    } else {
        if (!config_.costs_json.empty()) {
            made = calibrated_cost_model(config_.costs_json, book_, n_devices, out);
            if (made.ok()) {
                return true;
            }
            log_.add("%s; measuring instead", made.message());
        }
        made = measured_cost_model(book_, devices_, timer_, clock_, out);
    }
    if (!made.ok()) {
        log_.add("no costs (%s): all experts on the CPU", made.message());
    }
    return made.ok();
}

status hybrid_dispatch::make_runtime(const cost_model & costs, const std::vector<std::vector<int>> & slots) {
    runtime_config made;
    model_shape & shape  = made.cache.shape;
    shape.n_layers       = book_.n_layers();
    shape.n_expert       = book_.max_experts();
    shape.top_k          = book_.max_top_k();
    made.cache.n_devices = static_cast<int>(devices_.size());
    for (const auto & of_device : slots) {
        made.cache.n_slots.insert(made.cache.n_slots.end(), of_device.begin(), of_device.end());
    }
    HYBRIMOE_TRY(make_policy(eviction_policies(), config_.cache_policy, shape, made.eviction));
    HYBRIMOE_TRY(make_policy(admission_policies(), config_.admission, shape, made.admission));
    HYBRIMOE_TRY(make_policy(schedulers(), config_.schedule, shape, made.schedule));
    HYBRIMOE_TRY(make_policy(prefetchers(), config_.prefetch, shape, made.prefetch));
    parsed_policy eviction;
    HYBRIMOE_TRY(parsed_policy::parse(config_.cache_policy, eviction));
    const policy_entry<eviction_policy> * entry = nullptr;
    HYBRIMOE_TRY(find_entry(eviction_policies(), eviction.name.c_str(), entry));
    needs_scores_ = entry->traits.needs_scores;
    if (entry->traits.oracle) {
        return status::fail(error_code::invalid_argument, "the cache policy %s knows the future: it is for simulations",
                            eviction.name.c_str());
    }
    horizon_   = made.prefetch->horizon() > 0 ? made.prefetch->max_horizon() : 0;
    made.costs = costs;
    return runtime::create(std::move(made), runtime_);
}

status hybrid_dispatch::make_governor(const cost_model & costs) {
    governor_options options;
    options.live  = config_.live_costs && !config_.simple;
    options.guard = config_.guard;
    launch_us_.assign(devices_.size(), 0.0);
    HYBRIMOE_TRY(governor::create(costs, options, *runtime_, governor_));
    governor_.begin_pass();
    return {};
}

void hybrid_dispatch::set_up() {
    phase_ = phase::off;
    book_.close();
    if (!config_.route_trace.empty()) {
        try {
            trace_.load(config_.route_trace);
        } catch (const std::exception & error) {
            log_.add("%s", error.what());
        }
    }
    if (book_.n_layers() == 0 || config_.expert_cache.is_off() || !open_devices()) {
        if (config_.reproducible) {
            log_.add("reproducible: all experts on the CPU");
        }
        return;
    }
    std::vector<std::vector<int>> slots;
    size_caches(slots);
    allocate_slots(slots);
    wanted_slots_ = slots;
    shrink_.assign(devices_.size(), 1.0);
    is_suspended_.assign(devices_.size(), false);
    told_copy_.assign(devices_.size(), false);
    told_memory_.assign(devices_.size(), false);
    orders_.resize(devices_.size());
    double cached = 0.0;
    for (const auto & device : devices_) {
        for (const slot_set & set : device->slots) {
            cached += static_cast<double>(set.n_bytes());
        }
    }
    if (cached == 0.0) {
        log_.add(config_.reproducible ? "reproducible: the expert cache holds no whole layer: all experts on the CPU"
                                      : "no memory on the accelerator is free for experts: all of them on the CPU");
        devices_.clear();
        steps_.clear();
        return;
    }
    cost_model costs;
    if (!make_costs(costs)) {
        devices_.clear();
        steps_.clear();
        return;
    }
    status made = make_runtime(costs, slots);
    made        = made.ok() ? make_governor(costs) : made;
    if (!made.ok()) {
        log_.add("%s: all experts on the CPU", made.message());
        devices_.clear();
        steps_.clear();
        return;
    }
    if (is_recording()) {
        recorded_costs_ = describe_costs(costs);
    }
    if (config_.pin_experts) {
        pin_experts();
    }
    fill_caches();
    if (config_.reproducible) {
        runtime_->set_limits({false, false, false});
        note(trace_kind::limits);
        check_fixed_placement();
    }
    if (horizon_ > 0) {
        routers_.load(book_);
    }
    phase_ = phase::ready;
    announce();
}

// Registers each layer's tensors; the kernel pins whole pages.
void hybrid_dispatch::pin_experts() {
    size_t n_pinned = 0;
    size_t n_ranges = 0;
    for (int layer = 0; layer < book_.n_layers(); layer++) {
        const expert_layout & layout = book_.layer(layer).layout;
        for (const expert_part & part : layout.parts) {
            if (!part.is_matrix()) {
                continue;
            }
            const size_t bytes = part.stride_bytes * static_cast<size_t>(layout.n_expert);
            n_ranges++;
            for (auto & device : devices_) {
                if (device->port.register_host(const_cast<char *>(part.host), bytes)) {
                    n_pinned++;
                }
            }
        }
    }
    log_.add("pinned %zu of %zu expert tensors for copies without staging", n_pinned, n_ranges * devices_.size());
}

// What was resident when the model was last used, else the first experts.
void hybrid_dispatch::fill_caches() {
    std::vector<std::vector<int32_t>> preferred;
    if (!config_.state_path.empty()) {
        std::string problem;
        if (!read_state(config_.state_path, book_, preferred, problem)) {
            log_.add("%s: starting with a cold expert cache", problem.c_str());
        }
    }
    preferred.resize(static_cast<size_t>(book_.n_layers()));
    for (int layer = 0; layer < book_.n_layers(); layer++) {
        std::vector<int32_t> & order = preferred[static_cast<size_t>(layer)];
        const size_t n_preferred     = order.size();
        for (int32_t e = 0; e < book_.layer(layer).layout.n_expert; e++) {
            if (std::find(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(n_preferred), e) ==
                order.begin() + static_cast<std::ptrdiff_t>(n_preferred)) {
                order.push_back(e);
            }
        }
        size_t at = 0;
        for (size_t d = 0; d < devices_.size(); d++) {
            const slot_set & set = devices_[d]->slots[static_cast<size_t>(layer)];
            for (int i = 0; i < set.n_slots() && at < order.size(); i++, at++) {
                load_result loaded;
                if (runtime_->cache().begin_load(layer, order[at], static_cast<int>(d), false, loaded).ok()) {
                    note(trace_kind::load, layer, order[at], static_cast<int>(d));
                    copy_now(static_cast<int>(d), layer, order[at], loaded.slot, true);
                }
            }
        }
    }
    settle_fills();
}

void hybrid_dispatch::copy_now(int device, int layer, int expert, int slot, bool is_load) {
    copy_order order;
    order.id     = is_load ? fill_id(runtime_->cache().shape().key(layer, expert)) : -1;
    order.layout = &book_.layer(layer).layout;
    order.slots  = &devices_[static_cast<size_t>(device)]->slots[static_cast<size_t>(layer)];
    order.expert = expert;
    order.slot   = slot;
    devices_[static_cast<size_t>(device)]->worker.copy(order, false);
}

// Waits for the copies of fill_caches and reload.
void hybrid_dispatch::settle_fills() {
    const model_shape & shape = runtime_->cache().shape();
    for (size_t d = 0; d < devices_.size(); d++) {
        accelerator & device = *devices_[d];
        const double begin   = clock_.now_us();
        while (!device.worker.wait_idle(drain_timeout_us)) {
            if (clock_.now_us() - begin > 60 * drain_timeout_us) {
                is_suspended_[d] = true;
                log_.add("%s does not finish its copies: set aside", device.port.name().c_str());
                return;
            }
        }
        device.worker.collect(results_);
        for (const copy_result & result : results_) {
            if (result.id > -2) {
                continue;
            }
            const int key    = key_of_fill(result.id);
            const int layer  = shape.layer_of(key);
            const int expert = shape.expert_of(key);
            const status end =
                result.ok ? runtime_->cache().complete_load(layer, expert) : runtime_->cache().fail_load(layer, expert);
            if (end.ok()) {
                note(trace_kind::loaded, layer, expert, result.ok);
            }
        }
    }
}

void hybrid_dispatch::announce() const {
    if (config_.reproducible) {
        announce_fixed_placement();
        return;
    }
    const cost_model & costs = governor_.costs();
    for (size_t d = 0; d < devices_.size(); d++) {
        const accelerator & device = *devices_[d];
        double bytes               = 0.0;
        int64_t n_slots            = 0;
        int64_t n_experts          = 0;
        for (int layer = 0; layer < book_.n_layers(); layer++) {
            bytes += static_cast<double>(device.slots[static_cast<size_t>(layer)].n_bytes());
            n_slots += device.slots[static_cast<size_t>(layer)].n_slots();
            n_experts += book_.layer(layer).layout.n_expert;
        }
        const int d_index = static_cast<int>(d);
        log_.add("%s caches %lld of %lld experts (%.2f GiB, %.0f %%); an expert: CPU %.0f us, %s %.0f us, copy %.0f us",
                 device.port.name().c_str(), static_cast<long long>(n_slots), static_cast<long long>(n_experts),
                 gib(bytes),
                 100.0 * static_cast<double>(n_slots) / static_cast<double>(std::max<int64_t>(1, n_experts)),
                 costs.t_cpu(0, 1, false), device.port.name().c_str(), costs.t_gpu(0, d_index, 1),
                 costs.t_copy(d_index, costs.of_layer(0).bytes));
    }
}

} // namespace hybrimoe
