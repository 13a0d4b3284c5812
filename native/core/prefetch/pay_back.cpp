#include "pay_back.h"

#include <algorithm>

namespace hybrimoe {

void pay_back::resolve(double saved_us, double cost_us) {
    saved_us_ = options_.decay * saved_us_ + saved_us;
    cost_us_  = options_.decay * cost_us_ + cost_us;
    ++n_resolved_;
}

void pay_back::on_step() {
    if (!enabled_) {
        if (--left_ <= 0) {
            enabled_    = true;
            n_resolved_ = 0;
            saved_us_ = cost_us_ = 0.0;
            ++n_switches_;
        }
        return;
    }
    if (n_resolved_ < options_.min_resolved) {
        return;
    }
    if (saved_us_ < cost_us_) {
        enabled_ = false;
        left_    = pause_;
        pause_   = std::min(options_.max_pause, 2 * pause_);
        ++n_switches_;
    } else if (n_resolved_ > 8 * options_.min_resolved) {
        pause_ = options_.pause_steps; // it paid for a while: forget earlier failures
    }
}

} // namespace hybrimoe
