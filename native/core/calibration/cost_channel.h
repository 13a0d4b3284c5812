// One stream of timings, followed live: y = sum_i x_i s_i, where x_i is what the calibration predicts for part i of a
// sample (latency and transfer; first expert, weights and tokens) and s_i is the factor that holds today, 1 at first.
//
// Recursive least squares with exponential forgetting on relative residuals; an outlier counts no more than
// huber_k residual scales. When most samples have been off in one direction for a while, in time and in passes of the
// model, and a single factor explains them, the machine has changed: that factor takes the change at once, and older
// samples are forgotten. A shorter disturbance is not learnt; disturbance.h follows it meanwhile.
#pragma once

#include "robust_fit.h"

#include <cstdint>

namespace hybrimoe {

// When a sample was taken: the caller's clock, and the pass of the model (one decoded token, or one batch of a prompt).
struct sample_time {
    double now_us = 0.0;
    int64_t pass  = 0;
};

struct channel_change {
    int param       = 0; // the part that changed
    double before   = 1.0;
    double after    = 1.0;
    double since_us = 0.0; // time of the first sample that showed it
};

class cost_channel {
public:
    static constexpr int window          = 10; // samples that decide whether there was a step
    static constexpr int window_majority = 7;
    // A step counts once samples have been off for so long: a burst of waits (another program's time slice, clocks
    // after idle) ends sooner.
    static constexpr int64_t step_passes = 4;
    static constexpr double step_us      = 25e3;

    cost_channel() = default;
    // initial[i]: the factor to start from; floor[i]: its lower bound (0 where a part may vanish); memory: samples
    // after which an old one counts 1/e.
    cost_channel(int n_params, const double * initial, const double * floor, double memory);

    // Takes one timing; false when it is not a time (not finite, not above 0) and was ignored. `disturbed` is the
    // factor that the sample is known to be off by for now (disturbance.h): such a sample is learnt only as part of a
    // step.
    bool observe(const double * x, double y_us, const sample_time & when, double disturbed = 1.0);
    // The report of the newest lasting change, once; false when there is none.
    bool take_change(channel_change & out);

    int n_params() const { return n_params_; }
    double factor(int i) const { return s_[i]; }
    double share(int i) const { return share_[i]; } // of part i in the time of a typical sample
    double predict(const double * x) const;
    double residual() const { return scale_; } // typical relative error of a prediction
    int64_t n_samples() const { return n_samples_; }
    int64_t n_steps() const { return n_steps_; }

private:
    struct sample {
        double x[max_fit_params];
        double y, now_us, deviation; // deviation: log(y / prediction) when it was taken
    };

    void accumulate(const sample & one);
    void solve();
    bool stepped(int & first) const;
    bool has_lasted(int first, const sample_time & when);
    bool take_step(int first);
    void note_drift(double now_us);
    const sample & recent(int age) const; // 0: the newest

    int n_params_  = 0;
    double memory_ = 0.0;
    double floor_[max_fit_params]{};
    double s_[max_fit_params]{};
    double anchor_[max_fit_params]{}; // where the factors are pulled to
    double share_[max_fit_params]{};  // of a typical sample's time, moving average
    normal_equations sums_;
    double scale_ = 0.0;
    sample recent_[window]{};
    int n_recent_      = 0;
    int at_            = 0;
    int64_t n_samples_ = 0;
    int64_t n_steps_   = 0;
    bool is_off_       = false; // most samples are off, since:
    sample_time off_since_;

    // Drift is what has changed since the last report (at first: since the calibration).
    double reported_[max_fit_params]{};
    double near_us_[max_fit_params]{}; // when the factor last was near the reported one
    int settle_left_ = 0;              // samples until a step's new value is reported
    bool has_change_ = false;
    channel_change change_;
};

} // namespace hybrimoe
