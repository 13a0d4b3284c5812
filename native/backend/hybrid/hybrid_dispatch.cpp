#include "hybrid/hybrid_dispatch.h"

#include "hybrid/state_file.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <stdexcept>

namespace hybrimoe {

namespace {

constexpr int64_t passes_between_looks = 64;   // at free memory
constexpr int64_t look_ahead_tokens    = 4;    // a bigger batch uses most experts anyway
constexpr double copy_patience         = 20.0; // times the predicted time that a copy may take
constexpr double copy_patience_us      = 1e7;  // and this much more: a first launch may compile shaders
constexpr double no_wait_us            = 0.0;
constexpr int32_t nowhere              = -2; // of an expert whose accelerator did not compute it

} // namespace

hybrid_dispatch::hybrid_dispatch(const settings & config, std::shared_ptr<counters> data, cpu_timer & timer,
                                 const kernels::kernel_set * kernels)
    : config_(in_force(config)), counters_(std::move(data)), timer_(timer), kernels_(kernels),
      log_(config.log_to_stderr) {
    if (config_.faults.pause_us > 0) {
        pause_ = sharing_pause(static_cast<double>(config_.faults.pause_us));
    }
    if (config_.trace_bytes > 0) {
        recorder_ = std::make_unique<trace_recorder>(static_cast<size_t>(config_.trace_bytes), config_.trace_scores,
                                                     config_.trace_spans);
    }
}

hybrid_dispatch::~hybrid_dispatch() {
    if (runtime_ != nullptr && !config_.state_path.empty()) {
        save_state();
    }
    devices_.clear(); // their workers may still run a stage of steps_
}

void hybrid_dispatch::save_state() {
    drain(copy_patience_us);
    std::vector<std::vector<int32_t>> resident(static_cast<size_t>(book_.n_layers()));
    for (int layer = 0; layer < book_.n_layers(); layer++) {
        std::vector<int32_t> & experts = resident[static_cast<size_t>(layer)];
        for (int32_t e = 0; e < book_.layer(layer).layout.n_expert; e++) {
            if (runtime_->cache().lookup(layer, e).state == slot_state::resident) {
                experts.push_back(e);
            }
        }
        // The best first: a smaller cache takes the front.
        const auto value = [&](int32_t e) {
            return runtime_->cache().policy().keep_value(runtime_->cache().shape().key(layer, e));
        };
        std::stable_sort(experts.begin(), experts.end(), [&](int32_t a, int32_t b) { return value(a) > value(b); });
    }
    if (!write_state(config_.state_path, book_, resident)) {
        log_.add("the expert cache's state could not be written to %s", config_.state_path.c_str());
    }
}

// ---------------------------------------------------------------------------------------------------------------
// before a block

bool hybrid_dispatch::prepare(const moe_block & block, const described_block & described, bool exact) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (phase_ == phase::learning && book_.is_known(described) && book_.n_layers() > 0 &&
        book_.find(block, described) == 0) {
        set_up(); // the first layer again: one pass is over, and all other memory has been taken
    }
    layer_             = book_.find(block, described);
    routed_            = false;
    const bool records = is_recording();
    if (layer_ < 0 || (phase_ != phase::ready && !trace_.is_active() && !records)) {
        return false;
    }
    if (layer_ <= last_layer_ || (layer_ == 0 && last_layer_ < 0)) {
        if (records) {
            recorder_->begin_pass(block.n_tokens(), clock_.now_us());
        }
        if (phase_ != phase::learning) {
            on_pass_end();
        }
    }
    last_layer_ = layer_;
    // The last layer of a micro-batch without outputs has no rows. A warm-up step asks for every expert: it must not
    // teach the cache.
    if (block.n_tokens() == 0 || (phase_ == phase::ready && block.top_k() > book_.layer(layer_).top_k)) {
        return false;
    }
    if (has_spans()) {
        times_       = {};
        times_.begin = clock_.now_us();
    }
    n_expert_       = block.n_expert;
    pairs_          = {};
    pairs_.n_tokens = block.n_tokens();
    pairs_.top_k    = static_cast<int32_t>(block.top_k());
    pairs_.exact    = exact;
    any_rest_       = false;
    if (phase_ != phase::learning) {
        pass_is_decode_ = pass_is_decode_ && pairs_.n_tokens <= governor::most_decode_tokens;
        pass_tokens_    = pairs_.n_tokens;
    }
    begin_us_ = clock_.now_us();
    return true;
}

