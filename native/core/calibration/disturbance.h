// What holds right now beyond the lasting costs: one factor over all timings of a resource, from its last samples.
//
// Lasting costs (cost_channel) move slowly or after a step that has lasted, so a burst of waits leaves them alone.
// Until then plans must not run into the same slow resource layer after layer: three samples in a row that are far off
// set this factor, three that are not remove it. It is provisional, so the resource is tried again and again meanwhile
// (trials.h).
#pragma once

#include <cstdint>

namespace hybrimoe {

class disturbance {
public:
    static constexpr int window = 3; // samples in a row that decide

    // Takes one sample: the logarithm of measured over expected time, and the usual relative error of such a sample.
    // True when factor() has changed.
    bool observe(double deviation, double residual);
    // What the samples say is explained by the lasting costs now.
    void clear();

    bool is_on() const { return factor_ != 1.0; }
    double factor() const { return factor_; } // measured over expected time; 1: nothing is unusual

private:
    double recent_[window]{};
    int n_recent_  = 0;
    int at_        = 0;
    double factor_ = 1.0;
};

} // namespace hybrimoe
