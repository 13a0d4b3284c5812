#include "adaptive_horizon.h"

#include <algorithm>
#include <cmath>

namespace hybrimoe {

adaptive_horizon::adaptive_horizon(int max_horizon, int n_layers)
    : max_(std::max(1, max_horizon)), n_layers_(std::max(1, n_layers)) {}

void adaptive_horizon::seed(int horizon) {
    value_     = std::clamp(horizon, 1, max_);
    direction_ = hold_ = n_moved_ = 0;
    next_hold_                    = hold_windows;
    reference_                    = -1.0;
    start_window();
}

void adaptive_horizon::seed(double copy_us_per_layer, double layer_us) {
    seed(layer_us > 0.0 ? static_cast<int>(std::min(1e6, std::ceil(copy_us_per_layer / layer_us))) : 1);
}

void adaptive_horizon::start_window() {
    n_seen_   = 0;
    stall_us_ = layer_us_ = used_ = wasted_ = 0.0;
}

void adaptive_horizon::observe(double stall_us, double layer_us, double used_bytes, double wasted_bytes) {
    if (n_seen_++ < n_layers_) {
        return; // copies issued under the old horizon still arrive
    }
    stall_us_ += stall_us;
    layer_us_ += layer_us;
    used_ += used_bytes;
    wasted_ += wasted_bytes;
    if (n_seen_ < (1 + window_tokens) * n_layers_) {
        return;
    }
    const double bytes = used_ + wasted_;
    judge(layer_us_ > 0.0 ? stall_us_ / layer_us_ : 0.0, bytes > 0.0 ? wasted_ / bytes : 0.0);
    start_window();
}

void adaptive_horizon::begin_trial(int direction) {
    const int next = value_ + direction;
    direction_     = next >= 1 && next <= max_ ? direction : 0;
    value_         = direction_ == 0 ? value_ : next;
}

void adaptive_horizon::judge(double stall, double wasted_share) {
    if (direction_ != 0) {
        const bool better =
            direction_ > 0 ? stall < 0.9 * reference_ : stall <= std::max(stall_threshold, 1.02 * reference_);
        if (!better) {
            value_ -= direction_;
            direction_ = 0;
            hold_      = next_hold_;
            next_hold_ = std::min(2 * next_hold_, 1 << 20);
            return;
        }
        reference_ = stall;
    } else {
        // Bursts move one window; another bandwidth moves two in a row.
        const bool moved =
            reference_ >= 0.0 && std::fabs(stall - reference_) > std::max(stall_threshold, 0.6 * reference_);
        n_moved_ = moved ? n_moved_ + 1 : 0;
        if (n_moved_ == 2) {
            hold_      = 0;
            next_hold_ = hold_windows;
            reference_ = stall;
        } else if (!moved) {
            reference_ = reference_ < 0.0 ? stall : 0.75 * reference_ + 0.25 * stall;
        }
        if (hold_ > 0) {
            --hold_;
            return;
        }
    }
    if (reference_ > stall_threshold && direction_ >= 0) {
        begin_trial(1);
    } else if (wasted_share > over_fetch_threshold && direction_ <= 0) {
        begin_trial(-1);
    } else {
        direction_ = 0;
    }
}

} // namespace hybrimoe