void hybrid_dispatch::set_input(const float * x, size_t x_token_bytes, bool is_gate_input, const device_rows & there) {
    pairs_.x             = x;
    pairs_.x_there       = there;
    pairs_.x_token_bytes = x_token_bytes;
    const bool wanted    = phase_ == phase::ready && horizon_ > 0 && kernels_ != nullptr && is_gate_input &&
                           runtime_->prefetch_on() && pairs_.n_tokens <= look_ahead_tokens;
    if (wanted) {
        routers_.begin(layer_, std::min(horizon_, std::max(1, runtime_->horizon())), x, x_token_bytes, pairs_.n_tokens);
    } else {
        routers_.none();
    }
}

bool hybrid_dispatch::wants_scores() const {
    return (phase_ == phase::ready && needs_scores_) || (is_recording() && recorder_->with_scores());
}

void hybrid_dispatch::look_ahead(int thread, int n_threads) {
    routers_.compute(kernels_, thread, n_threads);
}

// ---------------------------------------------------------------------------------------------------------------
// between two passes

void hybrid_dispatch::on_pass_end() {
    if (trace_.is_active() && n_passes_ > 0) {
        trace_.next_pass(pass_tokens_);
    }
    n_passes_++;
    if (phase_ != phase::ready) {
        return;
    }
    guard_change change;
    // A pass that the accelerators had no part in says nothing about sharing.
    if (governor_.end_pass(pass_is_decode_ && pass_is_shared_, change)) {
        apply_guard(change);
    }
    if (!pass_is_decode_ && !was_prompt_) {
        runtime_->begin_prompt();
        note(trace_kind::prompt);
    }
    was_prompt_     = !pass_is_decode_;
    pass_is_decode_ = pass_is_shared_ = true;
    governor_.begin_pass();
    drift_report drift;
    while (governor_.is_live() && governor_.estimator().next_drift(drift)) {
        log_drift(drift);
    }
    if (n_passes_ % passes_between_looks == 0) {
        watch_memory();
    }
}

void hybrid_dispatch::log_drift(const drift_report & drift) const {
    const char * where = drift.device < 0 ? "CPU" : devices_[static_cast<size_t>(drift.device)]->port.name().c_str();
    const double since = (clock_.now_us() - drift.since_us) * 1e-6;
    const bool is_rate = drift.kind == cost_kind::dram || std::string(drift.parameter) == "bandwidth";
    const char * what  = drift.kind == cost_kind::copy  ? "link"
                         : drift.kind == cost_kind::cpu ? "CPU expert"
                         : drift.kind == cost_kind::gpu ? "GPU expert"
                                                        : "memory";
    if (is_rate) {
        log_.add("cost model: %s %s %.1f -> %.1f GB/s since %.0f s", what, where, drift.old_value * 1e-3,
                 drift.new_value * 1e-3, since);
    } else {
        log_.add("cost model: %s %s %s %.1f -> %.1f us since %.0f s", what, where, drift.parameter, drift.old_value,
                 drift.new_value, since);
    }
}

void hybrid_dispatch::apply_guard(const guard_change & change) {
    const runtime_limits & limits = runtime_->limits();
    note(trace_kind::limits, 0, limits.prefetch, limits.demand_copies, limits.admission);
    log_.add("guard: %s -> %s%s: experts take %.0f us a token, plain llama.cpp's best placement would take about %.0f",
             guard_level_name(change.from), guard_level_name(change.to), change.is_trial ? " on trial" : "",
             change.token_us, change.floor_us);
    const bool was_static = change.from == guard_level::static_layers;
    if (was_static == (change.to == guard_level::static_layers)) {
        return;
    }
    const double begin_us = clock_.now_us();
    for (size_t d = 0; d < devices_.size(); d++) {
        relayout(static_cast<int>(d), was_static ? current_slots(d) : static_slots(d));
        fill_layers(static_cast<int>(d));
    }
    governor_.on_refill(clock_.now_us() - begin_us);
}

// ---------------------------------------------------------------------------------------------------------------
// in a step

void hybrid_dispatch::take_results() {
    for (size_t d = 0; d < devices_.size(); d++) {
        devices_[d]->worker.collect(results_);
        for (const copy_result & result : results_) {
            if (result.id < 0) {
                continue;
            }
            const double now = clock_.now_us();
            if (result.ok) {
                if (runtime_->on_complete(result.id, now).ok()) {
                    note_copy(trace_kind::complete, result.id, now);
                }
                note_copied(result, now);
                governor_.on_copy(static_cast<int>(d), result.bytes, result.us, result.end_us);
            } else {
                if (runtime_->on_fail(result.id, now).ok()) {
                    note_copy(trace_kind::fail, result.id, now);
                }
                if (!told_copy_[d]) {
                    told_copy_[d] = true;
                    log_.add("%s: a copy failed: such experts run on the CPU", devices_[d]->port.name().c_str());
                }
            }
        }
    }
}

