#include "governor.h"

#include <algorithm>
#include <cmath>

namespace hybrimoe {

status governor::create(const cost_model & calibrated, const governor_options & options, runtime & rt, governor & out) {
    governor made;
    made.options_ = options;
    made.runtime_ = &rt;
    made.costs_   = calibrated;
    HYBRIMOE_TRY(cost_estimator::create(calibrated, options.estimator, made.estimator_));
    made.guard_               = hybrimoe::guard(options.levels);
    trial_options tries       = options.trials;
    tries.on                  = tries.on && options.live;
    made.trials_              = trials(calibrated.n_devices(), tries);
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
}

bool governor::begin_layer(layer_event & event) {
    event.trial      = options_.live ? trials_.next(estimator_) : trial_request();
    event.calibrated = &estimator_.calibrated();
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
    if (options_.live && timing.is_complete) {
        observe(event, made, timing);
    }
    if (made.is_tried) {
        const double without = made.untried_us + timing.overhead_us;
        const double price   = std::max(0.0, timing.span_us - without);
        price_us_ += price;
        trials_.on_tried(event.trial.what, price, estimator_);
    }
}

void governor::observe(const layer_event & event, const decision & made, const layer_timing & timing) {
    if (timing.cpu_us >= 0.0) {
        loads_.clear();
        for (size_t i = 0; i < made.items.size(); ++i) {
            if (made.plan.placements[i].device == cpu_device) {
                loads_.push_back(made.items[i].n_tokens);
            }
        }
        if (!loads_.empty()) {
            double alone_us = costs_.step_us(cpu_device) + costs_.of_layer(event.layer).cpu_first_us;
            for (const int32_t n : loads_) {
                alone_us += costs_.t_cpu(event.layer, n, false);
            }
            const double bytes = costs_.of_layer(event.layer).bytes * static_cast<double>(loads_.size());
            keep({cpu_device, timing.cpu_begin_us, timing.cpu_begin_us + timing.cpu_us, bytes,
                  bytes / std::max(alone_us, 1e-3)});
            estimator_.observe_cpu(event.layer, loads_.data(), static_cast<int>(loads_.size()), timing.cpu_us,
                                   timing.copied_bytes, timing.now_us);
        }
    }
    for (int d = 0; d < costs_.n_devices(); ++d) {
        if (!timing.gpu_is_known[d]) {
            continue;
        }
        loads_.clear();
        bool waits_for_copy = false;
        for (size_t i = 0; i < made.items.size(); ++i) {
            if (made.plan.placements[i].device == d) {
                loads_.push_back(made.items[i].n_tokens);
                waits_for_copy = waits_for_copy || made.plan.placements[i].copied || made.items[i].loading;
            }
        }
        // A copy that it waited for is the link's time, not the accelerator's.
        if (!loads_.empty() && !waits_for_copy) {
            estimator_.observe_gpu(event.layer, d, loads_.data(), static_cast<int>(loads_.size()), timing.gpu_us[d],
                                   timing.now_us, timing.gpu_at_most[d]);
        }
    }
}

void governor::on_copy(int device, double bytes, double us, double now_us) {
    if (!options_.live) {
        return;
    }
    estimator_.observe_copy(device, bytes, us, now_us, beside(device, now_us - us, now_us));
    keep({device, now_us - us, now_us, bytes, bytes / costs_.t_copy(device, bytes)});
}

void governor::keep(const reading & one) {
    readings_[next_reading_] = one;
    next_reading_            = (next_reading_ + 1) % n_readings;
}

// In every moment the ceiling is shared in proportion to what is asked for.
memory_share governor::beside(int device, double begin_us, double end_us) const {
    memory_share out;
    const double ceiling = costs_.dram_bytes_per_us();
    if (!std::isfinite(ceiling) || !(end_us > begin_us)) {
        return out;
    }
    reading others[n_readings + max_devices];
    size_t n         = 0;
    const auto clamp = [&](reading r) {
        const double first = std::max(r.begin_us, begin_us), last = std::min(r.end_us, end_us);
        if (r.device != device && last > first) {
            out.bytes += r.bytes * (last - first) / (r.end_us - r.begin_us);
            r.begin_us  = first;
            r.end_us    = last;
            others[n++] = r;
        }
    };
    for (const reading & r : readings_) {
        clamp(r);
    }
    // Copies on other links that have not ended yet: as they were planned.
    bool is_seen[max_devices]{};
    for (const transfer & t : runtime_->in_flight()) {
        if (!is_seen[t.device]) {
            is_seen[t.device] = true;
            clamp({t.device, t.start_us, std::max(t.end_us, t.start_us + 1e-3), t.bytes,
                   t.bytes / costs_.t_copy(t.device, t.bytes)});
        }
    }
    double edges[2 * (n_readings + max_devices) + 2];
    size_t n_edges   = 0;
    edges[n_edges++] = begin_us;
    edges[n_edges++] = end_us;
    for (size_t i = 0; i < n; ++i) {
        edges[n_edges++] = others[i].begin_us;
        edges[n_edges++] = others[i].end_us;
    }
    std::sort(edges, edges + n_edges);
    const double own = costs_.link(device).bytes_per_us;
    double speed_us = 0.0, shared_us = 0.0;
    for (size_t e = 0; e + 1 < n_edges; ++e) {
        double asked = own;
        for (size_t i = 0; i < n; ++i) {
            asked += others[i].begin_us <= edges[e] && others[i].end_us >= edges[e + 1] ? others[i].asked : 0.0;
        }
        const double us = edges[e + 1] - edges[e];
        speed_us += us * std::min(1.0, ceiling / asked);
        shared_us += asked > ceiling ? us : 0.0;
    }
    out.speed  = speed_us / (end_us - begin_us);
    out.shared = shared_us / (end_us - begin_us);
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
        for (int d = 0; d < costs_.n_devices() && plain.cpu_us > 0.0; ++d) {
            double & left = budget[static_cast<size_t>(d)];
            if (bytes <= left && plain.gpu_us[d] < best) {
                left -= bytes;
                best = plain.gpu_us[d];
            }
        }
        all_cpu += plain.cpu_us;
        with_gpu += best;
    }
    return std::min(all_cpu, with_gpu);
}

bool governor::end_pass(bool is_decode, guard_change & change) {
    last_pass_us_     = pass_us_;
    last_overhead_us_ = overhead_us_;
    floor_us_         = plain_us();
    int64_t n_changes = 0;
    resource all[1 + 2 * max_devices];
    int n = 0;
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
        !guard_.on_token({pass_us_, floor_us_, overhead_us_, price_us_}, change)) {
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

std::vector<std::vector<int>> static_slots(const std::vector<std::vector<int>> & wanted,
                                           const std::vector<double> & bytes, const std::vector<int> & n_expert) {
    std::vector<std::vector<int>> out;
    std::vector<bool> is_taken(bytes.size(), false);
    for (const std::vector<int> & of_device : wanted) {
        double budget = 0.0;
        for (size_t layer = 0; layer < bytes.size(); ++layer) {
            budget += bytes[layer] * of_device[layer];
        }
        std::vector<int> slots(bytes.size(), 0);
        for (size_t layer = 0; layer < bytes.size(); ++layer) {
            const double whole = bytes[layer] * n_expert[layer];
            if (!is_taken[layer] && of_device[layer] > 0 && whole <= budget * (1.0 + 1e-12)) {
                slots[layer]    = n_expert[layer];
                is_taken[layer] = true;
                budget -= whole;
            }
        }
        out.push_back(std::move(slots));
    }
    return out;
}

} // namespace hybrimoe
