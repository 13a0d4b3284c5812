// The live cost model: starts from a calibration, takes the timing of every real copy, CPU batch and GPU batch, and
// writes what holds today into a cost_model. It has no clock: sample times come in, and only label drift.
//
// Use (one thread at a time, like the runtime):
//   cost_estimator::create(calibrated, {}, estimator);
//   estimator.next_pass();                                                  // before each pass of the model
//   estimator.observe_copy(device, bytes, us, now_us);                      // after a copy has completed
//   estimator.observe_cpu(layer, n_tokens, n_experts, us, now_us, beside);  // after a CPU batch
//   estimator.observe_gpu(layer, device, n_tokens, n_experts, us, now_us);  // after a GPU batch
//   if (estimator.moved()) { estimator.apply(costs); runtime.set_costs(costs); }
//   while (estimator.next_drift(report)) { ... }
// Each cost is a lasting one (cost_channel) times what disturbs its resource right now (disturbance).
// observe_* never fails and never allocates; what is no timing (NaN, 0, negative, an unknown layer) is counted only.
//
// How timings are explained, with c(n) the calibrated curve of an expert with n tokens:
//   copy   latency + bytes / bandwidth
//   CPU    first expert + step, sum of c(1), sum of c(n) - c(1)
//   both   While they run at once and ask for more than the DRAM ceiling, each gets its share of it. What this takes is
//          left out of a sample. A CPU batch that was mostly such time is about the ceiling. What was read faster than
//          the ceiling allows shows that the ceiling is higher.
//   GPU    step, sum of c(1), sum of c(n) - c(1)
#pragma once

#include "../cost_model.h"
#include "../resource.h"
#include "cost_channel.h"
#include "disturbance.h"

#include <vector>

namespace hybrimoe {

struct estimator_options {
    double memory    = 128.0; // samples after which an old one counts 1/e
    double tolerance = 0.03;  // relative change of a part of the time that makes moved() true
    int min_samples  = 8;     // before they change a cost
};

enum class cost_kind : int32_t { copy, cpu, gpu, dram };

// How well a cost is known.
struct cost_state {
    double slowdown      = 1.0; // today's time of one expert (or one copy) over the calibration's
    double disturbed     = 1.0; // of it, what is provisional
    double residual      = 0.0; // usual relative error of a prediction
    int64_t n_samples    = 0;
    double last_us       = 0.0; // time of the newest sample
    int64_t last_pass    = -1;  // its pass; -1: none yet
    int64_t changed_pass = -1;  // when the cost last jumped; -1: never
    double last_ratio    = 1.0; // the newest sample over what was expected of it

    // 0: only the calibration speaks; 1: fresh samples do. Halved by each minute without one.
    double confidence(double now_us) const;
};

// A lasting change. Values: copy and dram bytes per microsecond (copy with parameter `latency`: microseconds);
// cpu and gpu: microseconds of one expert with one token (parameter `weights`), of one more token (`tokens`), or per
// batch (`step`).
struct drift_report {
    cost_kind kind         = cost_kind::copy;
    int device             = cpu_device;
    int cls                = -1; // layer class of cpu and gpu
    const char * parameter = ""; // "latency", "bandwidth", "step", "weights", "tokens"
    double old_value       = 0.0;
    double new_value       = 0.0;
    double since_us        = 0.0; // time of the first sample that showed it
};

// What else read the memory during a copy or a CPU batch.
struct memory_share {
    double speed  = 1.0; // that the DRAM ceiling left it, by the costs believed, over its speed alone
    double shared = 0.0; // share of its time in which that was below 1
    double bytes  = 0.0; // that the others read meanwhile
};

class cost_estimator {
public:
    // Refuses a cost model that lacks a cost (cost_model::check).
    static status create(const cost_model & calibrated, const estimator_options & options, cost_estimator & out);

    // A pass of the model begins.
    void next_pass() { ++pass_; }
    int64_t pass() const { return pass_; }

    // One expert's copy, or any other: its bytes, and the time from its start on an idle link to its end.
    void observe_copy(int device, double bytes, double us, double now_us, const memory_share & beside = {});
    // One CPU batch of a layer: n_tokens[n_experts] of its experts.
    void observe_cpu(int layer, const int32_t * n_tokens, int n_experts, double us, double now_us,
                     const memory_share & beside = {});
    // One GPU batch of a layer, without waiting for copies. `at_most`: it had ended by then, nobody saw when.
    void observe_gpu(int layer, int device, const int32_t * n_tokens, int n_experts, double us, double now_us,
                     bool at_most = false);

    // Whether some cost differs from what apply() wrote last by more than the tolerance.
    bool moved() const { return moved_; }
    // Writes links, curves, step and first-expert costs and the ceiling; `out` has the calibration's layers, classes
    // and devices.
    status apply(cost_model & out);
    // Reports each lasting change once (new channel values of more than a quarter), oldest channel first.
    bool next_drift(drift_report & out);

    // Values of today. The factor of an unobserved part is 1.
    double link_latency_us(int device) const;
    double link_bytes_per_us(int device) const;
    double dram_bytes_per_us() const;
    cost_state state(const resource & of) const;
    const cost_channel & copies(int device) const { return copies_[static_cast<size_t>(device)]; }
    const cost_channel & cpu(int cls) const { return cpu_[static_cast<size_t>(cls)]; }
    const cost_channel & gpu(int cls, int device) const { return gpu_[gpu_index(cls, device)]; }
    int64_t n_rejected() const { return n_rejected_; }
    const cost_model & calibrated() const { return calibrated_; }

private:
    size_t gpu_index(int cls, int device) const {
        return static_cast<size_t>(cls) * static_cast<size_t>(calibrated_.n_devices()) + static_cast<size_t>(device);
    }
    // One of the things that a disturbance hits as a whole, whatever layer class it works on.
    struct follower {
        disturbance now;
        double applied = 1.0; // factor that apply() wrote last
        sample_time last{0.0, -1};
        int64_t n_samples = 0, changed_pass = -1;
        double last_ratio = 1.0;
    };
    size_t follower_of(const resource & of) const;
    bool batch_parts(const cost_curve & curve, const int32_t * n_tokens, int n_experts, double * x) const;
    void observe(cost_channel & channel, follower & by, const double * x, int n, double us, double now_us,
                 double * applied);
    void observe_bound(const cost_channel & channel, follower & by, const double * x, double us, double now_us);
    void observe_read_rate(double bytes, double us, double now_us);
    void observe_ceiling(double bytes, double us, double now_us);
    void follow(follower & by, double deviation, double residual);
    drift_report describe(size_t index, const channel_change & change) const;

    cost_model calibrated_;
    estimator_options options_;
    std::vector<cost_channel> copies_; // [n_devices]: latency, transfer
    std::vector<cost_channel> cpu_;    // [n_classes]: step and first, weights, tokens
    std::vector<cost_channel> gpu_;    // [n_classes, n_devices]: step, weights, tokens
    cost_channel dram_;
    std::vector<follower> followers_; // links, GPUs, CPU, DRAM
    std::vector<double> units_;   // [n_channels, max_fit_params]: us that a factor of 1 stands for where costs are 0
    std::vector<double> applied_; // [n_channels, max_fit_params]
    bool moved_         = false;
    int64_t pass_       = 0;
    int64_t n_rejected_ = 0;
};

} // namespace hybrimoe
