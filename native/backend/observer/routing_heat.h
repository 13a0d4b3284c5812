// Which experts were asked for lately: counts of routed (layer, expert) pairs that fade with the tokens after them.
#pragma once

#include "hybrimoe.h"

#include <cstdint>
#include <vector>

namespace hybrimoe {

class routing_heat {
public:
    // A token's routing counts half after so many more tokens.
    static constexpr double half_life_tokens = 256.0;

    // Counts one pass of a recording: a hybrimoe_trace_pass with its arrays.
    void add(const hybrimoe_trace_pass & pass);

    // Per layer, in the order in which layers run in the plug-in, each expert's share of recent routing: 1 / n_experts
    // is the average. As long as the highest expert seen; zeros for a layer that has not run.
    std::vector<std::vector<double>> shares() const;

private:
    std::vector<std::vector<double>> counts_;
    double weight_ = 1.0; // of the next pass: growing weights of the new are fading ones of the old
};

} // namespace hybrimoe
