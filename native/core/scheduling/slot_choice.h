// Where copies go when several cards serve the layer equally well.
#pragma once

#include "pricing.h"

namespace hybrimoe {

// Gives copies to the cards whose slots lose least (layer_problem::slot_order), as long as the layer does not take
// clearly longer. A planner alone breaks ties by the card's number: of two cards the first would get nearly every copy
// of decode and evict what it needs again, while stale experts fill the second.
void choose_slots(const priced_problem & p, assignment & device_of);

} // namespace hybrimoe