int64_t hybrid_dispatch::transfer_of(int layer, int expert) const {
    for (const transfer & t : runtime_->in_flight()) {
        if (t.layer == layer && t.expert == expert) {
            return t.id;
        }
    }
    return 0;
}

layer_event hybrid_dispatch::event_of(const float * scores) {
    layer_event event;
    event.layer   = layer_;
    event.n_rows  = static_cast<int>(pairs_.n_tokens);
    event.top_k   = pairs_.top_k;
    event.ids     = pairs_.ids;
    event.weights = pairs_.weights;
    event.scores  = n_expert_ == book_.max_experts() ? scores : widened(scores);
    return event;
}

bool hybrid_dispatch::is_paused() {
    const bool was_on = pause_.is_on();
    const bool is_on  = pause_.is_on(clock_.now_us());
    if (was_on && !is_on) {
        log_.add("experts are shared again");
    }
    return is_on;
}

void hybrid_dispatch::pause(const char * reason) {
    pause_.begin(reason, clock_.now_us());
    not_reproducible("a step failed");
    log_.add("%s: all experts on the CPU; sharing is tried again in %.0f s", reason,
             (pause_.until_us() - pause_.since_us()) * 1e-6);
}

// Of a step that failed on its way to the accelerators: waits for what was started, since it reads this step's rows,
// and takes back the copies that never were.
void hybrid_dispatch::give_up_step() noexcept try {
    for (const auto & step : steps_) {
        if (step->has_work()) {
            step->finish(copy_patience_us);
        }
    }
    if (!drain(copy_patience_us)) {
        return; // a copy got stuck: its slot stays taken until it ends
    }
    while (!runtime_->in_flight().empty()) {
        const int64_t id = runtime_->in_flight().front().id;
        const double now = clock_.now_us();
        if (!runtime_->on_fail(id, now).ok()) {
            return;
        }
        note_copy(trace_kind::fail, id, now);
    }
} catch (const std::exception & error) {
    log_.add("%s, while a failed step was given up", error.what());
}

bool hybrid_dispatch::plan(const float * scores) {
    if (is_paused()) {
        return false;
    }
    for (size_t d = 0; d < devices_.size(); d++) {
        if (is_suspended_[d] && devices_[d]->worker.wait_idle(no_wait_us)) {
            is_suspended_[d] = false;
            log_.add("%s copies again", devices_[d]->port.name().c_str());
        }
        if (is_suspended_[d]) {
            return false;
        }
    }
    take_results();
    event_              = event_of(scores);
    layer_event & event = event_;
    event.gap_us        = gap_us_;
    event.scratch       = pairs_.n_tokens > 1 && has_scratch();
    for (int distance = 1; distance <= max_lookahead; distance++) {
        const bool same               = layer_ + distance < book_.n_layers() &&
                                        book_.layer(layer_ + distance).layout.n_expert == book_.max_experts();
        event.lookahead[distance - 1] = same ? routers_.scores(distance) : nullptr;
    }
    if (governor_.begin_layer(event)) {
        note_costs();
    }
    const double now_us = clock_.now_us();
    const status done   = runtime_->on_layer(event, now_us, decision_);
    if (!done.ok()) {
        pause(done.message());
        return false;
    }
    pause_.on_success(now_us);
    if (is_recording()) {
        note_trial(now_us);
        recorder_->add_layer(event, book_.max_experts(), now_us, true);
        recorder_->add_transfers(*decision_);
    }
    return true;
}

// Scores of a layer with fewer experts than the largest one, padded with zeros.
const float * hybrid_dispatch::widened(const float * scores) {
    if (scores == nullptr) {
        return nullptr;
    }
    const auto wide = static_cast<size_t>(book_.max_experts());
    wide_scores_.assign(wide * static_cast<size_t>(pairs_.n_tokens), 0.0f);
    for (int64_t t = 0; t < pairs_.n_tokens; t++) {
        std::copy(scores + t * n_expert_, scores + (t + 1) * n_expert_,
                  wide_scores_.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(t) * wide));
    }
    return wide_scores_.data();
}

