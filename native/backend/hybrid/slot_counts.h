// How many slots every layer gets on every accelerator. Nothing is kept and no memory is taken: the fleet asks, at
// set-up and when its slots are laid out anew.
#pragma once

#include "hybrid/common.h"

#include <vector>

namespace hybrimoe {

using slot_table = std::vector<std::vector<int>>; // [device][layer]

// What the setting "expert_cache" comes to on these devices.
slot_table count_slots(const common & shared, const std::vector<const device_port *> & devices);
// The first layers that may be taken, whole, as many as the budget holds.
std::vector<int> whole_layers(const layer_book & book, double budget, const std::vector<bool> & may_take);

} // namespace hybrimoe
