#include "cost_estimator.h"

#include <algorithm>
#include <cmath>

namespace hybrimoe {

namespace {

// A rate must not become absurd; a latency or a step may vanish.
constexpr double vanishing[max_fit_params] = {0.0, 0.005, 0.005};
constexpr double rate_only[max_fit_params] = {0.005, 0.0, 0.0};
// What a factor of 1 means for a cost that the calibration gives as 0: a share of one expert's time.
constexpr double unit_share = 0.05;
// A CPU batch beside copies that is slower than the costs explain, by so many residual scales, met the ceiling if
// copies are slow as well. One that shared the memory most of the time did so if it reached this share of the ceiling.
constexpr double ceiling_scales = 2.0;
constexpr double ceiling_share  = 0.4;
constexpr double slow_copies    = 1.3;
// A CPU batch that was alone for less of its time, and is off by more than this, is about the ceiling: costs and
// ceiling cannot be told apart by small errors, and the ceiling is what changes least.
constexpr double ceiling_off = 1.15;
constexpr double least_alone = 0.3;
// "At most" speaks against a cost only if it is so much below it.
constexpr double telling_bound = 0.8;
// A disturbance is passed on when it has changed by so much.
constexpr double disturbance_step = 0.1;
constexpr double half_life_us     = 60e6; // of the confidence in a cost without samples
// A part of the time below this share changes no decision.
constexpr double telling_share = 0.02;

enum part { fixed_part = 0, weights_part = 1, tokens_part = 2 };

struct parts {
    double unit[max_fit_params];
    double initial[max_fit_params];
};

// Units of a channel whose first part costs first_us by the calibration, beside others of about typical_us.
parts channel_parts(double first_us, double typical_us) {
    parts p{};
    p.unit[0]    = first_us > 0.0 ? first_us : std::max(unit_share * typical_us, 1e-3);
    p.initial[0] = first_us > 0.0 ? 1.0 : 0.0;
    for (int i = 1; i < max_fit_params; ++i) {
        p.unit[i] = p.initial[i] = 1.0;
    }
    return p;
}

} // namespace

status cost_estimator::create(const cost_model & calibrated, const estimator_options & options, cost_estimator & out) {
    HYBRIMOE_TRY(calibrated.check());
    if (!std::isfinite(options.memory) || options.memory < 16.0 || options.memory > 1e6) {
        return status::fail(error_code::invalid_argument, "memory = %g is outside 16..1e6 samples", options.memory);
    }
    if (!(options.tolerance > 0.0 && options.tolerance < 1.0)) {
        return status::fail(error_code::invalid_argument, "tolerance = %g is outside 0..1", options.tolerance);
    }
    if (options.min_samples < 1) {
        return status::fail(error_code::invalid_argument, "min_samples = %d is below 1", options.min_samples);
    }
    cost_estimator made;
    made.calibrated_ = calibrated;
    made.options_    = options;
    const auto keep  = [&made](const parts & p, int n) {
        for (int i = 0; i < max_fit_params; ++i) {
            made.units_.push_back(p.unit[i]);
            made.applied_.push_back(i < n ? p.initial[i] : 0.0);
        }
    };
    for (int d = 0; d < calibrated.n_devices(); ++d) {
        const parts p = channel_parts(calibrated.link(d).latency_us,
                                      calibrated.of_class(0).bytes / calibrated.link(d).bytes_per_us);
        made.copies_.emplace_back(2, p.initial, vanishing, options.memory);
        keep(p, 2);
    }
    for (int c = 0; c < calibrated.n_classes(); ++c) {
        const layer_class & one = calibrated.of_class(c);
        const parts p           = channel_parts(one.cpu_first_us + calibrated.step_us(cpu_device), one.cpu.at(1.0));
        made.cpu_.emplace_back(3, p.initial, vanishing, options.memory);
        keep(p, 3);
    }
    for (int c = 0; c < calibrated.n_classes(); ++c) {
        for (int d = 0; d < calibrated.n_devices(); ++d) {
            const parts p = channel_parts(calibrated.step_us(d), calibrated.of_class(c).gpu[d].at(1.0));
            made.gpu_.emplace_back(3, p.initial, vanishing, options.memory);
            keep(p, 3);
        }
    }
    const double one[max_fit_params] = {1.0, 1.0, 1.0};
    made.dram_                       = cost_channel(1, one, rate_only, options.memory);
    keep(parts{{1.0, 1.0, 1.0}, {1.0, 1.0, 1.0}}, 1);
    made.followers_.resize(2 * static_cast<size_t>(calibrated.n_devices()) + 2);
    out = std::move(made);
    return {};
}

bool cost_estimator::batch_parts(const cost_curve & curve, const int32_t * n_tokens, int n_experts, double * x) const {
    if (n_experts < 1 || !n_tokens) {
        return false;
    }
    const double first = curve.at(1.0);
    double further     = 0.0;
    for (int i = 0; i < n_experts; ++i) {
        if (n_tokens[i] < 1) {
            return false;
        }
        further += curve.at(static_cast<double>(n_tokens[i])) - first;
    }
    x[weights_part] = first * n_experts;
    x[tokens_part]  = std::max(further, 0.0);
    return true;
}

size_t cost_estimator::follower_of(const resource & of) const {
    const auto n_devices = static_cast<size_t>(calibrated_.n_devices());
    const auto device    = static_cast<size_t>(std::max(of.device, 0));
    return of.kind == resource_kind::link ? device : of.kind == resource_kind::gpu ? n_devices + device : 2 * n_devices;
}

void cost_estimator::follow(follower & by, double deviation, double residual) {
    const bool was_on = by.now.is_on();
    by.now.observe(deviation, residual);
    if (by.now.is_on() != was_on) {
        by.changed_pass = pass_;
    }
    moved_ = moved_ || std::fabs(std::log(by.now.factor() / by.applied)) > disturbance_step;
}

void cost_estimator::observe(cost_channel & channel, follower & by, const double * x, int n, double us, double now_us,
                             double * applied) {
    double expected = 0.0; // by the lasting costs that plans use
    for (int i = 0; i < n; ++i) {
        expected += x[i] * applied[i];
    }
    const int64_t n_steps = channel.n_steps();
    const double residual = channel.residual();
    if (!channel.observe(x, us, {now_us, pass_}, by.now.factor())) {
        ++n_rejected_;
        return;
    }
    by.last = {now_us, pass_};
    ++by.n_samples;
    by.last_ratio = us / (expected * by.now.factor());
    if (channel.n_steps() != n_steps) { // it has become lasting, and counts from the next sample on
        by.now.clear();
        for (int i = 0; i < n; ++i) {
            applied[i] = channel.factor(i);
        }
        by.changed_pass = pass_;
        moved_          = true;
    } else {
        follow(by, std::log(us / expected), residual);
    }
    if (moved_ || channel.n_samples() < options_.min_samples) {
        return;
    }
    for (int i = 0; i < n; ++i) {
        const double change = std::fabs(channel.factor(i) - applied[i]);
        const double base   = std::max(channel.factor(i), 1e-9);
        moved_              = moved_ || change / base * std::max(channel.share(i), telling_share) > options_.tolerance;
    }
}

// A bound is learnt by no channel: samples that say "at most" alone would pull every cost down.
void cost_estimator::observe_bound(const cost_channel & channel, follower & by, const double * x, double us,
                                   double now_us) {
    const double expected = channel.predict(x);
    if (!std::isfinite(us) || us <= 0.0 || !std::isfinite(now_us) || expected <= 0.0) {
        ++n_rejected_;
        return;
    }
    if (us < telling_bound * expected * by.now.factor()) {
        by.last       = {now_us, pass_};
        by.last_ratio = us / (expected * by.now.factor());
        follow(by, std::log(us / expected), channel.residual());
    }
}

void cost_estimator::observe_read_rate(double bytes, double us, double now_us) {
    const double ceiling = calibrated_.dram_bytes_per_us();
    if (std::isfinite(ceiling) && us > 0.0) {
        const double x[max_fit_params] = {bytes / ceiling, 0.0, 0.0};
        if (us < dram_.predict(x) * followers_.back().now.factor()) {
            observe_bound(dram_, followers_.back(), x, us, now_us);
        }
    }
}

void cost_estimator::observe_ceiling(double bytes, double us, double now_us) {
    const double x[max_fit_params] = {bytes / calibrated_.dram_bytes_per_us(), 0.0, 0.0};
    observe(dram_, followers_.back(), x, 1, us, now_us, &applied_[applied_.size() - max_fit_params]);
}

void cost_estimator::observe_copy(int device, double bytes, double us, double now_us, const memory_share & beside) {
    if (device < 0 || device >= calibrated_.n_devices() || !(bytes > 0.0) || !std::isfinite(bytes)) {
        ++n_rejected_;
        return;
    }
    const auto at     = static_cast<size_t>(device);
    const double x[2] = {units_[at * max_fit_params], bytes / calibrated_.link(device).bytes_per_us};
    observe(copies_[at], followers_[at], x, 2, us * std::clamp(beside.speed, 0.01, 1.0), now_us,
            &applied_[at * max_fit_params]);
    observe_read_rate(bytes + beside.bytes, us, now_us);
}

void cost_estimator::observe_cpu(int layer, const int32_t * n_tokens, int n_experts, double us, double now_us,
                                 const memory_share & beside) {
    double x[max_fit_params];
    if (layer < 0 || layer >= calibrated_.n_layers() ||
        !batch_parts(calibrated_.of_layer(layer).cpu, n_tokens, n_experts, x)) {
        ++n_rejected_;
        return;
    }
    const auto cls     = static_cast<size_t>(calibrated_.class_of(layer));
    const size_t index = copies_.size() + cls;
    cost_channel & own = cpu_[cls];
    follower & by      = followers_[follower_of({resource_kind::cpu, cpu_device})];
    x[fixed_part]      = units_[index * max_fit_params];
    const double bytes = calibrated_.of_layer(layer).bytes * n_experts + beside.bytes;
    const double speed = std::clamp(beside.speed, 0.01, 1.0);
    if (beside.bytes > 0.0 && std::isfinite(calibrated_.dram_bytes_per_us())) {
        bool are_copies_slow = false;
        for (int d = 0; d < calibrated_.n_devices(); ++d) {
            const follower & link = followers_[static_cast<size_t>(d)];
            are_copies_slow       = are_copies_slow || link.now.factor() > slow_copies || link.last_ratio > slow_copies;
        }
        const double alone = own.predict(x) * by.now.factor();
        const bool is_slow = us * speed > alone * (1.0 + ceiling_scales * own.residual());
        const bool is_off  = std::fabs(std::log(us * speed / alone)) > std::log(ceiling_off);
        // Whatever else reads slows it down: a batch faster than alone is about the CPU.
        const bool is_fast = us < alone;
        const bool has_shared =
            is_off && !is_fast && beside.shared > 1.0 - least_alone && us * ceiling_share * dram_bytes_per_us() < bytes;
        if (has_shared || (is_slow && are_copies_slow)) {
            observe_ceiling(bytes, us, now_us);
            return;
        }
    }
    observe(own, by, x, 3, us * speed, now_us, &applied_[index * max_fit_params]);
    observe_read_rate(bytes, us, now_us);
}

void cost_estimator::observe_gpu(int layer, int device, const int32_t * n_tokens, int n_experts, double us,
                                 double now_us, bool at_most) {
    double x[max_fit_params];
    if (layer < 0 || layer >= calibrated_.n_layers() || device < 0 || device >= calibrated_.n_devices() ||
        !batch_parts(calibrated_.of_layer(layer).gpu[device], n_tokens, n_experts, x)) {
        ++n_rejected_;
        return;
    }
    const size_t at    = gpu_index(calibrated_.class_of(layer), device);
    const size_t index = copies_.size() + cpu_.size() + at;
    follower & by      = followers_[follower_of({resource_kind::gpu, device})];
    x[fixed_part]      = units_[index * max_fit_params];
    if (at_most) {
        observe_bound(gpu_[at], by, x, us, now_us);
    } else {
        observe(gpu_[at], by, x, 3, us, now_us, &applied_[index * max_fit_params]);
    }
}

double cost_state::confidence(double now_us) const {
    if (n_samples == 0) {
        return 0.0;
    }
    const auto n     = static_cast<double>(n_samples);
    const double age = std::max(0.0, now_us - last_us);
    return n / (n + 8.0) * std::exp2(-age / half_life_us) / (1.0 + residual);
}

// Of a batch of one expert with one token, or of one expert's copy; of the classes, the one that has become slowest.
cost_state cost_estimator::state(const resource & of) const {
    const follower & by = followers_[follower_of(of)];
    cost_state s;
    s.disturbed    = by.now.factor();
    s.n_samples    = by.n_samples;
    s.last_us      = by.last.now_us;
    s.last_pass    = by.last.pass;
    s.changed_pass = by.changed_pass;
    s.last_ratio   = by.last_ratio;
    double most    = 0.0;
    const auto add = [&](const cost_channel & channel, size_t index, double first_us, double each_us) {
        const double unit              = units_[index * max_fit_params];
        const double x[max_fit_params] = {unit, each_us, 0.0};
        const double calibrated        = first_us + each_us;
        s.residual                     = std::max(s.residual, channel.n_samples() > 0 ? channel.residual() : 0.0);
        most                           = std::max(most, calibrated > 0.0 ? channel.predict(x) / calibrated : 1.0);
    };
    for (int c = 0; c < calibrated_.n_classes(); ++c) {
        const auto cls        = static_cast<size_t>(c);
        const layer_class & l = calibrated_.of_class(c);
        if (of.kind == resource_kind::cpu) {
            add(cpu_[cls], copies_.size() + cls, l.cpu_first_us + calibrated_.step_us(cpu_device), l.cpu.at(1.0));
        } else if (of.kind == resource_kind::gpu) {
            add(gpu(c, of.device), copies_.size() + cpu_.size() + gpu_index(c, of.device),
                calibrated_.step_us(of.device), l.gpu[of.device].at(1.0));
        } else {
            add(copies(of.device), static_cast<size_t>(of.device), calibrated_.link(of.device).latency_us,
                l.bytes / calibrated_.link(of.device).bytes_per_us);
        }
    }
    s.slowdown = most * s.disturbed;
    return s;
}

double cost_estimator::link_latency_us(int device) const {
    const auto at = static_cast<size_t>(device);
    return copies_[at].factor(0) * units_[at * max_fit_params] * followers_[at].now.factor();
}

double cost_estimator::link_bytes_per_us(int device) const {
    const auto at = static_cast<size_t>(device);
    return calibrated_.link(device).bytes_per_us / copies_[at].factor(1) / followers_[at].now.factor();
}

double cost_estimator::dram_bytes_per_us() const {
    return calibrated_.dram_bytes_per_us() / dram_.factor(0) / followers_.back().now.factor();
}

status cost_estimator::apply(cost_model & out) {
    if (out.n_layers() != calibrated_.n_layers() || out.n_classes() != calibrated_.n_classes() ||
        out.n_devices() != calibrated_.n_devices()) {
        return status::fail(error_code::invalid_argument,
                            "the cost model has %d layers, %d classes and %d devices; "
                            "the estimator %d, %d and %d",
                            out.n_layers(), out.n_classes(), out.n_devices(), calibrated_.n_layers(),
                            calibrated_.n_classes(), calibrated_.n_devices());
    }
    // A disturbance counts from its first sample on, lasting factors once there are enough samples.
    const auto lasting = [this](const cost_channel & c, size_t index) {
        const bool enough = c.n_samples() >= options_.min_samples;
        for (int i = 0; enough && i < c.n_params(); ++i) {
            applied_[index * max_fit_params + static_cast<size_t>(i)] = c.factor(i);
        }
        return &applied_[index * max_fit_params];
    };
    for (follower & by : followers_) {
        by.applied = by.now.factor();
    }
    size_t index = 0;
    for (int d = 0; d < calibrated_.n_devices(); ++d, ++index) {
        const double * s  = lasting(copies(d), index);
        const double now  = followers_[static_cast<size_t>(d)].applied;
        const double unit = units_[index * max_fit_params];
        HYBRIMOE_TRY(out.set_link(d, s[0] * unit * now, calibrated_.link(d).bytes_per_us / (s[1] * now)));
    }
    const double cpu_now = followers_[follower_of({resource_kind::cpu, cpu_device})].applied;
    // Step and first expert show as one. The step is that of all classes, so it is no more than any of them has.
    const auto cpu_fixed_us = [&](int c, size_t at) {
        return lasting(cpu(c), at)[fixed_part] * units_[at * max_fit_params] * cpu_now;
    };
    double step_us = calibrated_.step_us(cpu_device);
    for (int c = 0; c < calibrated_.n_classes(); ++c) {
        step_us = std::min(step_us, cpu_fixed_us(c, index + static_cast<size_t>(c)));
    }
    HYBRIMOE_TRY(out.set_step(cpu_device, step_us));
    for (int c = 0; c < calibrated_.n_classes(); ++c, ++index) {
        const double * s = lasting(cpu(c), index);
        HYBRIMOE_TRY(
            out.set_cpu(c, calibrated_.of_class(c).cpu.scaled(s[weights_part] * cpu_now, s[tokens_part] * cpu_now),
                        cpu_fixed_us(c, index) - step_us));
    }
    double step_sum[max_devices] = {}, step_weight[max_devices] = {};
    for (int c = 0; c < calibrated_.n_classes(); ++c) {
        for (int d = 0; d < calibrated_.n_devices(); ++d, ++index) {
            const cost_channel & one = gpu(c, d);
            const double * s         = lasting(one, index);
            const double now         = followers_[follower_of({resource_kind::gpu, d})].applied;
            HYBRIMOE_TRY(
                out.set_gpu(c, d, calibrated_.of_class(c).gpu[d].scaled(s[weights_part] * now, s[tokens_part] * now)));
            // A device has one step cost, seen through the batches of every class.
            const auto weight = std::max(1e-3, static_cast<double>(one.n_samples()));
            step_sum[d] += weight * s[fixed_part] * units_[index * max_fit_params] * now;
            step_weight[d] += weight;
        }
    }
    for (int d = 0; d < calibrated_.n_devices(); ++d) {
        HYBRIMOE_TRY(out.set_step(d, step_sum[d] / step_weight[d]));
    }
    if (std::isfinite(calibrated_.dram_bytes_per_us())) {
        const double * s = lasting(dram_, index);
        HYBRIMOE_TRY(out.set_dram(calibrated_.dram_bytes_per_us() / (s[0] * followers_.back().applied)));
    }
    moved_ = false;
    return {};
}

drift_report cost_estimator::describe(size_t index, const channel_change & change) const {
    static const char * const copy_parts[]  = {"latency", "bandwidth"};
    static const char * const batch_parts[] = {"step", "weights", "tokens"};
    drift_report r;
    r.since_us        = change.since_us;
    const double unit = units_[index * max_fit_params + static_cast<size_t>(change.param)];
    const auto report = [&r, &change](const char * name, double value) {
        r.parameter = name;
        r.old_value = value * change.before;
        r.new_value = value * change.after;
    };
    if (index < copies_.size()) {
        r.kind   = cost_kind::copy;
        r.device = static_cast<int>(index);
        report(copy_parts[change.param], unit);
        if (change.param == 1) {
            const double rate = calibrated_.link(r.device).bytes_per_us;
            r.old_value       = rate / std::max(change.before, 1e-9);
            r.new_value       = rate / std::max(change.after, 1e-9);
        }
        return r;
    }
    index -= copies_.size();
    if (index >= cpu_.size() + gpu_.size()) {
        r.kind      = cost_kind::dram;
        r.parameter = "bandwidth";
        r.old_value = calibrated_.dram_bytes_per_us() / std::max(change.before, 1e-9);
        r.new_value = calibrated_.dram_bytes_per_us() / std::max(change.after, 1e-9);
        return r;
    }
    const bool on_cpu        = index < cpu_.size();
    const auto n_devices     = static_cast<size_t>(calibrated_.n_devices());
    const size_t cls         = on_cpu ? index : (index - cpu_.size()) / n_devices;
    r.kind                   = on_cpu ? cost_kind::cpu : cost_kind::gpu;
    r.cls                    = static_cast<int>(cls);
    r.device                 = on_cpu ? cpu_device : static_cast<int>((index - cpu_.size()) % n_devices);
    const layer_class & one  = calibrated_.of_class(r.cls);
    const cost_curve & curve = on_cpu ? one.cpu : one.gpu[r.device];
    const double value       = change.param == fixed_part     ? unit
                               : change.param == weights_part ? curve.at(1.0)
                                                              : curve.at(2.0) - curve.at(1.0);
    report(batch_parts[change.param], value);
    return r;
}

bool cost_estimator::next_drift(drift_report & out) {
    channel_change change;
    size_t index = 0;
    for (std::vector<cost_channel> * group : {&copies_, &cpu_, &gpu_}) {
        for (cost_channel & channel : *group) {
            if (channel.take_change(change)) {
                out = describe(index, change);
                return true;
            }
            ++index;
        }
    }
    if (dram_.take_change(change)) {
        out = describe(index, change);
        return true;
    }
    return false;
}

} // namespace hybrimoe
