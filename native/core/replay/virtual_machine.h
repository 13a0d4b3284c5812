// Executes one layer's decision at true costs: the CPU, each accelerator and each link have a timeline of their own,
// and CPU reads and copies share the DRAM ceiling in proportion to what they ask for.
#pragma once

#include "../runtime.h"
#include "closed_loop.h"

#include <vector>

namespace hybrimoe {

struct finished_copy {
    int64_t id   = 0;
    int device   = 0;
    double bytes = 0.0, us = 0.0, end_us = 0.0;
};

class virtual_machine {
public:
    virtual_machine(const loop_options & options, int n_devices)
        : options_(options), links_(static_cast<size_t>(n_devices)) {}

    // What is true from now on; must outlive the phase.
    void begin_phase(const machine_phase & phase) { phase_ = &phase; }
    // Noise of the layer at hand is keyed by its token, so that every run meets the same.
    void begin_token(int64_t token) { token_ = token; }

    const cost_model & truth() const { return phase_->costs; }
    double now_us() const { return now_us_; }
    void pass(double us) { run_until(now_us_ + us); }
    // Runs one planned layer to its end.
    void run_layer(const layer_event & event, const decision & made, const std::vector<transfer> & in_flight,
                   layer_timing & out);
    // Waits for every copy that is under way.
    void drain();
    // Copies without a plan, on all links at once; `bytes` per device and expert.
    double fill(const std::vector<std::vector<double>> & bytes);
    std::vector<finished_copy> & finished() { return finished_; }

    // What the layer would take wholly on one device, under the same noise.
    double plain_us(const decision & made, int layer, int device) const;

private:
    struct copy {
        int64_t id = 0;
        int layer = 0, expert = 0;
        bool is_demanded = false;
        double bytes = 0.0, left_us = 0.0, whole_us = 0.0, start_us = -1.0; // left: at full speed
    };
    struct end_of_copy {
        int layer, expert, device;
        double us;
    };

    double factor(int layer, int what, int64_t item) const;
    double gpu_wait_us(int layer) const;
    double gpu_us(const layer_event & event, const decision & made, int device, const std::vector<transfer> & in_flight,
                  double begin_us);
    double wait_for(int layer, int expert, int device);
    void enqueue(const transfer & t);
    bool step(double limit_us);
    void run_until(double us);

    const loop_options & options_;
    const machine_phase * phase_ = nullptr;
    int64_t token_               = 0;
    double now_us_               = 0.0;
    std::vector<std::vector<copy>> links_;                                 // queues; the first one of each is running
    double cpu_left_us_ = 0.0, cpu_bytes_per_us_ = 0.0, cpu_end_us_ = 0.0; // left: at full speed
    std::vector<finished_copy> finished_;
    std::vector<end_of_copy> ends_; // of this layer
};

} // namespace hybrimoe