bool hybrid_dispatch::has_scratch() const {
    const int cls = book_.layer(layer_).cls;
    return book_.layer(layer_).llama_layer >= config_.n_cpu_layers &&
           std::all_of(devices_.begin(), devices_.end(),
                       [cls](const auto & device) { return device->scratch[static_cast<size_t>(cls)].n_slots() > 0; });
}

copy_order hybrid_dispatch::order_of(const transfer & t) {
    accelerator & device = *devices_[static_cast<size_t>(t.device)];
    copy_order order;
    order.id     = t.id;
    order.layout = &book_.layer(t.layer).layout;
    order.expert = t.expert;
    if (t.slot >= 0) {
        order.slots = &device.slots[static_cast<size_t>(t.layer)];
        order.slot  = t.slot;
    } else {
        // Round and round: a copy waits until the products that used its slot before are done.
        order.slots       = &device.scratch[static_cast<size_t>(book_.layer(t.layer).cls)];
        order.slot        = next_scratch_;
        order.slot_in_use = true;
        order.after       = device.scratch_event(next_scratch_);
        next_scratch_     = (next_scratch_ + 1) % n_scratch_slots;
    }
    return order;
}

// Hands every accelerator its items: resident ones, those whose copy is under way, then demanded ones in the order of
// their copies.
void hybrid_dispatch::share_out() {
    const expert_layout & layout = book_.layer(layer_).layout;
    const layer_plan & plan      = decision_->plan;
    where_.assign(static_cast<size_t>(n_expert_), cpu_device);
    n_cpu_ = n_gpu_ = 0;
    next_scratch_   = 0;
    for (size_t d = 0; d < devices_.size(); d++) {
        steps_[d]->begin(layout, pairs_, devices_[d]->port.is_cpu());
        orders_[d].clear();
    }
    for (const bool loading : {false, true}) {
        for (size_t i = 0; i < plan.placements.size(); i++) {
            const placement & at = plan.placements[i];
            const work_item & w  = decision_->items[i];
            if (at.device == cpu_device || at.copied || w.loading != loading) {
                continue;
            }
            device_item item;
            item.expert   = w.expert;
            item.n_tokens = w.n_tokens;
            item.slot     = decision_->slots[i];
            item.on       = &devices_[static_cast<size_t>(at.device)]->slots[static_cast<size_t>(layer_)];
            if (loading) {
                item.transfer = transfer_of(layer_, w.expert);
                devices_[static_cast<size_t>(at.device)]->worker.promote(item.transfer);
                orders_[static_cast<size_t>(at.device)].push_back({});
            }
            steps_[static_cast<size_t>(at.device)]->items().push_back(item);
        }
    }
    for (const transfer & t : decision_->transfers) {
        if (t.kind != transfer_kind::demand && t.kind != transfer_kind::scratch) {
            continue;
        }
        const copy_order order = order_of(t);
        device_item item;
        item.expert     = t.expert;
        item.slot       = order.slot;
        item.on         = order.slots;
        item.transfer   = t.id;
        item.is_scratch = t.slot < 0;
        steps_[static_cast<size_t>(t.device)]->items().push_back(item);
        orders_[static_cast<size_t>(t.device)].push_back(order);
    }
    for (size_t i = 0; i < plan.placements.size(); i++) {
        const work_item & w = decision_->items[i];
        if (plan.placements[i].device == cpu_device) {
            n_cpu_++;
        } else {
            n_gpu_++;
            where_[static_cast<size_t>(w.expert)] = plan.placements[i].device;
        }
    }
    times_.launch_begin = clock_.now_us();
    computed_inline_us_ = 0.0;
    const bool looks    = event_.trial.wanted && event_.trial.what.kind == resource_kind::gpu;
    for (size_t d = 0; d < devices_.size(); d++) {
        if (steps_[d]->has_work()) {
            launch_us_[d] = clock_.now_us();
            steps_[d]->launch(orders_[d], looks && event_.trial.what.device == static_cast<int>(d));
            computed_inline_us_ += devices_[d]->port.is_cpu() ? clock_.now_us() - launch_us_[d] : 0.0;
        }
    }
    for (const transfer & t : decision_->transfers) {
        if (t.kind == transfer_kind::admit || t.kind == transfer_kind::prefetch) {
            devices_[static_cast<size_t>(t.device)]->worker.copy(order_of(t), false);
        }
    }
}

