#include "adaptive_horizon.h"

#include <algorithm>
#include <cmath>

namespace hybrimoe {

adaptive_horizon::adaptive_horizon(int max_horizon, int n_layers)
    : max_(std::max(1, max_horizon)), n_layers_(std::max(1, n_layers)) {}

void adaptive_horizon::seed(int horizon) {
    value_      = std::clamp(horizon, 1, max_);
    stalled_at_ = 0;
    n_seen_     = 0;
    stall_us_ = layer_us_ = used_ = wasted_ = 0.0;
}

void adaptive_horizon::seed(double copy_us_per_layer, double layer_us) {
    seed(layer_us > 0.0 ? static_cast<int>(std::min(1e6, std::ceil(copy_us_per_layer / layer_us))) : 1);
}

void adaptive_horizon::observe(double stall_us, double layer_us, double used_bytes, double wasted_bytes) {
    stall_us_ += stall_us;
    layer_us_ += layer_us;
    used_ += used_bytes;
    wasted_ += wasted_bytes;
    if (++n_seen_ >= n_layers_) {
        decide();
    }
}

void adaptive_horizon::decide() {
    ++token_;
    const double bytes = used_ + wasted_;
    if (stall_us_ > stall_threshold * layer_us_) {
        stalled_at_    = value_;
        stalled_token_ = token_;
        value_         = std::min(max_, value_ + 1);
    } else if (bytes > 0.0 && wasted_ > over_fetch_threshold * bytes && value_ > 1) {
        const bool forgotten = token_ - stalled_token_ > memory_tokens;
        if (forgotten || value_ - 1 > stalled_at_) { // else it would swing between too short and too long
            --value_;
        }
    }
    n_seen_   = 0;
    stall_us_ = layer_us_ = used_ = wasted_ = 0.0;
}

} // namespace hybrimoe
