// Whole layers in a device's memory, first layers first: plain llama.cpp's placement, and the guard's last level.
#pragma once

#include <vector>

namespace hybrimoe {

// Slots of each layer [n_layers]: all experts of the layers that are taken, 0 of the others. `expert_bytes` and
// `n_expert` are of one expert and of all, per layer.
std::vector<int> whole_layers(double budget_bytes, const std::vector<double> & expert_bytes,
                              const std::vector<int> & n_expert, const std::vector<bool> & may_take);

// The same for several devices, each with the memory of the cache that it gives up: `wanted` are that cache's slots,
// [n_devices, n_layers]. A layer is on one device, and only where it had slots.
std::vector<std::vector<int>> static_slots(const std::vector<std::vector<int>> & wanted,
                                           const std::vector<double> & expert_bytes, const std::vector<int> & n_expert);

} // namespace hybrimoe
