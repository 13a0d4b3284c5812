// How many layers ahead to prefetch (ExpertFlow, arXiv 2510.26730): start at S0 = ceil(bytes per layer / bandwidth /
// layer time); a stall above its threshold adds a layer, over-fetch above its own takes one away.
#pragma once

#include <cstdint>

namespace hybrimoe {

class adaptive_horizon {
public:
    adaptive_horizon(int max_horizon, int n_layers);

    // Sets S0; called at the start and whenever the measured costs change.
    void seed(double copy_us_per_layer, double layer_us);
    void seed(int horizon);

    // After every layer: time lost to prefetches that came late, the layer's time, and prefetched bytes that were used or
    // turned out useless since. Decides once per token.
    void observe(double stall_us, double layer_us, double used_bytes, double wasted_bytes);

    int value() const { return value_; }

private:
    static constexpr double  stall_threshold     = 0.01; // of the time
    static constexpr double  over_fetch_threshold = 0.35; // of the bytes
    static constexpr int64_t memory_tokens       = 128;  // a horizon that stalled is not tried again for so long

    void decide();

    int     max_;
    int     n_layers_;
    int     value_    = 1;
    int     n_seen_   = 0;
    int     stalled_at_ = 0; // largest horizon that stalled
    int64_t token_    = 0, stalled_token_ = 0;
    double  stall_us_ = 0.0, layer_us_ = 0.0, used_ = 0.0, wasted_ = 0.0;
};

} // namespace hybrimoe
