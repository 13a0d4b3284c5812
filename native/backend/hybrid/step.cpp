#include "hybrid/step.h"

#include <algorithm>
#include <exception>
#include <stdexcept>

namespace hybrimoe {

namespace {

constexpr double copy_patience = 20.0; // times the predicted time that a copy may take, beside copy_patience_us
constexpr int32_t nowhere      = -2;   // of an expert whose accelerator did not compute it

} // namespace

void step::start(runtime & rt, bool looks_ahead) {
    runtime_     = &rt;
    looks_ahead_ = looks_ahead;
}

// ---------------------------------------------------------------------------------------------------------------
// the block as it comes

void step::begin(int layer, const moe_block & block, bool exact, bool in_graph) {
    layer_          = layer;
    is_planned_     = false;
    n_expert_       = block.n_expert;
    pairs_          = {};
    pairs_.n_tokens = block.n_tokens();
    pairs_.top_k    = static_cast<int32_t>(block.top_k());
    pairs_.exact    = exact;
    in_graph_       = in_graph;
    is_settled_     = false;
    any_rest_       = false;
    begin_us_       = shared_.clock.now_us();
}

void step::set_input(const float * x, size_t x_token_bytes, const device_rows & there) {
    pairs_.x             = x;
    pairs_.x_there       = there;
    pairs_.x_token_bytes = x_token_bytes;
}

void step::set_routing(const int32_t * ids, const float * weights) {
    route_begin_us_ = shared_.clock.now_us();
    gap_us_         = last_end_us_ == 0.0 ? 0.0 : 0.9 * gap_us_ + 0.1 * (route_begin_us_ - last_end_us_);
    pairs_.ids      = ids;
    pairs_.weights  = weights;
}

layer_event step::event_of(const float * scores) {
    layer_event event;
    event.layer   = layer_;
    event.n_rows  = static_cast<int>(pairs_.n_tokens);
    event.top_k   = pairs_.top_k;
    event.ids     = pairs_.ids;
    event.weights = pairs_.weights;
    event.scores  = n_expert_ == shared_.book.max_experts() ? scores : widened(scores);
    event.gap_us  = gap_us_;
    return event;
}

// Scores of a layer with fewer experts than the largest one, padded with zeros.
const float * step::widened(const float * scores) {
    if (scores == nullptr) {
        return nullptr;
    }
    const auto wide = static_cast<size_t>(shared_.book.max_experts());
    wide_scores_.assign(wide * static_cast<size_t>(pairs_.n_tokens), 0.0f);
    for (int64_t t = 0; t < pairs_.n_tokens; t++) {
        std::copy(scores + t * n_expert_, scores + (t + 1) * n_expert_,
                  wide_scores_.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(t) * wide));
    }
    return wide_scores_.data();
}

// ---------------------------------------------------------------------------------------------------------------
// plan and launch

status step::plan(const float * scores) {
    devices_.take_results();
    event_              = event_of(scores);
    layer_event & event = event_;
    event.scratch       = pairs_.n_tokens > 1 && devices_.has_scratch(layer_) && !in_graph_;
    for (int distance = 1; distance <= max_lookahead; distance++) {
        const bool same = layer_ + distance < shared_.book.n_layers() &&
                          shared_.book.layer(layer_ + distance).layout.n_expert == shared_.book.max_experts();
        event.lookahead[distance - 1] = same ? routers_.scores(distance) : nullptr;
    }
    if (governor_.begin_layer(event)) {
        record_.on_costs(governor_.costs());
    }
    const double now_us = shared_.clock.now_us();
    const status done   = runtime_->on_layer(event, now_us, decision_);
    if (done.ok()) {
        record_.on_planned(event, *decision_, now_us);
    }
    return done;
}

int64_t step::transfer_of(int layer, int expert) const {
    for (const transfer & t : runtime_->in_flight()) {
        if (t.layer == layer && t.expert == expert) {
            return t.id;
        }
    }
    return 0;
}

copy_order step::order_of(const transfer & t) {
    accelerator & device = devices_[t.device];
    copy_order order;
    order.id     = t.id;
    order.layout = &shared_.book.layer(t.layer).layout;
    order.expert = t.expert;
    if (t.slot >= 0) {
        order.slots = &device.of_layer(t.layer);
        order.slot  = t.slot;
    } else {
        // Round and round: a copy waits until the products that used its slot before are done.
        order.slots       = &device.scratch[static_cast<size_t>(shared_.book.layer(t.layer).cls)];
        order.slot        = next_scratch_;
        order.slot_in_use = true;
        order.after       = device.scratch_event(next_scratch_);
        next_scratch_     = (next_scratch_ + 1) % n_scratch_slots;
    }
    return order;
}

