#include "governor.h"

#include <algorithm>
#include <cmath>

namespace hybrimoe {

namespace {

constexpr double refuting = 1.3;
// Of a pass's layers up to a third may be far slower than planned, by this factor over the usual one, without a word
// from the guard: another program's time slices hit plain llama.cpp as well. Unless it is so many on average over some
// passes, or layers with copies lose so much of the time: copies are what the guard gives up.
constexpr size_t rare_part      = 3;
constexpr double rare_ratio     = 2.0;
constexpr double rare_share     = 0.15;
constexpr double rare_lost_time = 0.25;
constexpr double rare_rate      = 1.0 / 24.0;

} // namespace

status governor::create(const cost_model & calibrated, const governor_options & options, runtime & rt, governor & out) {
    governor made;
    made.options_ = options;
    made.runtime_ = &rt;
    made.costs_   = calibrated;
    HYBRIMOE_TRY(cost_estimator::create(calibrated, options.estimator, made.estimator_));
    guard_options levels = options.levels;
    levels.has_prefetch  = levels.has_prefetch && rt.has_prefetch();
    made.guard_          = hybrimoe::guard(levels);
    trial_options tries  = options.trials;
    tries.on             = tries.on && options.live;
    made.trials_         = trials(calibrated.n_devices(), tries);
    made.plain_.resize(static_cast<size_t>(calibrated.n_layers()));
    out = std::move(made);
    return {};
}

status governor::set_costs(const cost_model & costs) {
    HYBRIMOE_TRY(runtime_->set_costs(costs));
    costs_ = costs;
    return {};
}

void governor::begin_pass() {
    estimator_.next_pass();
    trials_.next_pass(estimator_, last_pass_us_);
    pass_us_ = overhead_us_ = price_us_ = 0.0;
    std::fill(plain_.begin(), plain_.end(), plain_layer());
    planned_.clear();
}

bool governor::begin_layer(layer_event & event) {
    settle();
    const bool may_try = options_.live && event.n_rows <= most_decode_tokens;
    event.trial        = may_try ? trials_.next(estimator_) : trial_request();
    event.calibrated   = &estimator_.calibrated();
    return options_.live && estimator_.moved() && estimator_.apply(costs_).ok() && runtime_->set_costs(costs_).ok();
}

void governor::end_layer(const layer_event & event, const decision & made, const layer_timing & timing) {
    pass_us_ += timing.span_us;
    overhead_us_ += timing.overhead_us;
    plain_layer & plain = plain_[static_cast<size_t>(event.layer)];
    plain.cpu_us        = costs_.step_us(cpu_device) + costs_.of_layer(event.layer).cpu_first_us;
    for (int d = 0; d < costs_.n_devices(); ++d) {
        plain.gpu_us[d] = costs_.step_us(d);
    }
    for (const work_item & w : made.items) {
        plain.cpu_us += costs_.t_cpu(event.layer, w.n_tokens, false);
        for (int d = 0; d < costs_.n_devices(); ++d) {
            plain.gpu_us[d] += costs_.t_gpu(event.layer, d, w.n_tokens);
        }
    }
    settle();
    layer_sample & s = sample_;
    s.is_new         = options_.live;
    s.timing         = timing;
    s.layer          = event.layer;
    s.is_tried       = made.is_tried;
    s.tried          = event.trial.what;
    s.price_us       = made.is_tried ? std::max(0.0, timing.span_us - timing.overhead_us - made.untried_us) : 0.0;
    price_us_ += s.price_us;
    if (made.refused_us > 0.0) {
        trials_.on_refused(event.trial.what, made.refused_us);
    }
    for (auto & loads : s.loads) {
        loads.clear();
    }
    bool waits_for_copy[max_devices]{};
    for (size_t i = 0; i < made.items.size(); ++i) {
        const placement & at = made.plan.placements[i];
        s.loads[at.device + 1].push_back(made.items[i].n_tokens);
        if (at.device != cpu_device) {
            waits_for_copy[at.device] = waits_for_copy[at.device] || at.copied || made.items[i].loading;
        }
    }
    planned_.push_back({timing.span_us, timing.span_us / std::max(made.untried_us + timing.overhead_us, 1e-3),
                        std::any_of(waits_for_copy, waits_for_copy + max_devices, [](bool waits) { return waits; })});
    for (int d = 0; d < costs_.n_devices(); ++d) {
        // A copy that it waited for is the link's time, not the accelerator's.
        if (waits_for_copy[d] || !timing.gpu_is_known[d]) {
            s.loads[d + 1].clear();
        }
    }
    if (timing.cpu_us >= 0.0 && !s.loads[0].empty()) {
        double alone_us = costs_.step_us(cpu_device) + costs_.of_layer(event.layer).cpu_first_us;
        for (const int32_t n : s.loads[0]) {
            alone_us += costs_.t_cpu(event.layer, n, false);
        }
        const double bytes = costs_.of_layer(event.layer).bytes * static_cast<double>(s.loads[0].size());
        s.cpu              = {cpu_device, timing.cpu_begin_us, timing.cpu_begin_us + timing.cpu_us, bytes,
                              bytes / std::max(alone_us, 1e-3)};
        keep(s.cpu);
    }
}

void governor::on_copy(int device, double bytes, double us, double now_us) {
    if (options_.live && us > 0.0) {
        copies_.push_back({device, now_us - us, now_us, bytes, bytes / costs_.t_copy(device, bytes)});
        keep(copies_.back());
        link_end_us_[device] = now_us;
    }
}

// A layer and the copies that ended in it are looked at together: each slows the others down.
void governor::settle() {
    for (const reading & c : copies_) {
        estimator_.observe_copy(c.device, c.bytes, c.end_us - c.begin_us, c.end_us, beside(c));
    }
    copies_.clear();
    if (!sample_.is_new) {
        return;
    }
    sample_.is_new         = false;
    const layer_timing & t = sample_.timing;
    const auto n_of        = [this](int device) { return static_cast<int>(sample_.loads[device + 1].size()); };
    if (t.is_complete && t.cpu_us >= 0.0 && n_of(cpu_device) > 0) {
        estimator_.observe_cpu(sample_.layer, sample_.loads[0].data(), n_of(cpu_device), t.cpu_us, t.now_us,
                               beside(sample_.cpu));
    }
    for (int d = 0; t.is_complete && d < costs_.n_devices(); ++d) {
        if (n_of(d) > 0) {
            estimator_.observe_gpu(sample_.layer, d, sample_.loads[d + 1].data(), n_of(d), t.gpu_us[d], t.now_us,
                                   t.gpu_at_most[d]);
        }
    }
    if (sample_.is_tried) {
        trials_.on_tried(sample_.tried, sample_.price_us, estimator_);
    }
}

void governor::keep(const reading & one) {
    readings_[next_reading_] = one;
    next_reading_            = (next_reading_ + 1) % n_readings;
}

// In every moment in which several read, the ceiling is shared in proportion to what they ask for. What one of them
// would not reach alone is its own cost.
memory_share governor::beside(const reading & own) const {
    memory_share out;
    const double whole_us = own.end_us - own.begin_us;
    if (!std::isfinite(costs_.dram_bytes_per_us()) || !(whole_us > 0.0)) {
        return out;
    }
    reading others[n_readings + max_devices];
    size_t n        = 0;
    const auto look = [&](reading r) {
        const double first = std::max(r.begin_us, own.begin_us), last = std::min(r.end_us, own.end_us);
        if (r.device != own.device && last > first) {
            out.bytes += r.bytes * (last - first) / (r.end_us - r.begin_us);
            r.begin_us  = first;
            r.end_us    = last;
            others[n++] = r;
        }
    };
    for (const reading & r : readings_) {
        look(r);
    }
    // The copy that a link is at began when the one before it ended.
    bool is_seen[max_devices]{};
    for (const transfer & t : runtime_->in_flight()) {
        if (!is_seen[t.device]) {
            is_seen[t.device]  = true;
            const double asked = t.bytes / costs_.t_copy(t.device, t.bytes);
            const double begin = std::max(link_end_us_[t.device], t.start_us);
            const double speed = std::min(1.0, costs_.dram_bytes_per_us() / (asked + own.asked));
            look({t.device, begin, own.end_us, asked * speed * std::max(0.0, own.end_us - begin), asked});
        }
    }
    double edges[2 * (n_readings + max_devices) + 2];
    size_t n_edges   = 0;
    edges[n_edges++] = own.begin_us;
    edges[n_edges++] = own.end_us;
    for (size_t i = 0; i < n; ++i) {
        edges[n_edges++] = others[i].begin_us;
        edges[n_edges++] = others[i].end_us;
    }
    std::sort(edges, edges + n_edges);
    // A rate that is clearly above the ceiling refutes it.
    const double reached = (own.bytes + out.bytes) / whole_us;
    const double ceiling = reached > refuting * costs_.dram_bytes_per_us() ? reached : costs_.dram_bytes_per_us();
    double speed_us = 0.0, shared_us = 0.0;
    for (size_t e = 0; e + 1 < n_edges; ++e) {
        double asked = std::min(own.asked, ceiling);
        for (size_t i = 0; i < n; ++i) {
            const bool reads = others[i].begin_us <= edges[e] && others[i].end_us >= edges[e + 1];
            asked += reads ? std::min(others[i].asked, ceiling) : 0.0;
        }
        const double us = edges[e + 1] - edges[e];
        speed_us += us * std::min(1.0, ceiling / asked);
        shared_us += asked > ceiling ? us : 0.0;
    }
    out.speed  = speed_us / whole_us;
    out.shared = shared_us / whole_us;
    return out;
}

double governor::plain_us() const {
    std::vector<double> budget(static_cast<size_t>(costs_.n_devices()), 0.0);
    for (int d = 0; d < costs_.n_devices(); ++d) {
        for (int layer = 0; layer < costs_.n_layers(); ++layer) {
            budget[static_cast<size_t>(d)] +=
                costs_.of_layer(layer).bytes * std::max(0, runtime_->cache().n_slots(layer, d));
        }
    }
    double all_cpu = 0.0, with_gpu = 0.0;
    for (int layer = 0; layer < costs_.n_layers(); ++layer) {
        const plain_layer & plain = plain_[static_cast<size_t>(layer)];
        const double bytes        = costs_.of_layer(layer).bytes * runtime_->cache().shape().n_expert;
        double best               = plain.cpu_us;
        int on                    = cpu_device;
        for (int d = 0; d < costs_.n_devices() && plain.cpu_us > 0.0; ++d) {
            if (bytes <= budget[static_cast<size_t>(d)] && plain.gpu_us[d] < best) {
                best = plain.gpu_us[d];
                on   = d;
            }
        }
        if (on != cpu_device) {
            budget[static_cast<size_t>(on)] -= bytes;
        }
        all_cpu += plain.cpu_us;
        with_gpu += best;
    }
    return std::min(all_cpu, with_gpu);
}

// The pass's time as the guard counts it: rare layers count as planned.
double governor::judged_us() {
    std::sort(planned_.begin(), planned_.end(),
              [](const planned_layer & a, const planned_layer & b) { return a.ratio < b.ratio; });
    double rare_us = 0.0, rare_copies_us = 0.0;
    int n_rare         = 0;
    const size_t n     = planned_.size();
    const double usual = n == 0 ? 1.0 : planned_[n / 2].ratio;
    for (size_t i = n - n / rare_part; i < n; ++i) {
        const planned_layer & layer = planned_[i];
        if (layer.ratio > rare_ratio * usual) {
            (layer.has_copies ? rare_copies_us : rare_us) += layer.span_us * (1.0 - usual / layer.ratio);
            n_rare++;
        }
    }
    if (n > 0 && pass_us_ > 0.0) {
        rare_ += (n_rare / static_cast<double>(n) - rare_) * rare_rate;
        lost_in_copies_ += (rare_copies_us / pass_us_ - lost_in_copies_) * rare_rate;
    }
    return rare_ > rare_share ? pass_us_
                              : pass_us_ - rare_us - (lost_in_copies_ > rare_lost_time ? 0.0 : rare_copies_us);
}

bool governor::end_pass(bool is_decode, guard_change & change) {
    settle();
    last_pass_us_     = pass_us_;
    last_overhead_us_ = overhead_us_;
    floor_us_         = plain_us();
    int64_t n_changes = 0;
    resource all[1 + 2 * max_devices];
    int n    = 0;
    all[n++] = {resource_kind::cpu, cpu_device};
    for (int d = 0; d < costs_.n_devices(); ++d) {
        all[n++] = {resource_kind::gpu, d};
        all[n++] = {resource_kind::link, d};
    }
    for (int i = 0; i < n; ++i) {
        n_changes = std::max(n_changes, estimator_.state(all[i]).changed_pass);
    }
    if (n_changes > n_changes_seen_) {
        n_changes_seen_ = n_changes;
        guard_.on_costs_changed();
    }
    if (!options_.guard || !is_decode || pass_us_ <= 0.0 ||
        !guard_.on_token({judged_us(), floor_us_, overhead_us_, price_us_}, change)) {
        return false;
    }
    const auto level = static_cast<int>(change.to);
    runtime_limits limits;
    limits.prefetch      = level < static_cast<int>(guard_level::no_prefetch);
    limits.demand_copies = level < static_cast<int>(guard_level::no_demand);
    limits.admission     = level < static_cast<int>(guard_level::frozen);
    runtime_->set_limits(limits);
    return true;
}

} // namespace hybrimoe
