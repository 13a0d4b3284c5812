#include "runtime.h"

#include <algorithm>
#include <cmath>

namespace hybrimoe {

namespace {

// A miss so soon after a prefetch pushed the expert out is charged to prefetch.
constexpr int64_t blame_steps = 8;

} // namespace

status runtime::create(runtime_config config, std::unique_ptr<runtime> & out) {
    HYBRIMOE_TRY(config.costs.check());
    if (!config.eviction || !config.admission || !config.schedule || !config.prefetch) {
        return status::fail(error_code::invalid_argument, "a runtime needs all four policies");
    }
    if (config.costs.n_layers() != config.cache.shape.n_layers || config.costs.n_devices() != config.cache.n_devices) {
        return status::fail(error_code::invalid_argument,
                            "the cost model has %d layers and %d devices, the cache %d and %d", config.costs.n_layers(),
                            config.costs.n_devices(), config.cache.shape.n_layers, config.cache.n_devices);
    }
    if (config.max_window_layers < 1 || config.max_window_layers > max_layers) {
        return status::fail(error_code::invalid_argument, "max_window_layers = %d is outside 1..%d",
                            config.max_window_layers, max_layers);
    }
    if (config.cache.class_of_layer.empty()) {
        for (int layer = 0; layer < config.costs.n_layers(); ++layer) {
            config.cache.class_of_layer.push_back(config.costs.class_of(layer));
        }
    }
    expert_cache cache;
    HYBRIMOE_TRY(expert_cache::create(config.cache, std::move(config.eviction), cache));
    cache.reset(config.preload);
    out.reset(new runtime(std::move(config), std::move(cache)));
    return {};
}

// Sizes everything once: the decode path does not allocate.
runtime::runtime(runtime_config && config, expert_cache && cache)
    : shape_(config.cache.shape), costs_(std::move(config.costs)), cache_(std::move(cache)),
      admission_(std::move(config.admission)), schedule_(std::move(config.schedule)),
      prefetch_(std::move(config.prefetch)), max_window_layers_(config.max_window_layers),
      use_pay_back_(config.pay_back), horizon_(std::min(prefetch_->max_horizon(), shape_.n_layers), shape_.n_layers) {
    admission_->set_costs(&costs_);
    const auto n_expert = static_cast<size_t>(shape_.n_expert);
    decision_.plan.placements.reserve(n_expert);
    tried_.placements.reserve(n_expert);
    decision_.items.reserve(n_expert);
    decision_.slots.reserve(n_expert);
    copy_order_.reserve(n_expert);
    std::fill(link_free_us_, link_free_us_ + max_devices, 0.0);
    std::fill(link_speculative_, link_speculative_ + max_devices, false);
    size_t n_slots = n_expert; // scratch
    for (const int n : config.cache.n_slots) {
        n_slots += static_cast<size_t>(n);
    }
    decision_.transfers.reserve(n_slots);
    offers_.reserve(n_slots);
    slot_order_.reserve(n_slots);
    in_flight_.reserve(n_slots);
    active_.reserve(n_expert);
    loads_.reserve(n_expert);
    load_of_.assign(n_expert, 0);
    pushed_out_.assign(static_cast<size_t>(shape_.n_keys()), -1);
    device_of_layer_.assign(static_cast<size_t>(shape_.n_layers), cpu_device);
    reseed_horizon();
}

void runtime::reseed_horizon() {
    if (prefetch_->adaptive() && layer_us_ > 0.0 && costs_.n_devices() > 0) {
        horizon_.seed(shape_.top_k * costs_.t_copy(0, costs_.of_layer(0).bytes), layer_us_);
    } else {
        horizon_.seed(std::max(1, prefetch_->horizon()));
    }
}

status runtime::set_costs(const cost_model & costs) {
    HYBRIMOE_TRY(costs.check());
    if (costs.n_layers() != costs_.n_layers() || costs.n_devices() != costs_.n_devices()) {
        return status::fail(error_code::invalid_argument,
                            "the new cost model has %d layers and %d devices, not %d and %d", costs.n_layers(),
                            costs.n_devices(), costs_.n_layers(), costs_.n_devices());
    }
    costs_ = costs;
    if (prefetch_->adaptive()) {
        reseed_horizon();
    }
    return {};
}

void runtime::begin_prompt() {
    cache_.begin_prompt();
    prefetch_->on_prompt();
}

status runtime::check(const layer_event & e, double now_us) const {
    if (e.layer < 0 || e.layer >= shape_.n_layers) {
        return status::fail(error_code::invalid_argument, "layer %d is outside 0..%d", e.layer, shape_.n_layers - 1);
    }
    if (e.n_rows < 1 || e.top_k < 1 || e.top_k > shape_.n_expert || !e.ids) {
        return status::fail(error_code::invalid_argument, "layer %d: %d tokens of top-%d, must be at least 1 of 1..%d",
                            e.layer, e.n_rows, e.top_k, shape_.n_expert);
    }
    const size_t n = static_cast<size_t>(e.n_rows) * static_cast<size_t>(e.top_k);
    for (size_t i = 0; i < n; ++i) {
        if (e.ids[i] < 0 || e.ids[i] >= shape_.n_expert) {
            return status::fail(error_code::invalid_argument, "layer %d: expert %d is outside 0..%d", e.layer, e.ids[i],
                                shape_.n_expert - 1);
        }
    }
    bool times_ok = std::isfinite(now_us) && std::isfinite(e.cpu_ready_us) && e.cpu_ready_us >= 0.0 &&
                    std::isfinite(e.gap_us) && e.gap_us >= 0.0;
    for (int d = 0; d < costs_.n_devices(); ++d) {
        times_ok = times_ok && std::isfinite(e.gpu_ready_us[d]) && e.gpu_ready_us[d] >= 0.0;
    }
    if (!times_ok) {
        return status::fail(error_code::invalid_argument, "layer %d: times must be finite and at least 0", e.layer);
    }
    if (now_us < last_event_us_) {
        return status::fail(error_code::invalid_argument, "layer %d: the clock went back from %.3f to %.3f us", e.layer,
                            last_event_us_, now_us);
    }
    return {};
}

// Active experts and their loads, in order of first appearance.
void runtime::gather(const layer_event & e) {
    active_.clear();
    loads_.clear();
    const size_t n = static_cast<size_t>(e.n_rows) * static_cast<size_t>(e.top_k);
    for (size_t i = 0; i < n; ++i) {
        int32_t & load = load_of_[static_cast<size_t>(e.ids[i])];
        if (load++ == 0) {
            active_.push_back(e.ids[i]);
        }
    }
    for (const int32_t expert : active_) {
        loads_.push_back(load_of_[static_cast<size_t>(expert)]);
        load_of_[static_cast<size_t>(expert)] = 0;
    }
    step_           = router_step();
    step_.layer     = e.layer;
    step_.experts   = active_.data();
    step_.n_tokens  = loads_.data();
    step_.n_experts = static_cast<int>(active_.size());
    step_.n_rows    = e.n_rows;
    step_.top_k     = e.top_k;
    step_.ids       = e.ids;
    step_.weights   = e.weights;
    step_.scores    = e.scores;
}

void runtime::describe_items(const layer_event & e, double now_us) {
    decision_.items.clear();
    for (size_t i = 0; i < active_.size(); ++i) {
        const residency at = cache_.lookup(e.layer, active_[i]);
        work_item w;
        w.expert   = active_[i];
        w.n_tokens = loads_[i];
        w.device   = at.device;
        w.loading  = at.state == slot_state::loading;
        if (w.loading) {
            const auto t = std::find_if(in_flight_.begin(), in_flight_.end(), [&](const transfer & f) {
                return f.layer == e.layer && f.expert == w.expert && f.slot >= 0;
            });
            w.ready_us   = t == in_flight_.end() ? 0.0 : std::max(0.0, t->end_us - now_us);
        }
        decision_.items.push_back(w);
    }
}

// Useful, late and wasted bytes, before begin_step clears the marks.
void runtime::note_outcomes(const layer_event & e) {
    const double bytes = costs_.of_layer(e.layer).bytes;
    decision_.n_hits = decision_.n_misses = decision_.n_late = 0;
    for (const work_item & w : decision_.items) {
        const residency at = cache_.lookup(e.layer, w.expert);
        if (w.loading) {
            ++decision_.n_late;
            stats_.prefetch_late_bytes += at.speculative ? bytes : 0.0;
        } else if (w.device != cpu_device) {
            ++decision_.n_hits;
            if (at.speculative) {
                stats_.prefetch_useful_bytes += bytes;
                used_bytes_ += bytes;
                const double saved =
                    costs_.t_cpu(e.layer, w.n_tokens, false) - costs_.t_gpu(e.layer, w.device, w.n_tokens);
                pay_back_.on_used(std::max(0.0, saved));
            }
        } else {
            const auto key = static_cast<size_t>(shape_.key(e.layer, w.expert));
            if (pushed_out_[key] >= stats_.n_events) {
                pay_back_.on_pushed_out_miss(costs_.t_cpu(e.layer, w.n_tokens, false));
                pushed_out_[key] = -1;
            }
        }
    }
    decision_.n_misses = static_cast<int>(decision_.items.size()) - decision_.n_hits;
}

status runtime::on_layer(const layer_event & e, double now_us, const decision *& out) {
    HYBRIMOE_TRY(check(e, now_us));
    gather(e);
    HYBRIMOE_TRY(cache_.policy().check(step_));
    if (stats_.n_events > 0) {
        const double period = now_us - last_event_us_;
        layer_us_           = layer_us_ == 0.0 ? period : 0.95 * layer_us_ + 0.05 * period;
    }
    last_event_us_   = now_us;
    decision_.now_us = now_us;
    decision_.transfers.clear();
    cache_.end_step();

    describe_items(e, now_us);
    note_outcomes(e);
    HYBRIMOE_TRY(cache_.begin_step(step_)); // cannot fail: checked above
    admission_->on_step(step_);
    prefetch_->observe(step_);

    layer_problem problem;
    problem.costs        = &costs_;
    problem.layer        = e.layer;
    problem.cpu_ready_us = e.cpu_ready_us;
    for (size_t i = 0; i < decision_.items.size(); ++i) {
        work_item & w = decision_.items[i];
        w.may_copy    = w.device != cpu_device || e.scratch ||
                        (limits_.admission && admission_->wants(shape_.key(e.layer, w.expert)));
    }
    for (int d = 0; d < costs_.n_devices(); ++d) {
        problem.gpu_ready_us[d]  = e.gpu_ready_us[d];
        problem.link_ready_us[d] = std::max(0.0, link_free_us_[d] - now_us);
        problem.max_copies[d]    = !limits_.demand_copies ? 0
                                   : e.scratch            ? decision_.n_misses
                                                          : cache_.n_available(e.layer, d, decision_.n_misses);
    }
    problem.copies_stay = !e.scratch;
    problem.items       = decision_.items.data();
    problem.n_items     = static_cast<int>(decision_.items.size());
    order_slots(e.layer, problem);
    HYBRIMOE_TRY(plan_layer(*schedule_, problem, decision_.plan)); // cannot fail: costs and event were checked
    decision_.is_tried   = false;
    decision_.untried_us = decision_.plan.makespan_us;
    decision_.refused_us = 0.0;
    if (e.trial.wanted && e.trial.what.kind != resource_kind::link) {
        try_compute(e, problem);
    }

    commit_demands(e, now_us);
    open_window(e, now_us);
    if (e.trial.wanted && e.trial.what.kind == resource_kind::link) {
        try_copy(e, now_us);
    }
    commit_prefetch(e, now_us);
    if (limits_.admission) {
        commit_admissions(e, now_us);
    }
    stats_.n_tried += decision_.is_tried ? 1 : 0;

    stats_.n_events += 1;
    stats_.n_cpu += decision_.plan.n_cpu;
    stats_.n_gpu += decision_.plan.n_gpu;
    stats_.n_hits += decision_.n_hits;
    stats_.n_misses += decision_.n_misses;
    stats_.n_late += decision_.n_late;
    stats_.makespan_us += decision_.plan.makespan_us;
    stats_.stall_us += stall_us_;
    if (prefetch_->adaptive()) {
        horizon_.observe(stall_us_, layer_us_, used_bytes_, wasted_bytes_);
    }
    used_bytes_ = wasted_bytes_ = stall_us_ = 0.0;
    if (use_pay_back_) {
        pay_back_.on_step();
        stats_.n_prefetch_switches = pay_back_.n_switches();
    }
    hash_decision();
    out = &decision_;
    return {};
}

// Tells the planner whose slots lose least, where there is a choice.
void runtime::order_slots(int layer, layer_problem & problem) {
    if (costs_.n_devices() < 2 || decision_.n_misses == 0 || !limits_.demand_copies) {
        return;
    }
    cache_.offers(layer, decision_.n_misses, offers_);
    slot_order_.clear();
    for (const slot_offer & offer : offers_) {
        slot_order_.push_back(static_cast<int8_t>(offer.device));
    }
    problem.slot_order   = slot_order_.data();
    problem.n_slot_order = static_cast<int>(slot_order_.size());
}

void runtime::commit_demands(const layer_event & e, double now_us) {
    const layer_plan & plan = decision_.plan;
    const double bytes      = costs_.of_layer(e.layer).bytes;
    decision_.slots.assign(decision_.items.size(), -1);
    // In the order of their copies on each link.
    copy_order_.clear();
    for (size_t i = 0; i < plan.placements.size(); ++i) {
        if (plan.placements[i].copied) {
            copy_order_.push_back(static_cast<int>(i));
        }
    }
    std::sort(copy_order_.begin(), copy_order_.end(), [&plan](int a, int b) {
        const placement & x = plan.placements[static_cast<size_t>(a)];
        const placement & y = plan.placements[static_cast<size_t>(b)];
        return x.copy_start_us != y.copy_start_us ? x.copy_start_us < y.copy_start_us : a < b;
    });
    for (const int index : copy_order_) {
        const placement & at = plan.placements[static_cast<size_t>(index)];
        const int d          = at.device;
        const int key        = shape_.key(e.layer, at.expert);
        load_result loaded;
        transfer t;
        t.kind = transfer_kind::scratch;
        // Without scratch the plan copies only what admission wanted, and it is not asked again: what was admitted just
        // now has changed its mind about others.
        const bool wanted = limits_.admission && (!e.scratch || admission_->wants(key));
        if (wanted && cache_.begin_load(e.layer, at.expert, d, false, loaded).ok()) {
            t.kind    = transfer_kind::demand;
            t.slot    = loaded.slot;
            t.evicted = loaded.evicted_key;
            admission_->on_admit(key);
            note_eviction(loaded, false);
            decision_.slots[static_cast<size_t>(index)] = loaded.slot;
        } else if (!e.scratch) {
            leave_to_cpu(index);
            continue;
        }
        if (link_free_us_[d] > now_us && link_speculative_[d]) {
            ++stats_.n_delayed_demands;
        }
        t.layer    = e.layer;
        t.expert   = at.expert;
        t.device   = d;
        t.bytes    = bytes;
        t.start_us = now_us + at.copy_start_us;
        t.end_us   = now_us + at.copy_end_us;
        record(t);
        link_free_us_[d]     = t.end_us;
        link_speculative_[d] = false;
    }
    n_quiet_layers_ = plan.n_copies > 0 ? 0 : n_quiet_layers_ + 1;
    for (size_t i = 0; i < decision_.items.size(); ++i) {
        const work_item & w  = decision_.items[i];
        const placement & at = plan.placements[i];
        if (at.device != cpu_device && !at.copied) {
            decision_.slots[i] = cache_.lookup(e.layer, w.expert).slot;
        }
        if (w.loading) { // the wait for a late copy, or the CPU's extra work in its place
            const double gpu = costs_.t_gpu(e.layer, w.device, w.n_tokens);
            stall_us_ += at.device == cpu_device ? std::max(0.0, costs_.t_cpu(e.layer, w.n_tokens, false) - gpu)
                                                 : std::max(0.0, at.end_us - gpu - plan.cpu_end_us);
        }
    }
}

// What was to be copied and finds no slot; the plan's times stay.
void runtime::leave_to_cpu(int index) {
    placement & at = decision_.plan.placements[static_cast<size_t>(index)];
    at.device      = cpu_device;
    at.copied      = false;
    ++decision_.plan.n_cpu;
    --decision_.plan.n_gpu;
    --decision_.plan.n_copies;
}

// Until when idle-time copies may run, and how much DRAM traffic the plan leaves for them.
void runtime::open_window(const layer_event & e, double now_us) {
    const double layer_us = decision_.plan.makespan_us + e.gap_us;
    const bool quiet      = n_quiet_layers_ >= shape_.n_layers;
    const double n_layers = quiet ? max_window_layers_ : 1;
    window_end_us_        = now_us + n_layers * layer_us;
    spare_bytes_ =
        n_layers * (layer_us * costs_.dram_bytes_per_us() - decision_.plan.cpu_bytes) - decision_.plan.copy_bytes;
}

// Of the cards whose link has time for it in this window, the one whose slot loses least; else the one that is done
// first.
int runtime::target_device(int layer, double now_us) const {
    int best       = cpu_device;
    double best_us = 0.0;
    bool best_fits = false;
    slot_offer best_offer;
    for (int d = 0; d < costs_.n_devices(); ++d) {
        if (cache_.n_slots(layer, d) == 0) {
            continue;
        }
        const double end_us = std::max(now_us, link_free_us_[d]) + costs_.t_copy(d, costs_.of_layer(layer).bytes);
        slot_offer offer;
        const bool fits   = costs_.n_devices() > 1 && end_us <= window_end_us_ && cache_.first_offer(layer, d, offer);
        const bool better = fits && best_fits ? offer < best_offer : fits != best_fits ? fits : end_us < best_us;
        if (best == cpu_device || better) {
            best       = d;
            best_us    = end_us;
            best_fits  = fits;
            best_offer = offer;
        }
    }
    return best;
}

bool runtime::issue_idle(transfer_kind kind, int layer, int expert, int device, double saved_us, double now_us) {
    const double bytes = costs_.of_layer(layer).bytes;
    const double start = std::max(now_us, link_free_us_[device]);
    const double end   = start + costs_.t_copy(device, bytes);
    return end <= window_end_us_ && bytes <= spare_bytes_ && issue(kind, layer, expert, device, saved_us, now_us);
}

bool runtime::issue(transfer_kind kind, int layer, int expert, int device, double saved_us, double now_us) {
    const double bytes = costs_.of_layer(layer).bytes;
    const double start = std::max(now_us, link_free_us_[device]);
    const double end   = start + costs_.t_copy(device, bytes);
    load_result loaded;
    const bool speculative = kind == transfer_kind::prefetch;
    if (!cache_.begin_load(layer, expert, device, speculative, loaded).ok()) {
        return false;
    }
    if (speculative) {
        cache_.shield(layer, expert);
    } else {
        admission_->on_admit(shape_.key(layer, expert));
    }
    note_eviction(loaded, speculative);
    transfer t;
    t.kind     = kind;
    t.layer    = layer;
    t.expert   = expert;
    t.device   = device;
    t.slot     = loaded.slot;
    t.evicted  = loaded.evicted_key;
    t.bytes    = bytes;
    t.start_us = start;
    t.end_us   = end;
    t.saved_us = saved_us;
    record(t);
    link_free_us_[device]     = end;
    link_speculative_[device] = true;
    spare_bytes_ -= bytes;
    return true;
}

void runtime::commit_prefetch(const layer_event & e, double now_us) {
    decision_.horizon = 0;
    if (prefetch_->horizon() == 0 || !prefetch_on() || costs_.n_devices() == 0) {
        return;
    }
    prefetch_view view;
    view.shape    = &shape_;
    view.costs    = &costs_;
    view.cache    = &cache_;
    view.policy   = schedule_.get();
    view.step     = &step_;
    view.horizon  = std::min(horizon_.value(), shape_.n_layers - 1 - e.layer);
    view.layer_us = layer_us_;
    std::copy(e.lookahead, e.lookahead + max_lookahead, view.lookahead);
    for (int distance = 1; distance <= view.horizon; ++distance) {
        device_of_layer_[static_cast<size_t>(e.layer + distance)] = target_device(e.layer + distance, now_us);
    }
    view.device_of_layer = device_of_layer_.data();
    decision_.horizon    = view.horizon;
    proposals_.clear();
    prefetch_->propose(view, proposals_);
    for (int i = 0; i < proposals_.n_keep; ++i) {
        cache_.shield(shape_.layer_of(proposals_.keep[i]), shape_.expert_of(proposals_.keep[i]));
    }
    for (int i = 0; i < proposals_.n_items; ++i) {
        const proposal & p = proposals_.items[i];
        const int device   = target_device(p.layer, now_us); // links and slots of the ones before are taken
        issue_idle(transfer_kind::prefetch, p.layer, p.expert, device, p.gain_us, now_us);
    }
}

void runtime::commit_admissions(const layer_event & e, double now_us) {
    for (const work_item & w : decision_.items) {
        if (w.device != cpu_device || cache_.lookup(e.layer, w.expert).state != slot_state::absent ||
            !admission_->wants(shape_.key(e.layer, w.expert))) {
            continue;
        }
        const int device = target_device(e.layer, now_us);
        if (device == cpu_device || !issue_idle(transfer_kind::admit, e.layer, w.expert, device, 0.0, now_us)) {
            break; // no slots, or the window is full
        }
    }
}

// Gives one expert to a resource that the plan leaves out: a resident one to its accelerator, or the lightest one that
// costs least to the CPU.
void runtime::try_compute(const layer_event & e, const layer_problem & problem) {
    const bool on_cpu = e.trial.what.kind == resource_kind::cpu;
    const int device  = on_cpu ? cpu_device : e.trial.what.device;
    for (const placement & at : decision_.plan.placements) {
        if (at.device == device) {
            return; // it is used anyway
        }
    }
    if (e.trial.must_be_useful && e.calibrated != nullptr) {
        layer_problem hoped = problem;
        hoped.costs         = e.calibrated;
        if (!plan_layer(*schedule_, hoped, tried_).ok() ||
            std::none_of(tried_.placements.begin(), tried_.placements.end(),
                         [device](const placement & at) { return at.device == device; })) {
            return;
        }
    }
    int best = -1;
    for (int i = 0; i < problem.n_items; ++i) {
        const work_item & w = problem.items[i];
        const bool fits     = on_cpu || (w.device == device && !w.loading);
        if (fits && (best < 0 || w.n_tokens < problem.items[best].n_tokens)) {
            best = i;
        }
    }
    double makespan_us = 0.0;
    if (best < 0 || !plan_with(problem, decision_.plan, best, device, tried_, makespan_us).ok()) {
        return;
    }
    if (makespan_us - decision_.untried_us > e.trial.budget_us) {
        decision_.refused_us = makespan_us - decision_.untried_us;
        return;
    }
    std::swap(decision_.plan, tried_);
    decision_.is_tried = true;
}

// Copies one of the layer's missed experts in idle time, however long that is believed to take.
void runtime::try_copy(const layer_event & e, double now_us) {
    const int device = e.trial.what.device;
    const bool busy =
        std::any_of(in_flight_.begin(), in_flight_.end(), [device](const transfer & t) { return t.device == device; });
    if (busy || cache_.n_slots(e.layer, device) == 0) {
        return; // its end will tell
    }
    for (const work_item & w : decision_.items) {
        const bool is_absent = w.device == cpu_device && cache_.lookup(e.layer, w.expert).state == slot_state::absent;
        if (is_absent && issue(transfer_kind::admit, e.layer, w.expert, device, 0.0, now_us)) {
            decision_.is_tried = true;
            return;
        }
    }
}

void runtime::note_eviction(const load_result & loaded, bool by_prefetch) {
    if (loaded.evicted_key < 0) {
        return;
    }
    admission_->on_evict(loaded.evicted_key);
    const int layer = shape_.layer_of(loaded.evicted_key);
    if (loaded.evicted_unused) {
        const double bytes = costs_.of_layer(layer).bytes;
        stats_.prefetch_wasted_bytes += bytes;
        wasted_bytes_ += bytes;
        pay_back_.on_wasted(bytes / costs_.dram_bytes_per_us());
    }
    if (by_prefetch) {
        pushed_out_[static_cast<size_t>(loaded.evicted_key)] = stats_.n_events + blame_steps * shape_.n_layers;
    }
}

void runtime::record(transfer t) {
    t.id = next_id_++;
    decision_.transfers.push_back(t);
    in_flight_.push_back(t);
    ++stats_.n_transfers[static_cast<int>(t.kind)];
    stats_.bytes[static_cast<int>(t.kind)] += t.bytes;
}

size_t runtime::find_transfer(int64_t id) const {
    size_t i = 0;
    while (i < in_flight_.size() && in_flight_[i].id != id) {
        ++i;
    }
    return i;
}

status runtime::on_complete(int64_t id, double now_us) {
    const size_t i = find_transfer(id);
    if (i == in_flight_.size() || !std::isfinite(now_us)) {
        return status::fail(error_code::out_of_order, "complete: transfer %lld is not in flight",
                            static_cast<long long>(id));
    }
    const transfer t = in_flight_[i];
    if (t.slot >= 0) {
        HYBRIMOE_TRY(cache_.complete_load(t.layer, t.expert));
    }
    in_flight_.erase(in_flight_.begin() + static_cast<std::ptrdiff_t>(i));
    const bool last =
        std::none_of(in_flight_.begin(), in_flight_.end(), [&](const transfer & f) { return f.device == t.device; });
    if (last) { // earlier or later than predicted: the link is free now
        link_free_us_[t.device] = now_us;
    }
    return {};
}

status runtime::on_fail(int64_t id, double now_us) {
    const size_t i = find_transfer(id);
    if (i == in_flight_.size() || !std::isfinite(now_us)) {
        return status::fail(error_code::out_of_order, "fail: transfer %lld is not in flight",
                            static_cast<long long>(id));
    }
    const transfer t = in_flight_[i];
    if (t.slot >= 0) {
        HYBRIMOE_TRY(cache_.fail_load(t.layer, t.expert));
    }
    in_flight_.erase(in_flight_.begin() + static_cast<std::ptrdiff_t>(i));
    ++stats_.n_failed;
    return {};
}

void runtime::hash_decision() {
    uint64_t h     = stats_.decision_hash;
    const auto mix = [&h](uint64_t value) {
        for (int byte = 0; byte < 8; ++byte) {
            h = (h ^ ((value >> (8 * byte)) & 0xff)) * 1099511628211ULL;
        }
    };
    for (const placement & at : decision_.plan.placements) {
        mix(static_cast<uint64_t>(at.expert) | static_cast<uint64_t>(at.device + 1) << 32 |
            static_cast<uint64_t>(at.copied) << 48);
    }
    for (const transfer & t : decision_.transfers) {
        mix(static_cast<uint64_t>(t.id) << 8 | static_cast<uint64_t>(t.kind));
        mix(static_cast<uint64_t>(shape_.key(t.layer, t.expert)) | static_cast<uint64_t>(t.device) << 32 |
            static_cast<uint64_t>(t.slot + 1) << 40);
        mix(static_cast<uint64_t>(t.evicted + 1));
    }
    stats_.decision_hash = h;
}

} // namespace hybrimoe
