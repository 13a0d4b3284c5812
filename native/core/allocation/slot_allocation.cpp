#include "slot_allocation.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace hybrimoe {

#define HYBRIMOE_POLICY(name) extern const policy_entry<slot_allocation> name##_allocation;
#include "policies.def"
#undef HYBRIMOE_POLICY

const policy_table<slot_allocation> & slot_allocations() {
    static const policy_entry<slot_allocation> * const entries[] = {
#define HYBRIMOE_POLICY(name) &name##_allocation,
#include "policies.def"
#undef HYBRIMOE_POLICY
    };
    static const policy_table<slot_allocation> table = {"slot allocation", entries,
                                                        sizeof(entries) / sizeof(entries[0])};
    return table;
}

namespace {

// One round: shares n among the open layers by weight, capped; returns what is left because caps were hit.
int share(const std::vector<double> & weight, int cap, int n, std::vector<int> & slots) {
    double total = 0.0;
    for (size_t l = 0; l < weight.size(); ++l) {
        total += slots[l] < cap ? weight[l] : 0.0;
    }
    std::vector<double> remainder(weight.size(), -1.0);
    int left = n;
    for (size_t l = 0; l < weight.size(); ++l) {
        if (slots[l] >= cap || weight[l] == 0.0) {
            continue;
        }
        const double exact = n * weight[l] / total;
        const int whole    = std::min(cap - slots[l], static_cast<int>(exact));
        remainder[l]       = exact - whole;
        slots[l] += whole;
        left -= whole;
    }
    std::vector<size_t> order(weight.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return remainder[a] > remainder[b]; });
    for (const size_t l : order) {
        if (left > 0 && remainder[l] >= 0.0 && slots[l] < cap) {
            ++slots[l];
            --left;
        }
    }
    return left;
}

} // namespace

status allocate_slots(const slot_allocation & policy, const allocation_request & request, std::vector<int> & out) {
    const model_shape & s = request.shape;
    if (s.n_layers < 1 || s.n_layers > max_layers || s.n_expert < 1 || s.n_expert > max_experts) {
        return status::fail(error_code::invalid_argument, "%d layers of %d experts, must be 1..%d of 1..%d", s.n_layers,
                            s.n_expert, max_layers, max_experts);
    }
    if (request.n_total < 0) {
        return status::fail(error_code::invalid_argument, "%d slots in all, must be at least 0", request.n_total);
    }
    std::vector<double> weight(static_cast<size_t>(s.n_layers), 1.0);
    int n_full = 0;
    HYBRIMOE_TRY(policy.weights(request, weight, n_full));
    int left = std::min(request.n_total, s.n_keys());
    std::vector<int> slots(static_cast<size_t>(s.n_layers), 0);
    for (int l = 0; l < std::min(n_full, s.n_layers); ++l) {
        slots[static_cast<size_t>(l)] = std::min(left, s.n_expert);
        left -= slots[static_cast<size_t>(l)];
        weight[static_cast<size_t>(l)] = 0.0;
    }
    for (int before = -1; left > 0 && left != before;) {
        before      = left;
        double open = 0.0;
        for (size_t l = 0; l < slots.size(); ++l) {
            open += slots[l] < s.n_expert ? weight[l] : 0.0;
        }
        if (open <= 0.0) { // only layers without demand are left: evenly
            std::fill(weight.begin(), weight.end(), 1.0);
        }
        left = share(weight, s.n_expert, left, slots);
    }
    out = std::move(slots);
    return {};
}

} // namespace hybrimoe
