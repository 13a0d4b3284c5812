// The two-threshold search for zero or one accelerator.
#pragma once

#include "pricing.h"

namespace hybrimoe {

void assign_one_card(const priced_problem & p, assignment & device_of);

// Two makespans closer than this share count as equal: sums in another order must not decide a plan.
constexpr double equal_share = 1e-9;

// Costs are known to some per cent: what differs by less is no reason against a copy's better place, or against a copy.
constexpr double negligible_share = 0.02;

inline bool clearly_less(double a, double b) {
    return a < b - equal_share * b;
}

} // namespace hybrimoe
