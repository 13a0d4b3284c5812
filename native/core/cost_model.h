// What a layer class (shape + quantisation) costs on each device. All times in microseconds, all rates in bytes per
// microsecond (1 GB/s = 1,000). Every cost starts unknown and an unknown cost is an error, never a default.
#pragma once

#include "status.h"
#include "types.h"

#include <limits>
#include <vector>

namespace hybrimoe {

constexpr double unknown_cost = std::numeric_limits<double>::quiet_NaN();

// Time of one expert as a function of its tokens: affine, or linear between measured points.
class cost_curve {
public:
    static constexpr int max_points = 16;

    static status affine(double fixed_us, double per_token_us, cost_curve & out);
    // Points with strictly growing n_tokens >= 1. Below the first point its time holds, beyond the last one the slope
    // of the last segment does.
    static status piecewise(const double * n_tokens, const double * us, int n_points, cost_curve & out);

    bool known() const { return n_points_ > 0 || fixed_us_ == fixed_us_; }
    // What it was made of: no points means affine.
    int n_points() const { return n_points_; }
    double point_n_tokens(int i) const { return x_[i]; }
    double point_us(int i) const { return y_[i]; }
    double fixed_us() const { return fixed_us_; }
    double per_token_us() const { return per_token_us_; }
    double at(double n_tokens) const {
        return n_points_ == 0 ? fixed_us_ + per_token_us_ * n_tokens : interpolate(n_tokens);
    }
    // The curve whose first token costs first_factor times as much, and all that further tokens add tokens_factor
    // times.
    cost_curve scaled(double first_factor, double tokens_factor) const;

private:
    double interpolate(double n_tokens) const;

    double fixed_us_     = unknown_cost;
    double per_token_us_ = unknown_cost;
    int n_points_        = 0;
    double x_[max_points];
    double y_[max_points];
};

struct layer_class {
    double bytes = unknown_cost; // of one expert, all its matrices
    cost_curve cpu;
    double cpu_first_us = unknown_cost; // extra of a layer's first CPU expert (HybriMoE sec. III)
    cost_curve gpu[max_devices];
};

struct link_costs {
    double latency_us   = unknown_cost;
    double bytes_per_us = unknown_cost;
};

class cost_model {
public:
    static status create(int n_layers, int n_classes, int n_devices, cost_model & out);

    status set_layer_class(int layer, int cls);
    status set_bytes(int cls, double bytes);
    status set_cpu(int cls, const cost_curve & curve, double first_us);
    status set_gpu(int cls, int device, const cost_curve & curve);
    status set_link(int device, double latency_us, double bytes_per_us);
    // Fixed cost that a device pays once in a step in which it has any expert; device cpu_device is the CPU.
    status set_step(int device, double step_us);
    // CPU reads and copies together read at most this much; infinity says that there is no shared ceiling.
    status set_dram(double bytes_per_us);

    // Names the first cost that is still unknown.
    status check() const;

    int n_layers() const { return static_cast<int>(class_of_layer_.size()); }
    int n_classes() const { return static_cast<int>(classes_.size()); }
    int n_devices() const { return n_devices_; }
    int class_of(int layer) const { return class_of_layer_[static_cast<size_t>(layer)]; }

    const layer_class & of_class(int cls) const { return classes_[static_cast<size_t>(cls)]; }
    const link_costs & link(int device) const { return links_[device]; }
    const layer_class & of_layer(int layer) const { return classes_[static_cast<size_t>(class_of(layer))]; }

    double t_cpu(int layer, double n_tokens, bool first) const {
        const layer_class & c = of_layer(layer);
        return c.cpu.at(n_tokens) + (first ? c.cpu_first_us : 0.0);
    }
    double t_gpu(int layer, int device, double n_tokens) const { return of_layer(layer).gpu[device].at(n_tokens); }
    double t_copy(int device, double bytes) const {
        return links_[device].latency_us + bytes / links_[device].bytes_per_us;
    }
    double step_us(int device) const { return device == cpu_device ? cpu_step_us_ : gpu_step_us_[device]; }
    double dram_bytes_per_us() const { return dram_bytes_per_us_; }

private:
    status check_class(int cls) const;
    status check_device(int device) const;

    int n_devices_ = 0;
    std::vector<int> class_of_layer_;
    std::vector<layer_class> classes_;
    link_costs links_[max_devices];
    double cpu_step_us_ = unknown_cost;
    double gpu_step_us_[max_devices];
    double dram_bytes_per_us_ = unknown_cost;
};

} // namespace hybrimoe
