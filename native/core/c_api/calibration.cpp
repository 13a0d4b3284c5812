#include "../calibration/robust_fit.h"

#include "handles.h"

using namespace hybrimoe;

extern "C" {

int hm_fit_costs(const double * x, const double * y, int32_t n_samples, int32_t n_params, hm_fit * out, char * message,
                 size_t message_size) {
    return guarded(message, message_size, [&]() -> status {
        if (!x || !y || !out) {
            return null_argument("x, y or out");
        }
        fit_result found;
        HYBRIMOE_TRY(fit_costs(x, y, n_samples, n_params, found));
        for (int i = 0; i < HM_MAX_FIT_PARAMS; ++i) {
            out->params[i] = found.params[i];
        }
        out->median_error = found.median_error;
        out->p90_error    = found.p90_error;
        out->n_outliers   = found.n_outliers;
        return {};
    });
}

int hm_costs_link(const hm_costs * costs, int32_t device, double * latency_us, double * bytes_per_us, char * message,
                  size_t message_size) {
    return guarded(message, message_size, [&]() -> status {
        if (!costs || !latency_us || !bytes_per_us) {
            return null_argument("costs, latency_us or bytes_per_us");
        }
        if (device < 0 || device >= costs->model.n_devices()) {
            return status::fail(error_code::invalid_argument, "device %d is outside 0..%d", device,
                                costs->model.n_devices() - 1);
        }
        *latency_us   = costs->model.link(device).latency_us;
        *bytes_per_us = costs->model.link(device).bytes_per_us;
        return {};
    });
}

int hm_costs_expert_us(const hm_costs * costs, int32_t layer, int32_t device, double n_tokens, int32_t first,
                       double * us, char * message, size_t message_size) {
    return guarded(message, message_size, [&]() -> status {
        if (!costs || !us) {
            return null_argument("costs or us");
        }
        const cost_model & m = costs->model;
        if (layer < 0 || layer >= m.n_layers() || device < cpu_device || device >= m.n_devices()) {
            return status::fail(error_code::invalid_argument, "layer %d or device %d is out of range", layer, device);
        }
        HYBRIMOE_TRY(m.check());
        *us = device == cpu_device ? m.t_cpu(layer, n_tokens, first != 0) : m.t_gpu(layer, device, n_tokens);
        return {};
    });
}

double hm_costs_step_us(const hm_costs * costs, int32_t device) {
    const bool known = costs && device >= cpu_device && device < costs->model.n_devices();
    return known ? costs->model.step_us(device) : unknown_cost;
}

double hm_costs_dram(const hm_costs * costs) {
    return costs ? costs->model.dram_bytes_per_us() : unknown_cost;
}

} // extern "C"
