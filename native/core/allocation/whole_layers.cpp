#include "whole_layers.h"

#include <cstddef>

namespace hybrimoe {

namespace {

constexpr double rounding = 1e-9; // a share of the layers' bytes must hold that share of the layers

} // namespace

std::vector<int> whole_layers(double budget_bytes, const std::vector<double> & expert_bytes,
                              const std::vector<int> & n_expert, const std::vector<bool> & may_take) {
    std::vector<int> slots(expert_bytes.size(), 0);
    for (size_t layer = 0; layer < slots.size(); ++layer) {
        const double bytes = expert_bytes[layer] * n_expert[layer];
        if (may_take[layer] && bytes <= budget_bytes * (1.0 + rounding)) {
            slots[layer] = n_expert[layer];
            budget_bytes -= bytes;
        }
    }
    return slots;
}

std::vector<std::vector<int>> static_slots(const std::vector<std::vector<int>> & wanted,
                                           const std::vector<double> & expert_bytes,
                                           const std::vector<int> & n_expert) {
    std::vector<std::vector<int>> out;
    std::vector<bool> is_taken(expert_bytes.size(), false);
    for (const std::vector<int> & of_device : wanted) {
        double budget = 0.0;
        std::vector<bool> may_take(is_taken.size());
        for (size_t layer = 0; layer < is_taken.size(); ++layer) {
            budget += expert_bytes[layer] * of_device[layer];
            may_take[layer] = !is_taken[layer] && of_device[layer] > 0;
        }
        out.push_back(whole_layers(budget, expert_bytes, n_expert, may_take));
        for (size_t layer = 0; layer < is_taken.size(); ++layer) {
            is_taken[layer] = is_taken[layer] || out.back()[layer] > 0;
        }
    }
    return out;
}

} // namespace hybrimoe
