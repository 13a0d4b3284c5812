// The two-threshold search for several accelerators.
#pragma once

#include "pricing.h"

namespace hybrimoe {

void assign_several_cards(const priced_problem & p, assignment & device_of);

} // namespace hybrimoe
