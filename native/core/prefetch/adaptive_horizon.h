// How many layers ahead to prefetch (ExpertFlow, arXiv 2510.26730): start at S0 = ceil(bytes per layer / bandwidth /
// layer time); a stall above its threshold adds a layer, over-fetch above its own takes one away. Every change is a
// trial: looking further ahead also predicts worse, so it is taken back unless stalls really fell, and not tried again
// for a while, unless stalls change by themselves (another bandwidth).
#pragma once

#include <cstdint>

namespace hybrimoe {

class adaptive_horizon {
public:
    adaptive_horizon(int max_horizon, int n_layers);

    // Sets S0; called at the start and whenever the measured costs change.
    void seed(double copy_us_per_layer, double layer_us);
    void seed(int horizon);

    // After every layer: time lost to prefetches that came late, the layer's time, and prefetched bytes that were used
    // or turned out useless since.
    void observe(double stall_us, double layer_us, double used_bytes, double wasted_bytes);

    int value() const { return value_; }

private:
    static constexpr double stall_threshold      = 0.01; // of the time
    static constexpr double over_fetch_threshold = 0.35; // of the bytes
    static constexpr int window_tokens           = 5;    // measured per verdict, after one token to settle
    static constexpr int hold_windows            = 64;   // without trials after a failed one; doubles each time

    void start_window();
    void begin_trial(int direction);
    void judge(double stall, double wasted_share);

    int max_;
    int n_layers_;
    int value_        = 1;
    int direction_    = 0;    // of the trial that runs; 0: none
    double reference_ = -1.0; // stall share without the trial
    int hold_         = 0;
    int n_moved_      = 0; // windows in a row whose stall was far from the reference
    int next_hold_    = hold_windows;
    int n_seen_       = 0;
    double stall_us_ = 0.0, layer_us_ = 0.0, used_ = 0.0, wasted_ = 0.0;
};

} // namespace hybrimoe
