#include "guard.h"

#include <algorithm>
#include <cmath>

namespace hybrimoe {

namespace {

double median(const double * values, int n) {
    double sorted[64];
    std::copy(values, values + n, sorted);
    std::nth_element(sorted, sorted + n / 2, sorted + n);
    return sorted[n / 2];
}

} // namespace

const char * guard_level_name(guard_level level) {
    switch (level) {
    case guard_level::full:
        return "full";
    case guard_level::no_prefetch:
        return "no-prefetch";
    case guard_level::no_demand:
        return "no-demand-copies";
    case guard_level::frozen:
        return "frozen";
    default:
        return "static-layers";
    }
}

guard_level guard::next(int by) const {
    const auto to = static_cast<guard_level>(static_cast<int>(level_) + by);
    return to == guard_level::no_prefetch && !options_.has_prefetch
               ? static_cast<guard_level>(static_cast<int>(to) + by)
               : to;
}

bool guard::change(guard_level to, bool is_trial, guard_change & out) {
    out       = {level_, to, last_token_us_, last_floor_us_, is_trial};
    level_    = to;
    on_trial_ = is_trial;
    quiet_    = 0;
    n_        = 0;
    n_changes_++;
    return true;
}

void guard::on_costs_changed() {
    pause_        = std::min(pause_, options_.pause_tokens);
    has_resigned_ = false;
    std::fill(measured_, measured_ + n_guard_levels, 0.0);
    if (!on_trial_) {
        n_ = 0; // tokens before and after are not comparable
    }
}

// Leaving the static layers and coming back fills all slots twice, and so does another descent after all were in vain.
double guard::pause_tokens() const {
    const bool fills  = (level_ == guard_level::static_layers || has_resigned_) && last_token_us_ > 0.0;
    const double paid = fills ? 2.0 * refill_us_ / (options_.share * last_token_us_) : 0.0;
    return std::max(static_cast<double>(pause_), paid);
}

bool guard::on_token(const guard_token & t, guard_change & out) {
    const double token_us = t.token_us - t.price_us - t.overhead_us;
    if (!std::isfinite(token_us) || !std::isfinite(t.floor_us) || token_us <= 0.0 || t.floor_us <= 0.0) {
        return false;
    }
    const int window = std::clamp(options_.window, 1, max_window);
    tokens_us_[n_]   = t.token_us;
    floors_us_[n_]   = t.floor_us;
    ratios_[n_++]    = token_us / t.floor_us;
    quiet_++;
    const bool is_full = n_ >= window;
    if (!is_full && !(on_trial_ && n_ >= options_.early_tokens)) {
        return false;
    }
    const double ratio = median(ratios_, n_);
    if (on_trial_ && !is_full) {
        return ratio > before_ * options_.early_loss && end_trial(ratio, false, out);
    }
    last_token_us_ = median(tokens_us_, n_);
    last_floor_us_ = median(floors_us_, n_);
    n_             = 0;
    return on_trial_ ? end_trial(ratio, true, out) : end_window(ratio, out);
}

bool guard::end_trial(double ratio, bool is_full, guard_change & out) {
    const bool is_loss   = ratio > 1.0 + options_.tolerance;
    const bool is_faster = ratio < before_ * (1.0 - options_.gain);
    // Windows of other tokens differ by some per cent by their routing alone.
    const bool is_slower = ratio > before_ * (1.0 + options_.slower);
    if (is_full && (is_faster || (!is_loss && !is_slower))) {
        on_trial_ = false;
        quiet_    = 0;
        pause_    = std::clamp(options_.window, 1, max_window); // it pays to climb on
        return false;
    }
    pause_ = std::min(2 * std::max(pause_, options_.pause_tokens / 2), options_.max_pause);
    return change(next(1), false, out);
}

bool guard::end_window(double ratio, guard_change & out) {
    const bool is_loss                  = ratio > 1.0 + options_.tolerance;
    measured_[static_cast<int>(level_)] = ratio;
    if (is_loss && !has_resigned_) {
        if (level_ != guard_level::static_layers) {
            pause_ = std::max(pause_, options_.pause_tokens);
            return change(next(1), false, out);
        }
        // Not even this helps: the loss comes from elsewhere, so take the level that lost least.
        int best = static_cast<int>(level_);
        for (int i = best; i >= 0; --i) {
            best = measured_[i] > 0.0 && measured_[i] < measured_[best] * (1.0 - options_.gain) ? i : best;
        }
        has_resigned_ = true;
        pause_        = options_.max_pause;
        if (best != static_cast<int>(level_)) {
            return change(static_cast<guard_level>(best), false, out);
        }
        return false;
    }
    if (static_cast<double>(quiet_) < pause_tokens()) {
        return false;
    }
    if (has_resigned_) {
        has_resigned_ = false;
        quiet_        = 0;
        std::fill(measured_, measured_ + n_guard_levels, 0.0);
    }
    if (level_ != guard_level::full) {
        before_ = ratio;
        return change(next(-1), true, out);
    }
    return false;
}

} // namespace hybrimoe
