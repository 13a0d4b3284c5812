// What the governor changed between two passes (core/governor.h decides it): told to the user, and carried out where it
// takes slots. No state; called by the computing thread.
#pragma once

#include "hybrid/fleet.h"

namespace hybrimoe {

// All drift of costs since the last call.
void tell_drift(const common & shared, const fleet & devices, governor & gov);
// The guard's level is another one: whole layers instead of caches, or back.
void apply_guard(const common & shared, fleet & devices, recording & record, governor & gov,
                 const runtime_limits & limits, const guard_change & change);

} // namespace hybrimoe
