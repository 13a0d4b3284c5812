#include "cost_channel.h"

#include <algorithm>
#include <cmath>

namespace hybrimoe {

namespace {

constexpr double initial_scale  = 0.05;
constexpr double least_scale    = 0.005;
constexpr double largest_scale  = 0.3;
constexpr double scale_rate     = 0.05; // of the moving average of residuals
constexpr double damping        = 0.5;  // pull to the anchor, in samples
constexpr double anchor_rate    = 0.02; // the anchor follows slowly: a factor that samples do not reveal stays put
constexpr double step_scales    = 3.0;  // a sample is off beyond so many residual scales ...
constexpr double least_step     = 0.12; // ... and at least so much, as a logarithm
constexpr double report_change  = 0.25; // drift is worth a report
constexpr double near_change    = 0.10;
constexpr int n_settle_samples  = 12;
constexpr double other_explains = 0.85; // a smaller part is blamed only if it explains the step so much better
constexpr double step_explained = 0.4;  // of the deviations, what a step must leave at most
constexpr double least_gain     = 0.05; // summed over the window, as logarithms
constexpr double largest_factor = 1e6;
constexpr double far_scales     = 5.0; // from here on a sample pulls less the further off it is

double sample_weight(double residual, double scale) {
    const double far = far_scales * scale, size = std::fabs(residual);
    return huber_weight(residual, scale) * (size > far ? far / size : 1.0);
}

} // namespace

cost_channel::cost_channel(int n_params, const double * initial, const double * floor, double memory)
    : n_params_(n_params), memory_(memory), scale_(initial_scale) {
    for (int i = 0; i < n_params; ++i) {
        floor_[i] = floor[i];
        s_[i] = anchor_[i] = reported_[i] = initial[i];
    }
}

double cost_channel::predict(const double * x) const {
    double y = 0.0;
    for (int i = 0; i < n_params_; ++i) {
        y += x[i] * s_[i];
    }
    return y;
}

const cost_channel::sample & cost_channel::recent(int age) const {
    return recent_[(at_ - 1 - age + 2 * window) % window];
}

bool cost_channel::observe(const double * x, double y_us, const sample_time & when, double disturbed) {
    const double p = predict(x);
    if (!std::isfinite(y_us) || y_us <= 0.0 || !std::isfinite(p) || p <= 0.0 || !std::isfinite(when.now_us)) {
        return false;
    }
    if (n_samples_ == 0) {
        std::fill(near_us_, near_us_ + n_params_, when.now_us);
    }
    sample one{};
    std::copy(x, x + n_params_, one.x);
    one.y         = y_us;
    one.now_us    = when.now_us;
    one.deviation = std::log(y_us / p);
    recent_[at_]  = one;
    at_           = (at_ + 1) % window;
    n_recent_     = std::min(n_recent_ + 1, window);
    ++n_samples_;
    for (int i = 0; i < n_params_; ++i) {
        share_[i] += (x[i] * s_[i] / p - share_[i]) * (n_samples_ == 1 ? 1.0 : scale_rate);
    }
    // Bounded like the samples: an outlier widens the scale a little, never a lot. 1.25: mean to standard deviation.
    const double size = std::min(std::fabs(one.deviation - std::log(disturbed)), step_scales * scale_);
    scale_            = std::clamp(scale_ + scale_rate * (1.25 * size - scale_), least_scale, largest_scale);
    int first         = 0;
    const bool off    = stepped(first);
    is_off_           = is_off_ && off;
    const bool lasted = off && has_lasted(first, when);
    if (!(lasted && take_step(first)) && (disturbed == 1.0 || lasted)) {
        sums_.scale(1.0 - 1.0 / memory_);
        accumulate(one);
        solve();
    }
    note_drift(when.now_us);
    return true;
}

// Whether samples have been off for long enough; `first` is the age of the first one in the window.
bool cost_channel::has_lasted(int first, const sample_time & when) {
    if (!is_off_) {
        is_off_    = true;
        off_since_ = {recent(first).now_us, when.pass};
    }
    return when.pass - off_since_.pass >= step_passes && when.now_us - off_since_.now_us >= step_us;
}

void cost_channel::accumulate(const sample & one) {
    const double p = predict(one.x);
    double row[max_fit_params];
    for (int i = 0; i < n_params_; ++i) {
        row[i] = one.x[i] / p;
    }
    sums_.add(row, one.y / p, sample_weight(one.y / p - 1.0, scale_), n_params_);
}

void cost_channel::solve() {
    sums_.solve(n_params_, floor_, anchor_, damping, s_);
    for (int i = 0; i < n_params_; ++i) {
        s_[i] = std::min(s_[i], largest_factor);
        anchor_[i] += anchor_rate * (s_[i] - anchor_[i]);
    }
}

bool cost_channel::stepped(int & first) const {
    if (n_recent_ < window) {
        return false;
    }
    const double bound = std::max(step_scales * scale_, least_step);
    int n_slow = 0, n_fast = 0;
    for (int age = 0; age < window; ++age) {
        n_slow += recent(age).deviation > bound ? 1 : 0;
        n_fast += recent(age).deviation < -bound ? 1 : 0;
    }
    if (std::max(n_slow, n_fast) < window_majority) {
        return false;
    }
    first = window - 1;
    while (first > 0 && std::fabs(recent(first).deviation) <= bound) {
        --first;
    }
    return true;
}

// The sparse explanation: one part changed. Samples of one size cannot tell the parts apart, then it is the largest.
// False when no single factor explains the window.
bool cost_channel::take_step(int first) {
    double best_cost = 0.0, best_factor = 1.0;
    int best = -1;
    int order[max_fit_params]; // largest share first
    for (int i = 0; i < n_params_; ++i) {
        int k = i;
        for (; k > 0 && share_[order[k - 1]] < share_[i]; --k) {
            order[k] = order[k - 1];
        }
        order[k] = i;
    }
    for (int k = 0; k < n_params_; ++k) {
        const int i = order[k];
        double candidates[window];
        int n = 0;
        for (int age = 0; age <= first; ++age) {
            const sample & one = recent(age);
            if (one.x[i] > 0.0) {
                const double rest = predict(one.x) - one.x[i] * s_[i];
                candidates[n++]   = (one.y - rest) / one.x[i];
            }
        }
        if (n < window / 2) {
            continue;
        }
        std::nth_element(candidates, candidates + n / 2, candidates + n);
        if (candidates[n / 2] <= std::max(floor_[i], 1e-6)) {
            continue; // the other parts alone take longer: it is not this one
        }
        const double factor = std::min(candidates[n / 2], largest_factor);
        double cost         = 0.0;
        for (int age = 0; age <= first; ++age) {
            const sample & one = recent(age);
            cost += std::fabs(std::log(one.y / (predict(one.x) + one.x[i] * (factor - s_[i]))));
        }
        if (best < 0 || cost + least_gain < other_explains * best_cost) {
            best = i, best_cost = cost, best_factor = factor;
        }
    }
    double unexplained = 0.0, ratios[window]{};
    for (int age = 0; age <= first; ++age) {
        ratios[age] = std::log(recent(age).y / predict(recent(age).x));
        unexplained += std::fabs(ratios[age]);
    }
    const bool is_one_part = best >= 0 && best_cost <= step_explained * unexplained;
    if (is_one_part) {
        s_[best] = anchor_[best] = best_factor;
    } else { // all parts at once: another clock, or fewer cores
        double sorted[window]{}, cost = 0.0;
        std::copy(ratios, ratios + first + 1, sorted);
        std::nth_element(sorted, sorted + (first + 1) / 2, sorted + first + 1);
        const double common = sorted[(first + 1) / 2];
        for (int age = 0; age <= first; ++age) {
            cost += std::fabs(ratios[age] - common);
        }
        // A run of outliers has no common factor.
        if (cost > step_explained * unexplained) {
            return false;
        }
        best = order[0];
        for (int i = 0; i < n_params_; ++i) {
            s_[i] = anchor_[i] = std::clamp(s_[i] * std::exp(common), floor_[i], largest_factor);
        }
    }
    sums_  = normal_equations();
    scale_ = std::max(scale_, initial_scale);
    for (int age = first; age >= 0; --age) {
        accumulate(recent(age));
    }
    solve();
    if (!has_change_ && settle_left_ == 0) {
        change_ = {best, reported_[best], s_[best], off_since_.now_us};
    }
    settle_left_ = n_settle_samples;
    n_recent_    = 0; // what is in the window has been explained
    is_off_      = false;
    ++n_steps_;
    return true;
}

void cost_channel::note_drift(double now_us) {
    if (settle_left_ > 0) {
        if (--settle_left_ == 0) {
            change_.after            = s_[change_.param];
            reported_[change_.param] = s_[change_.param];
            near_us_[change_.param]  = now_us;
            has_change_              = true;
        }
        return;
    }
    for (int i = 0; i < n_params_; ++i) {
        const double ratio = reported_[i] > 0.0 && s_[i] > 0.0 ? std::fabs(std::log(s_[i] / reported_[i])) : 0.0;
        if (ratio < near_change) {
            near_us_[i] = now_us;
        }
        // A part that makes up little of the time says nothing that is worth a line.
        if (ratio > report_change && share_[i] > 0.2 && !has_change_ && n_samples_ >= window) {
            change_      = {i, reported_[i], s_[i], near_us_[i]};
            reported_[i] = s_[i];
            has_change_  = true;
        }
    }
}

bool cost_channel::take_change(channel_change & out) {
    if (!has_change_) {
        return false;
    }
    has_change_ = false;
    out         = change_;
    return true;
}

} // namespace hybrimoe
