// Copies that cost the layer nothing.
#pragma once

#include "pricing.h"

namespace hybrimoe {

// Gives the CPU's misses to cards, where copies stay in slots (layer_problem::copies_stay) and the layer does not take
// clearly longer. Where the memory is the bound, an expert takes the same time no matter which device reads it, and
// a copied one is there in the next step; a planner that looks at the makespan alone would leave the cache as it is for
// ever.
void add_free_copies(const priced_problem & p, assignment & device_of);

} // namespace hybrimoe