// Hands every accelerator its items: resident ones, those whose copy is under way, then demanded ones in the order of
// their copies.
void step::add_items() {
    const expert_layout & layout = shared_.book.layer(layer_).layout;
    const layer_plan & plan      = decision_->plan;
    where_.assign(static_cast<size_t>(n_expert_), cpu_device);
    n_cpu_ = n_gpu_ = 0;
    next_scratch_   = 0;
    for (int d = 0; d < devices_.size(); d++) {
        devices_[d].share->begin(layout, pairs_, devices_[d].port.is_cpu(), in_graph_);
        devices_[d].orders.clear();
    }
    for (const bool loading : {false, true}) {
        for (size_t i = 0; i < plan.placements.size(); i++) {
            const placement & at = plan.placements[i];
            const work_item & w  = decision_->items[i];
            if (at.device == cpu_device || at.copied || w.loading != loading) {
                continue;
            }
            accelerator & device = devices_[at.device];
            device_item item;
            item.expert   = w.expert;
            item.n_tokens = w.n_tokens;
            item.slot     = decision_->slots[i];
            item.on       = &device.of_layer(layer_);
            if (loading) {
                item.transfer = transfer_of(layer_, w.expert);
                device.worker.promote(item.transfer);
                device.orders.push_back({});
            }
            device.share->items().push_back(item);
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
        devices_[t.device].share->items().push_back(item);
        devices_[t.device].orders.push_back(order);
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
}

// Accelerators first, then copies for later.
void step::launch() {
    launch_begin_us_    = shared_.clock.now_us();
    computed_inline_us_ = 0.0;
    const bool looks    = is_watched();
    for (int d = 0; d < devices_.size(); d++) {
        accelerator & device = devices_[d];
        if (device.share->has_work()) {
            device.launch_us = shared_.clock.now_us();
            device.share->launch(device.orders, looks && event_.trial.what.device == d);
            computed_inline_us_ += device.port.is_cpu() && !in_graph_ ? shared_.clock.now_us() - device.launch_us : 0.0;
        }
    }
    for (const transfer & t : decision_->transfers) {
        if (t.kind == transfer_kind::admit || t.kind == transfer_kind::prefetch) {
            devices_[t.device].worker.copy(order_of(t), false);
        }
    }
}

const uint8_t * step::share_out() {
    add_items();
    launch();
    if (shared_.config.faults.fail_step > 0 && ++n_shared_ == shared_.config.faults.fail_step) {
        throw std::runtime_error("a step that fails on purpose");
    }
    if (looks_ahead_) {
        active_.clear();
        for (const work_item & w : decision_->items) {
            active_.push_back(w.expert);
        }
        routers_.check(layer_, active_.data(), active_.size(), pairs_.top_k);
    }
    mark_cpu_pairs();
    rest_.resize(take_.size()); // so that leave_to_cpu() needs no memory
    is_planned_   = true;
    route_end_us_ = shared_.clock.now_us();
    return n_gpu_ == 0 ? nullptr : take_.data();
}

void step::mark_cpu_pairs() {
    take_.resize(static_cast<size_t>(pairs_.n_tokens * pairs_.top_k));
    for (size_t p = 0; p < take_.size(); p++) {
        take_[p] = where_[static_cast<size_t>(pairs_.ids[p])] == cpu_device ? 1 : 0;
    }
}

const uint8_t * step::settle_in_graph() {
    for (int d = 0; d < devices_.size(); d++) {
        if (devices_[d].share->has_work() && devices_[d].share->await_copies(patience_us())) {
            devices_.set_aside(d, patience_us());
        }
    }
    find_rest();
    for (int32_t & device : where_) {
        device = device == nowhere ? cpu_device : device;
    }
    mark_cpu_pairs();
    is_settled_   = true;
    timing_       = layer_timing();
    route_end_us_ = shared_.clock.now_us(); // until here the CPU was not free for its share
    return n_gpu_ == 0 ? nullptr : take_.data();
}

int step::slot_in_graph(int32_t expert) const {
    return devices_[0].share->slot_in_graph(expert);
}

void step::watch(ggml_backend_t compute) {
    devices_[0].share->watch(compute);
}

double step::patience_us() const {
    return shared_.config.faults.copy_patience_us > 0 ? static_cast<double>(shared_.config.faults.copy_patience_us)
                                                      : copy_patience_us + copy_patience * decision_->plan.makespan_us;
}

void step::give_up() noexcept try {
    for (int d = 0; d < devices_.size(); d++) {
        if (devices_[d].share->has_work()) {
            devices_[d].share->finish(copy_patience_us);
        }
    }
    if (!devices_.drain(copy_patience_us)) {
        return; // a copy got stuck: its slot stays taken until it ends
    }
    while (!runtime_->in_flight().empty()) {
        const int64_t id = runtime_->in_flight().front().id;
        const double now = shared_.clock.now_us();
        if (!runtime_->on_fail(id, now).ok()) {
            return;
        }
        record_.on_fail(id, now);
    }
} catch (const std::exception & error) {
    shared_.log.add("%s, while a failed step was given up", error.what());
}

// ---------------------------------------------------------------------------------------------------------------
// finish

void step::finish() {
    any_rest_ = any_rest_ && is_settled_;
    if (!is_planned_) {
        return;
    }
    const double wait_begin_us = shared_.clock.now_us();
    timing_                    = layer_timing();
    timing_.cpu_begin_us       = route_end_us_;
    timing_.cpu_us             = wait_begin_us - route_end_us_;
    double waited_us           = wait_begin_us;
    for (int d = 0; d < devices_.size(); d++) {
        accelerator & device = devices_[d];
        device_step & share  = *device.share;
        if (!share.has_work()) {
            continue;
        }
        if (share.finish(patience_us())) {
            devices_.set_aside(d, patience_us());
        }
        // A device ended by now; when it did so shows where it was waited for, or looked at, or computes in the call.
        const double begin_us   = waited_us;
        waited_us               = shared_.clock.now_us();
        timing_.gpu_is_known[d] = true;
        timing_.gpu_at_most[d]  = waited_us - begin_us < least_wait_us && !share.has_seen_end();
        timing_.gpu_us[d]       = waited_us - device.launch_us;
        if (in_graph_) { // nobody waits for it here: the next layer's ids come when it has ended
            timing_.gpu_is_known[d] = share.has_seen_end();
            timing_.gpu_at_most[d]  = false;
            timing_.gpu_us[d]       = shared_.clock.of_us(share.seen_end()) - device.launch_us;
        } else if (device.port.is_cpu()) {
            timing_.gpu_at_most[d] = false;
            timing_.gpu_us[d]      = share.computed_us();
        } else if (share.has_seen_end()) {
            timing_.gpu_us[d] = shared_.clock.of_us(share.seen_end()) - device.launch_us;
        }
    }
    const double end_us = shared_.clock.now_us();
    finish_end_us_      = end_us;
    if (shared_.config.faults.fail_finish > 0 && ++n_finished_ == shared_.config.faults.fail_finish) {
        throw std::runtime_error("a step that fails at its end on purpose");
    }
    if (!is_settled_) {
        find_rest();
    }
    timing_.is_complete = !any_rest_;
    any_rest_           = any_rest_ && !is_settled_; // the CPU has computed it with the others
    done_block done;
    done.layer           = layer_;
    done.n_cpu           = n_cpu_;
    done.n_gpu           = n_gpu_;
    done.planned         = decision_;
    done.devices         = &where_;
    done.launch_begin_us = launch_begin_us_;
    done.launch_end_us   = route_end_us_;
    done.wait_begin_us   = wait_begin_us;
    done.end_us          = end_us;
    record_.on_done(done, devices_, governor_.costs());
    count_step(wait_begin_us, end_us);
}

void step::leave_to_cpu() noexcept {
    for (int d = 0; d < devices_.size(); d++) {
        devices_[d].share->items().clear();
    }
    for (int32_t & device : where_) {
        device = device == cpu_device ? cpu_device : nowhere;
    }
    any_rest_ = false;
    for (size_t p = 0; p < take_.size(); p++) {
        rest_[p]  = take_[p] == 0 ? 1 : 0;
        any_rest_ = any_rest_ || rest_[p] != 0;
    }
    n_cpu_ += n_gpu_;
    n_gpu_              = 0;
    finish_end_us_      = shared_.clock.now_us();
    timing_             = layer_timing();
    timing_.cpu_us      = 0.0;
    timing_.is_complete = false; // teaches nothing
}

// Pairs that an accelerator was to compute and did not.
void step::find_rest() {
    rest_.assign(take_.size(), 0);
    for (int d = 0; d < devices_.size(); d++) {
        for (const device_item & item : devices_[d].share->items()) {
            if (item.done) {
                continue;
            }
            any_rest_ = true;
            promise_.broken("an accelerator could not compute its experts");
            n_gpu_--;
            n_cpu_++;
            where_[static_cast<size_t>(item.expert)] = nowhere;
            const bool has_copy = item.transfer == 0 || !devices_[d].worker.has_failed(item.transfer);
            if (has_copy && !devices_[d].is_suspended) {
                devices_.tell_no_memory(d, pairs_.n_tokens);
            }
        }
    }
    for (size_t p = 0; any_rest_ && p < rest_.size(); p++) {
        rest_[p] = where_[static_cast<size_t>(pairs_.ids[p])] == nowhere ? 1 : 0;
    }
}

void step::count_step(double wait_begin_us, double end_us) {
    layer_counters & counts = counters_.layer(shared_.book.layer(layer_).llama_layer);
    add(counts.plan_ns, static_cast<uint64_t>((route_end_us_ - route_begin_us_) * 1e3));
    add(counts.wait_ns, static_cast<uint64_t>((end_us - wait_begin_us) * 1e3));
    add(counts.n_hits, static_cast<uint64_t>(decision_->n_hits));
    add(counts.n_misses, static_cast<uint64_t>(decision_->n_misses));
    add(counts.n_late, static_cast<uint64_t>(decision_->n_late));
    if (pairs_.n_tokens == 1) {
        add(counts.n_decode, 1);
        // From the launch on: a device that computes while it is launched (a CPU as stand-in) does so here.
        add(counts.decode_ns, static_cast<uint64_t>((end_us - launch_begin_us_) * 1e3));
        add(counts.predicted_ns, static_cast<uint64_t>(decision_->plan.makespan_us * 1e3));
    }
    for (const transfer & t : decision_->transfers) {
        add(counts.h2d_bytes, static_cast<uint64_t>(t.bytes));
        add(counts.n_copies, 1);
        add(counts.n_evictions, t.evicted >= 0 ? 1 : 0);
        add(counts.n_prefetched, t.kind == transfer_kind::prefetch ? 1 : 0);
    }
}

void step::add_to(float * y, size_t y_token_bytes) const {
    if (!is_planned_) {
        return;
    }
    for (int d = 0; d < devices_.size(); d++) {
        if (devices_[d].share->has_work()) {
            devices_[d].share->add_to(y, y_token_bytes);
        }
    }
}

const float * step::row(int64_t token, int32_t k) const {
    if (!is_planned_) {
        return nullptr;
    }
    const int32_t device = where_[static_cast<size_t>(pairs_.ids[token * pairs_.top_k + k])];
    return device < 0 ? nullptr : devices_[device].share->row(token, k);
}

void step::end() {
    last_end_us_ = shared_.clock.now_us();
    if (is_planned_) {
        judge_step();
        runtime_->on_layer_done();
    }
}

// Tells the governor how the planned block went, when its result stands. x came down before we were called and y goes
// up after we return: both are priced.
void step::judge_step() {
    const double x_bytes = static_cast<double>(pairs_.x_token_bytes) * static_cast<double>(pairs_.n_tokens);
    double crossed_us    = 0.0;
    for (int d = 0; d < devices_.size() && pairs_.x_there.source != nullptr; d++) {
        if (ggml_backend_get_device(pairs_.x_there.source) == devices_[d].port.device()) {
            crossed_us = 2.0 * governor_.costs().t_copy(d, x_bytes);
        }
    }
    // A CPU as device computed before the CPU's own share did, an accelerator computes beside it: count it so.
    const double in_turn_us = std::min(computed_inline_us_, timing_.cpu_us);
    double longest_us       = finish_end_us_ - route_end_us_; // the CPU's share, and waits for copies and accelerators
    for (int d = 0; d < devices_.size(); d++) {
        longest_us = std::max(longest_us, timing_.gpu_is_known[d] ? timing_.gpu_us[d] : 0.0);
    }
    timing_.now_us      = last_end_us_;
    timing_.span_us     = last_end_us_ - begin_us_ - in_turn_us + crossed_us;
    timing_.overhead_us = std::max(0.0, timing_.span_us - longest_us);
    timing_.cpu_us      = n_cpu_ > 0 ? timing_.cpu_us : -1.0;
    governor_.end_layer(event_, *decision_, timing_);
}

} // namespace hybrimoe
