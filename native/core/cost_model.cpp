#include "cost_model.h"

#include <cmath>

namespace hybrimoe {

namespace {

bool is_cost(double us) {
    return std::isfinite(us) && us >= 0.0;
}

status bad_cost(const char * what, double value) {
    return status::fail(error_code::invalid_argument, "%s = %g must be finite and at least 0", what, value);
}

} // namespace

status cost_curve::affine(double fixed_us, double per_token_us, cost_curve & out) {
    if (!is_cost(fixed_us)) {
        return bad_cost("fixed_us", fixed_us);
    }
    if (!is_cost(per_token_us)) {
        return bad_cost("per_token_us", per_token_us);
    }
    out               = cost_curve();
    out.fixed_us_     = fixed_us;
    out.per_token_us_ = per_token_us;
    return {};
}

status cost_curve::piecewise(const double * n_tokens, const double * us, int n_points, cost_curve & out) {
    if (n_points < 1 || n_points > max_points || !n_tokens || !us) {
        return status::fail(error_code::invalid_argument, "n_points = %d is outside 1..%d", n_points, max_points);
    }
    cost_curve curve;
    for (int i = 0; i < n_points; ++i) {
        if (!is_cost(us[i])) {
            return bad_cost("a curve's time", us[i]);
        }
        const double least = i == 0 ? 1.0 : n_tokens[i - 1];
        if (!std::isfinite(n_tokens[i]) || n_tokens[i] < least || (i > 0 && n_tokens[i] == least)) {
            return status::fail(error_code::invalid_argument,
                                "point %d: n_tokens = %g must be finite, at least 1 and above the one before", i,
                                n_tokens[i]);
        }
        curve.x_[i] = n_tokens[i];
        curve.y_[i] = us[i];
    }
    curve.n_points_ = n_points;
    out             = curve;
    return {};
}

double cost_curve::interpolate(double n_tokens) const {
    if (n_tokens <= x_[0] || n_points_ == 1) {
        return y_[0];
    }
    int i = 1;
    while (i < n_points_ - 1 && n_tokens > x_[i]) {
        ++i;
    }
    const double slope = (y_[i] - y_[i - 1]) / (x_[i] - x_[i - 1]);
    const double value = y_[i - 1] + slope * (n_tokens - x_[i - 1]);
    // A falling last segment is measurement noise: it must not reach zero far outside the measured range.
    return n_tokens > x_[i] && slope < 0.0 ? y_[i] : value;
}

cost_curve cost_curve::scaled(double first_factor, double tokens_factor) const {
    cost_curve out     = *this;
    const double first = at(1.0);
    if (n_points_ == 0) {
        out.per_token_us_ = tokens_factor * per_token_us_;
        out.fixed_us_     = first_factor * first - out.per_token_us_;
        if (out.fixed_us_ >= 0.0) {
            return out;
        }
        // A negative fixed part is no cost: the same line through its points at one and two tokens.
        out.n_points_ = 2;
        for (int i = 0; i < 2; ++i) {
            out.x_[i] = i + 1.0;
            out.y_[i] = first_factor * first + tokens_factor * per_token_us_ * i;
        }
        return out;
    }
    for (int i = 0; i < n_points_; ++i) {
        // A measured curve may fall a little: never below zero.
        const double us = first_factor * first + tokens_factor * (y_[i] - first);
        out.y_[i]       = us > 0.0 ? us : 0.0;
    }
    return out;
}

status cost_model::create(int n_layers, int n_classes, int n_devices, cost_model & out) {
    if (n_layers < 1 || n_layers > max_layers) {
        return status::fail(error_code::invalid_argument, "n_layers = %d is outside 1..%d", n_layers, max_layers);
    }
    if (n_classes < 1 || n_classes > n_layers) {
        return status::fail(error_code::invalid_argument, "n_classes = %d is outside 1..%d (layers)", n_classes,
                            n_layers);
    }
    if (n_devices < 0 || n_devices > max_devices) {
        return status::fail(error_code::invalid_argument, "n_devices = %d is outside 0..%d", n_devices, max_devices);
    }
    cost_model model;
    model.n_devices_ = n_devices;
    // With several classes every layer must be told its own.
    model.class_of_layer_.assign(static_cast<size_t>(n_layers), n_classes == 1 ? 0 : -1);
    model.classes_.resize(static_cast<size_t>(n_classes));
    for (double & step_us : model.gpu_step_us_) {
        step_us = unknown_cost;
    }
    out = std::move(model);
    return {};
}

status cost_model::check_class(int cls) const {
    if (cls < 0 || cls >= n_classes()) {
        return status::fail(error_code::invalid_argument, "layer class %d is outside 0..%d", cls, n_classes() - 1);
    }
    return {};
}

status cost_model::check_device(int device) const {
    if (device < 0 || device >= n_devices_) {
        return status::fail(error_code::invalid_argument, "device %d is outside 0..%d", device, n_devices_ - 1);
    }
    return {};
}

status cost_model::set_layer_class(int layer, int cls) {
    HYBRIMOE_TRY(check_class(cls));
    if (layer < 0 || layer >= n_layers()) {
        return status::fail(error_code::invalid_argument, "layer %d is outside 0..%d", layer, n_layers() - 1);
    }
    class_of_layer_[static_cast<size_t>(layer)] = cls;
    return {};
}

status cost_model::set_bytes(int cls, double bytes) {
    HYBRIMOE_TRY(check_class(cls));
    if (!std::isfinite(bytes) || bytes <= 0.0) {
        return status::fail(error_code::invalid_argument, "expert bytes = %g must be finite and above 0", bytes);
    }
    classes_[static_cast<size_t>(cls)].bytes = bytes;
    return {};
}

status cost_model::set_cpu(int cls, const cost_curve & curve, double first_us) {
    HYBRIMOE_TRY(check_class(cls));
    if (!is_cost(first_us)) {
        return bad_cost("first_us", first_us);
    }
    classes_[static_cast<size_t>(cls)].cpu          = curve;
    classes_[static_cast<size_t>(cls)].cpu_first_us = first_us;
    return {};
}

status cost_model::set_gpu(int cls, int device, const cost_curve & curve) {
    HYBRIMOE_TRY(check_class(cls));
    HYBRIMOE_TRY(check_device(device));
    classes_[static_cast<size_t>(cls)].gpu[device] = curve;
    return {};
}

status cost_model::set_link(int device, double latency_us, double bytes_per_us) {
    HYBRIMOE_TRY(check_device(device));
    if (!is_cost(latency_us)) {
        return bad_cost("latency_us", latency_us);
    }
    if (!std::isfinite(bytes_per_us) || bytes_per_us <= 0.0) {
        return status::fail(error_code::invalid_argument, "link bytes_per_us = %g must be finite and above 0",
                            bytes_per_us);
    }
    links_[device] = {latency_us, bytes_per_us};
    return {};
}

status cost_model::set_step(int device, double step_us) {
    if (device != cpu_device) {
        HYBRIMOE_TRY(check_device(device));
    }
    if (!is_cost(step_us)) {
        return bad_cost("step_us", step_us);
    }
    (device == cpu_device ? cpu_step_us_ : gpu_step_us_[device]) = step_us;
    return {};
}

status cost_model::set_dram(double bytes_per_us) {
    if (!(bytes_per_us > 0.0)) { // infinity is a legal answer, NaN is none
        return status::fail(error_code::invalid_argument, "dram bytes_per_us = %g must be above 0", bytes_per_us);
    }
    dram_bytes_per_us_ = bytes_per_us;
    return {};
}

status cost_model::check() const {
    for (int layer = 0; layer < n_layers(); ++layer) {
        if (class_of(layer) < 0) {
            return status::fail(error_code::missing_cost, "layer %d has no layer class", layer);
        }
    }
    for (int cls = 0; cls < n_classes(); ++cls) {
        const layer_class & c = classes_[static_cast<size_t>(cls)];
        if (c.bytes != c.bytes) {
            return status::fail(error_code::missing_cost, "expert bytes of layer class %d are unknown", cls);
        }
        if (!c.cpu.known() || c.cpu_first_us != c.cpu_first_us) {
            return status::fail(error_code::missing_cost, "CPU time of layer class %d is unknown", cls);
        }
        for (int d = 0; d < n_devices_; ++d) {
            if (!c.gpu[d].known()) {
                return status::fail(error_code::missing_cost, "time of layer class %d on device %d is unknown", cls, d);
            }
        }
    }
    for (int d = 0; d < n_devices_; ++d) {
        if (links_[d].bytes_per_us != links_[d].bytes_per_us) {
            return status::fail(error_code::missing_cost, "the rate of the link to device %d is unknown", d);
        }
        if (gpu_step_us_[d] != gpu_step_us_[d]) {
            return status::fail(error_code::missing_cost, "the cost per step of device %d is unknown", d);
        }
    }
    if (cpu_step_us_ != cpu_step_us_) {
        return status::fail(error_code::missing_cost, "the cost per step of the CPU is unknown");
    }
    if (dram_bytes_per_us_ != dram_bytes_per_us_) {
        return status::fail(error_code::missing_cost, "the shared DRAM ceiling is unknown (infinity if there is none)");
    }
    return {};
}

} // namespace hybrimoe
