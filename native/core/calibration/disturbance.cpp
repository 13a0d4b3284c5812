#include "disturbance.h"

#include <algorithm>
#include <cmath>

namespace hybrimoe {

namespace {

constexpr double far_ratio  = 1.5; // a sample is far off from this ratio on, in either direction ...
constexpr double far_scales = 4.0; // ... and beyond so many usual errors
constexpr double near_ratio = 1.2; // the factor is taken away below this ratio

} // namespace

bool disturbance::observe(double deviation, double residual) {
    recent_[at_] = deviation;
    at_          = (at_ + 1) % window;
    n_recent_    = std::min(n_recent_ + 1, window);
    if (n_recent_ < window) {
        return false;
    }
    double sorted[window];
    std::copy(recent_, recent_ + window, sorted);
    std::sort(sorted, sorted + window);
    const double before = factor_;
    const double median = sorted[window / 2];
    const double far    = std::max(std::log(far_ratio), far_scales * residual);
    if (sorted[0] > far || sorted[window - 1] < -far) {
        factor_ = std::exp(median);
    } else if (factor_ != 1.0) {
        factor_ = std::fabs(median) < std::log(near_ratio) ? 1.0 : std::exp(median);
    }
    return factor_ != before;
}

void disturbance::clear() {
    n_recent_ = 0;
    factor_   = 1.0;
}

} // namespace hybrimoe
