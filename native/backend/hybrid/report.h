// What the parts look like from outside: lines for the log, and the state as JSON (hybrid::describe_state, in
// report.cpp). No state; the caller holds the instance's mutex.
#pragma once

#include "hybrid/fleet.h"

namespace hybrimoe {

// After set-up: what every accelerator holds, and what an expert costs where.
void announce(const common & shared, const fleet & devices, const reproducibility & promise, const cost_model & costs);

} // namespace hybrimoe
