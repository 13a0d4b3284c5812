// Local repair of an assignment.
#pragma once

#include "pricing.h"

namespace hybrimoe {

// Moves single experts, and exchanges pairs, while that clearly helps, where no threshold reaches: a heavy hit that the
// CPU should take, a heavy miss that should stay. Small layers only, since each trial costs O(n). `us` is the makespan
// of the assignment.
void move_singles(const priced_problem & p, double us, assignment & device_of);

} // namespace hybrimoe
