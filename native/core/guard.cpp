#include "guard.h"

#include <algorithm>
#include <cmath>

namespace hybrimoe {

namespace {

guard_level next(guard_level level, int by) {
    return static_cast<guard_level>(static_cast<int>(level) + by);
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

bool guard::change(guard_level to, bool is_trial, double token_us, double floor_us, guard_change & out) {
    out       = {level_, to, token_us, floor_us, is_trial};
    level_    = to;
    on_trial_ = is_trial;
    quiet_    = 0;
    n_changes_++;
    return true;
}

bool guard::on_token(double token_us, double floor_us, guard_change & out) {
    if (!std::isfinite(token_us) || !std::isfinite(floor_us) || token_us <= 0.0 || floor_us <= 0.0) {
        return false;
    }
    const int window = std::clamp(options_.window, 1, max_window);
    tokens_us_[n_++] = token_us;
    floor_sum_us_ += floor_us;
    quiet_++;
    if (n_ < window) {
        return false;
    }
    // The median: one token that another program delayed decides nothing.
    std::nth_element(tokens_us_, tokens_us_ + window / 2, tokens_us_ + window);
    const double median = tokens_us_[window / 2];
    const double floor  = floor_sum_us_ / window;
    last_token_us_      = median;
    last_floor_us_      = floor;
    n_                  = 0;
    floor_sum_us_       = 0.0;

    if (on_trial_) {
        on_trial_ = false;
        if (median > before_us_ * (1.0 - options_.gain)) {
            pause_ = std::min(2 * pause_, options_.max_pause);
            return change(next(level_, 1), false, median, floor, out);
        }
        pause_ = options_.pause_tokens;
        return false;
    }
    if (median > floor * (1.0 + options_.tolerance) && level_ != guard_level::static_layers) {
        before_us_ = median;
        return change(next(level_, 1), false, median, floor, out);
    }
    if (level_ != guard_level::full && quiet_ >= pause_) {
        before_us_ = median;
        return change(next(level_, -1), true, median, floor, out);
    }
    return false;
}

} // namespace hybrimoe
