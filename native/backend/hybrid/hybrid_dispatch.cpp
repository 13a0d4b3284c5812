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
constexpr int64_t most_decode_tokens   = 16;   // speculation and parallel clients decode several tokens a step
constexpr double copy_patience         = 20.0; // times the predicted time that a copy may take
constexpr double copy_patience_us      = 1e7;  // and this much more: a first launch may compile shaders
constexpr double least_wait_us         = 5.0;  // a shorter wait says nothing about the accelerator's time
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
        pass_is_decode_ = pass_is_decode_ && pairs_.n_tokens <= most_decode_tokens;
        pass_tokens_    = pairs_.n_tokens;
    }
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
    // The floor is that of one token, and a pass without the accelerators says nothing about sharing.
    const bool is_judged = pass_is_decode_ && pass_tokens_ == 1 && pass_us_ > 0.0 && !pause_.is_on();
    if (config_.guard && is_judged && guard_.on_token(pass_us_, floor_us(), change)) {
        apply_guard(change);
    }
    if (!pass_is_decode_ && !was_prompt_) {
        runtime_->begin_prompt();
        note(trace_kind::prompt);
    }
    was_prompt_     = !pass_is_decode_;
    pass_us_        = 0.0;
    pass_is_decode_ = true;
    if (live_ && estimator_.moved() && estimator_.apply(costs_).ok()) {
        if (runtime_->set_costs(costs_).ok()) {
            note_costs();
        }
    }
    drift_report drift;
    while (live_ && estimator_.next_drift(drift)) {
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

// What the best plain placement with the same memory would take for one token's experts: all on the CPU, or as many
// whole layers as fit on the accelerators.
double hybrid_dispatch::floor_us() const {
    double all_cpu  = 0.0;
    double with_gpu = 0.0;
    std::vector<double> budget(devices_.size(), 0.0);
    for (size_t d = 0; d < devices_.size(); d++) {
        for (const slot_set & set : devices_[d]->slots) {
            budget[d] += static_cast<double>(set.n_bytes());
        }
    }
    for (int layer = 0; layer < book_.n_layers(); layer++) {
        const known_layer & known = book_.layer(layer);
        const double cpu          = costs_.step_us(cpu_device) + costs_.t_cpu(layer, 1, true) +
                                    (known.top_k - 1) * costs_.t_cpu(layer, 1, false);
        double best               = cpu;
        const double bytes        = static_cast<double>(known.layout.expert_bytes()) * known.layout.n_expert;
        for (size_t d = 0; d < devices_.size(); d++) {
            const double gpu =
                costs_.step_us(static_cast<int>(d)) + known.top_k * costs_.t_gpu(layer, static_cast<int>(d), 1);
            if (bytes <= budget[d] && gpu < best) {
                budget[d] -= bytes;
                best = gpu;
            }
        }
        all_cpu += cpu;
        with_gpu += best;
    }
    return std::min(all_cpu, with_gpu);
}

void hybrid_dispatch::apply_guard(const guard_change & change) {
    const int level = static_cast<int>(change.to);
    runtime_limits limits;
    limits.prefetch      = level < static_cast<int>(guard_level::no_prefetch);
    limits.demand_copies = level < static_cast<int>(guard_level::no_demand);
    limits.admission     = level < static_cast<int>(guard_level::frozen);
    runtime_->set_limits(limits);
    note(trace_kind::limits, 0, limits.prefetch, limits.demand_copies, limits.admission);
    log_.add("guard: %s -> %s%s: experts take %.0f us a token, plain llama.cpp's best placement would take %.0f",
             guard_level_name(change.from), guard_level_name(change.to), change.is_trial ? " on trial" : "",
             change.token_us, change.floor_us);
    const bool was_static = change.from == guard_level::static_layers;
    if (was_static == (change.to == guard_level::static_layers)) {
        return;
    }
    for (size_t d = 0; d < devices_.size(); d++) {
        relayout(static_cast<int>(d), was_static ? current_slots(d) : static_slots(d));
        fill_layers(static_cast<int>(d));
    }
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
                if (live_) {
                    estimator_.observe_copy(static_cast<int>(d), result.bytes, result.us, now);
                }
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
    layer_event event = event_of(scores);
    event.gap_us      = gap_us_;
    event.scratch     = pairs_.n_tokens > 1 && has_scratch();
    for (int distance = 1; distance <= max_lookahead; distance++) {
        const bool same               = layer_ + distance < book_.n_layers() &&
                                        book_.layer(layer_ + distance).layout.n_expert == book_.max_experts();
        event.lookahead[distance - 1] = same ? routers_.scores(distance) : nullptr;
    }
    const double now_us = clock_.now_us();
    const status done   = runtime_->on_layer(event, now_us, decision_);
    if (!done.ok()) {
        pause(done.message());
        return false;
    }
    pause_.on_success(now_us);
    if (is_recording()) {
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
    cpu_loads_.clear();
    for (size_t d = 0; d < devices_.size(); d++) {
        steps_[d]->begin(layout, pairs_, has_spans());
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
            cpu_loads_.push_back(w.n_tokens);
        } else {
            n_gpu_++;
            where_[static_cast<size_t>(w.expert)] = plan.placements[i].device;
        }
    }
    times_.launch_begin = clock_.now_us();
    for (size_t d = 0; d < devices_.size(); d++) {
        if (steps_[d]->has_work()) {
            steps_[d]->launch(orders_[d]);
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
            note_unplanned(scores);
            return nullptr;
        }
        share_out();
        if (config_.faults.fail_step > 0 && ++n_planned_ == config_.faults.fail_step) {
            throw std::runtime_error("a step that fails on purpose");
        }
        routed_       = true;
        copied_bytes_ = copied_so_far();
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
        pause(error.what());
        give_up_step();
        return nullptr;
    }
}

double hybrid_dispatch::copied_so_far() const {
    double bytes = 0.0;
    for (const auto & device : devices_) {
        bytes += static_cast<double>(device->worker.n_bytes_copied());
    }
    return bytes;
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
    for (size_t d = 0; d < devices_.size(); d++) {
        if (steps_[d]->has_work() && steps_[d]->finish(patience_us)) {
            is_suspended_[d] = true;
            log_.add("%s: a copy did not end within %.1f s: its experts run on the CPU",
                     devices_[d]->port.name().c_str(), patience_us * 1e-6);
        }
    }
    const double end_us = clock_.now_us();
    find_rest();
    note_step(wait_begin_us, end_us);
    observe_step(wait_begin_us, end_us);
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

void hybrid_dispatch::observe_step(double wait_begin_us, double end_us) {
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
    if (!live_ || any_rest_) {
        return;
    }
    if (!cpu_loads_.empty()) {
        estimator_.observe_cpu(layer_, cpu_loads_.data(), static_cast<int>(cpu_loads_.size()),
                               wait_begin_us - route_end_us_, copied_so_far() - copied_bytes_, end_us);
    }
    for (size_t d = 0; d < devices_.size(); d++) {
        // The accelerator's own time shows only where it was waited for, and not for a copy.
        const std::vector<device_item> & items = steps_[d]->items();
        const bool shows =
            devices_.size() == 1 && !items.empty() && end_us - wait_begin_us > least_wait_us &&
            std::all_of(items.begin(), items.end(), [](const device_item & i) { return i.transfer == 0; });
        if (shows) {
            gpu_loads_.clear();
            for (const device_item & item : items) {
                gpu_loads_.push_back(item.n_tokens);
            }
            estimator_.observe_gpu(layer_, static_cast<int>(d), gpu_loads_.data(), static_cast<int>(gpu_loads_.size()),
                                   end_us - route_end_us_, end_us);
        }
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
    if (phase_ == phase::ready) {
        pass_us_ += last_end_us_ - route_begin_us_;
    }
    if (routed_) {
        std::lock_guard<std::mutex> lock(mutex_);
        runtime_->on_layer_done();
    }
    note_block_end();
}

} // namespace hybrimoe
