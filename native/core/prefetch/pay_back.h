// Does prefetch pay? Time that used prefetches saved, against what the wrong ones cost: DRAM time of their copies, and
// misses of experts that they pushed out. Off when it does not; on trial again after a pause that doubles each time.
#pragma once

#include <cstdint>

namespace hybrimoe {

class pay_back {
public:
    struct options {
        int min_resolved = 64;   // prefetches that must have been used or wasted before a verdict
        int pause_steps  = 1024; // layer steps without prefetch after a bad verdict
        int max_pause    = 65536;
        double decay     = 0.99; // per resolved prefetch

        options() {}
    };

    pay_back() = default;
    explicit pay_back(const options & o) : options_(o), pause_(o.pause_steps) {}

    void on_used(double saved_us) { resolve(saved_us, 0.0); }
    void on_wasted(double cost_us) { resolve(0.0, cost_us); }
    void on_pushed_out_miss(double cost_us) { cost_us_ += cost_us; }
    void on_step(); // once per layer

    bool enabled() const { return enabled_; }
    int64_t n_switches() const { return n_switches_; }

private:
    void resolve(double saved_us, double cost_us);

    options options_;
    bool enabled_       = true;
    int n_resolved_     = 0;
    int pause_          = options().pause_steps;
    int left_           = 0;
    int64_t n_switches_ = 0;
    double saved_us_ = 0.0, cost_us_ = 0.0;
};

} // namespace hybrimoe