const uint8_t * hybrid_dispatch::route(int32_t * ids, const float * weights, const float * scores) {
    std::lock_guard<std::mutex> lock(mutex_);
    try {
        if (phase_ == phase::learning) { // only to be recorded
            pairs_.ids     = ids;
            pairs_.weights = weights;
            note_unplanned(scores);
            return nullptr;
        }
        route_begin_us_ = clock_.now_us();
        gap_us_         = last_end_us_ == 0.0 ? 0.0 : 0.9 * gap_us_ + 0.1 * (route_begin_us_ - last_end_us_);
        pairs_.ids      = ids;
        pairs_.weights  = weights;
        if (trace_.is_active()) {
            trace_.replace(layer_, ids, pairs_.n_tokens, pairs_.top_k, static_cast<int32_t>(n_expert_));
        }
        if (phase_ != phase::ready || !plan(scores)) {
            pass_is_shared_ = false;
            note_unplanned(scores);
            return nullptr;
        }
        share_out();
        if (config_.faults.fail_step > 0 && ++n_planned_ == config_.faults.fail_step) {
            throw std::runtime_error("a step that fails on purpose");
        }
        routed_ = true;
        if (horizon_ > 0) {
            active_.clear();
            for (const work_item & w : decision_->items) {
                active_.push_back(w.expert);
            }
            routers_.check(layer_, active_.data(), active_.size(), pairs_.top_k);
        }
        const size_t n_pairs = static_cast<size_t>(pairs_.n_tokens * pairs_.top_k);
        take_.resize(n_pairs);
        for (size_t p = 0; p < n_pairs; p++) {
            take_[p] = where_[static_cast<size_t>(ids[p])] == cpu_device ? 1 : 0;
        }
        route_end_us_     = clock_.now_us();
        times_.launch_end = route_end_us_;
        return n_gpu_ == 0 ? nullptr : take_.data();
    } catch (const std::exception & error) {
        // Nothing may leave the team's region.
        pass_is_shared_ = false;
        pause(error.what());
        give_up_step();
        return nullptr;
    }
}

