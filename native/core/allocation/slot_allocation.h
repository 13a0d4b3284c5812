// How many slots each layer gets out of a total.
#pragma once

#include "../registry.h"

#include <vector>

namespace hybrimoe {

struct allocation_request {
    model_shape shape;
    int n_total           = 0;
    const double * demand = nullptr; // [n_layers] predicted distinct experts or misses per layer; null: unknown
};

class slot_allocation {
public:
    virtual ~slot_allocation() = default;
    // Weight of each layer; slots are shared in proportion to it, after `reserved` whole layers of n_expert slots.
    virtual status weights(const allocation_request & request, std::vector<double> & out,
                           int & n_full_layers) const = 0;
};

const policy_table<slot_allocation> & slot_allocations();

// Shares out n_total (largest remainders, ties to the lower layer), at most n_expert per layer; sums to
// min(n_total, n_layers x n_expert).
status allocate_slots(const slot_allocation & policy, const allocation_request & request, std::vector<int> & out);

} // namespace hybrimoe
