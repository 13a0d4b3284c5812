// When to try what is not used. What is believed to be slow is not planned with, so nothing would ever correct the
// belief: each resource that no sample has come from for a while is tried with one expert (or one copy), at a price
// that is bounded by a share of the time.
//
// It has no clock: passes of the model (decoded tokens, or batches of a prompt) and their microseconds come in.
#pragma once

#include "calibration/cost_estimator.h"
#include "resource.h"

#include <vector>

namespace hybrimoe {

struct trial_options {
    bool on             = true;
    double share        = 0.008; // of the time that trials may take in a steady state
    double first_share  = 0.04;  // ... right after a cost has jumped, falling to `share` within
    int share_passes    = 128;
    int most_pause      = 32; // passes between two trials of a resource that is slower than calibrated
    int calibrated_wait = 64; // ... and of one that is as calibrated, where only a doubt is left
};

// For the runtime, with one layer.
struct trial_request {
    bool wanted = false;
    resource what;
    double budget_us    = 0.0;   // the trial may lengthen the layer by so much, as planned
    bool must_be_useful = false; // only where a plan with the calibration's costs would use the resource
};

class trials {
public:
    trials() = default;
    trials(int n_devices, const trial_options & options);

    // A pass of the model begins; the one before it took pass_us.
    void next_pass(const cost_estimator & costs, double pass_us);
    // What to try with the next layer.
    trial_request next(const cost_estimator & costs);
    // What a layer that tried something took longer than its plan without the trial; then, whether it was a surprise is
    // asked of the estimator.
    void on_tried(const resource & what, double price_us, const cost_estimator & costs);

    // A trial was not made, because it would have taken price_us longer: more than its budget. Credit is saved for it.
    void on_refused(const resource & what, double price_us);

    double credit_us() const { return credit_us_; }
    double spent_us() const { return spent_us_; } // on trials so far
    int64_t n_trials() const { return n_trials_; }

private:
    struct candidate {
        resource what;
        int wait             = 0; // passes without a sample until it is due, where it is as calibrated
        int64_t last_pass    = 0; // of its last sample or trial
        int64_t changed_pass = -1;
        int n_follow_ups     = 0;   // trials left after one that was faster than believed
        double saved_for_us  = 0.0; // what a trial would take, for which the credit did not last so far
        bool is_due          = false;
        bool is_suspect      = false;
    };
    int pause_of(const candidate & c, int64_t pass) const;
    candidate * find(const resource & what);

    trial_options options_;
    std::vector<candidate> candidates_;
    size_t turn_      = 0;
    double credit_us_ = 0.0, spent_us_ = 0.0;
    int64_t changed_pass_ = -1;    // of any
    bool saves_           = false; // more than what is usually kept, for a dear trial
    int64_t n_trials_     = 0;
};

} // namespace hybrimoe