void hybrid_dispatch::finish() {
    any_rest_ = false;
    if (!routed_) {
        return;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    const double wait_begin_us = clock_.now_us();
    const double patience_us   = config_.faults.copy_patience_us > 0
                                     ? static_cast<double>(config_.faults.copy_patience_us)
                                     : copy_patience_us + copy_patience * decision_->plan.makespan_us;
    timing_                    = layer_timing();
    timing_.cpu_begin_us       = route_end_us_;
    timing_.cpu_us             = wait_begin_us - route_end_us_;
    double waited_us           = wait_begin_us;
    for (size_t d = 0; d < devices_.size(); d++) {
        if (!steps_[d]->has_work()) {
            continue;
        }
        if (steps_[d]->finish(patience_us)) {
            is_suspended_[d] = true;
            log_.add("%s: a copy did not end within %.1f s: its experts run on the CPU",
                     devices_[d]->port.name().c_str(), patience_us * 1e-6);
        }
        // A device ended by now; when it did so shows where it was waited for, or looked at, or computes in the call.
        const double begin_us    = waited_us;
        waited_us                = clock_.now_us();
        const device_step & step = *steps_[d];
        timing_.gpu_is_known[d]  = true;
        timing_.gpu_at_most[d]   = waited_us - begin_us < least_wait_us && !step.has_seen_end();
        timing_.gpu_us[d]        = waited_us - launch_us_[d];
        if (devices_[d]->port.is_cpu()) {
            timing_.gpu_at_most[d] = false;
            timing_.gpu_us[d]      = step.computed_us();
        } else if (step.has_seen_end()) {
            timing_.gpu_us[d] = clock_.of_us(step.seen_end()) - launch_us_[d];
        }
    }
    const double end_us = clock_.now_us();
    finish_end_us_      = end_us;
    find_rest();
    timing_.is_complete = !any_rest_;
    note_step(wait_begin_us, end_us);
    count_step(wait_begin_us, end_us);
}

// Tells the governor how the planned block went, when its result stands. x came down before we were called and y goes
// up after we return: both are priced.
void hybrid_dispatch::judge_step() {
    const double x_bytes = static_cast<double>(pairs_.x_token_bytes) * static_cast<double>(pairs_.n_tokens);
    double crossed_us    = 0.0;
    for (size_t d = 0; d < devices_.size() && pairs_.x_there.source != nullptr; d++) {
        if (ggml_backend_get_device(pairs_.x_there.source) == devices_[d]->port.device()) {
            crossed_us = 2.0 * governor_.costs().t_copy(static_cast<int>(d), x_bytes);
        }
    }
    // A CPU as device computed before the CPU's own share did, an accelerator computes beside it: count it so.
    const double in_turn_us = std::min(computed_inline_us_, timing_.cpu_us);
    double longest_us       = finish_end_us_ - route_end_us_; // the CPU's share, and waits for copies and accelerators
    for (size_t d = 0; d < devices_.size(); d++) {
        longest_us = std::max(longest_us, timing_.gpu_is_known[d] ? timing_.gpu_us[d] : 0.0);
    }
    timing_.now_us      = last_end_us_;
    timing_.span_us     = last_end_us_ - begin_us_ - in_turn_us + crossed_us;
    timing_.overhead_us = std::max(0.0, timing_.span_us - longest_us);
    timing_.cpu_us      = n_cpu_ > 0 ? timing_.cpu_us : -1.0;
    governor_.end_layer(event_, *decision_, timing_);
}

// Pairs that an accelerator was to compute and did not.
void hybrid_dispatch::find_rest() {
    rest_.assign(take_.size(), 0);
    for (size_t d = 0; d < devices_.size(); d++) {
        for (const device_item & item : steps_[d]->items()) {
            if (item.done) {
                continue;
            }
            any_rest_ = true;
            not_reproducible("an accelerator could not compute its experts");
            n_gpu_--;
            n_cpu_++;
            where_[static_cast<size_t>(item.expert)] = nowhere;
            const bool has_copy = item.transfer == 0 || !devices_[d]->worker.has_failed(item.transfer);
            if (has_copy && !is_suspended_[d] && !told_memory_[d]) {
                told_memory_[d] = true;
                log_.add("%s has no work memory for %lld tokens: such experts run on the CPU",
                         devices_[d]->port.name().c_str(), static_cast<long long>(pairs_.n_tokens));
            }
        }
    }
    for (size_t p = 0; any_rest_ && p < rest_.size(); p++) {
        rest_[p] = where_[static_cast<size_t>(pairs_.ids[p])] == nowhere ? 1 : 0;
    }
}

void hybrid_dispatch::count_step(double wait_begin_us, double end_us) {
    layer_counters & counts = counters_->layer(book_.layer(layer_).llama_layer);
    add(counts.plan_ns, static_cast<uint64_t>((route_end_us_ - route_begin_us_) * 1e3));
    add(counts.wait_ns, static_cast<uint64_t>((end_us - wait_begin_us) * 1e3));
    add(counts.n_hits, static_cast<uint64_t>(decision_->n_hits));
    add(counts.n_misses, static_cast<uint64_t>(decision_->n_misses));
    add(counts.n_late, static_cast<uint64_t>(decision_->n_late));
    if (pairs_.n_tokens == 1) {
        add(counts.n_decode, 1);
        // From the launch on: a device that computes while it is launched (a CPU as stand-in) does so here.
        add(counts.decode_ns, static_cast<uint64_t>((end_us - times_.launch_begin) * 1e3));
        add(counts.predicted_ns, static_cast<uint64_t>(decision_->plan.makespan_us * 1e3));
    }
    for (const transfer & t : decision_->transfers) {
        add(counts.h2d_bytes, static_cast<uint64_t>(t.bytes));
        add(counts.n_copies, 1);
        add(counts.n_evictions, t.evicted >= 0 ? 1 : 0);
        add(counts.n_prefetched, t.kind == transfer_kind::prefetch ? 1 : 0);
    }
}

void hybrid_dispatch::add_to(float * y, size_t y_token_bytes) const {
    if (!routed_) {
        return;
    }
    for (const auto & step : steps_) {
        if (step->has_work()) {
            step->add_to(y, y_token_bytes);
        }
    }
}

const float * hybrid_dispatch::row(int64_t token, int32_t k) const {
    if (!routed_) {
        return nullptr;
    }
    const int32_t device = where_[static_cast<size_t>(pairs_.ids[token * pairs_.top_k + k])];
    return device < 0 ? nullptr : steps_[static_cast<size_t>(device)]->row(token, k);
}

void hybrid_dispatch::end_block() {
    if (phase_ == phase::learning) {
        note_block_end();
        return;
    }
    last_end_us_ = clock_.now_us();
    if (routed_) {
        std::lock_guard<std::mutex> lock(mutex_);
        judge_step();
        runtime_->on_layer_done();
    }
    note_block_end();
}

} // namespace hybrimoe
