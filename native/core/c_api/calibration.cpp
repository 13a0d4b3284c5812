#include "../calibration/cost_estimator.h"

#include "handles.h"

using namespace hybrimoe;

struct hm_estimator {
    cost_estimator estimator;
};

namespace {

status null_estimator() {
    return null_argument("estimator");
}

} // namespace

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

int hm_estimator_create(const hm_costs * calibrated, double memory_samples, hm_estimator ** out, char * message,
                        size_t message_size) {
    return guarded(message, message_size, [&]() -> status {
        if (!calibrated || !out) {
            return null_argument("calibrated or out");
        }
        estimator_options options;
        if (memory_samples != 0.0) {
            options.memory = memory_samples;
        }
        auto made = std::make_unique<hm_estimator>();
        HYBRIMOE_TRY(cost_estimator::create(calibrated->model, options, made->estimator));
        *out = made.release();
        return {};
    });
}

void hm_estimator_destroy(hm_estimator * estimator) {
    delete estimator;
}

void hm_estimator_observe_copy(hm_estimator * e, int32_t device, double bytes, double us, double now_us) {
    if (e) {
        e->estimator.observe_copy(device, bytes, us, now_us);
    }
}

void hm_estimator_observe_cpu(hm_estimator * e, int32_t layer, const int32_t * n_tokens, int32_t n_experts, double us,
                              double copied_bytes, double now_us) {
    if (e) {
        e->estimator.observe_cpu(layer, n_tokens, n_experts, us, copied_bytes, now_us);
    }
}

void hm_estimator_observe_gpu(hm_estimator * e, int32_t layer, int32_t device, const int32_t * n_tokens,
                              int32_t n_experts, double us, double now_us) {
    if (e) {
        e->estimator.observe_gpu(layer, device, n_tokens, n_experts, us, now_us);
    }
}

int32_t hm_estimator_moved(const hm_estimator * e) {
    return e && e->estimator.moved() ? 1 : 0;
}

int hm_estimator_apply(hm_estimator * e, hm_costs * costs, char * message, size_t message_size) {
    return leave(!e       ? null_estimator()
                 : !costs ? null_argument("costs")
                          : e->estimator.apply(costs->model),
                 message, message_size);
}

int32_t hm_estimator_next_drift(hm_estimator * e, hm_drift * out) {
    drift_report r;
    if (!e || !out || !e->estimator.next_drift(r)) {
        return 0;
    }
    *out = {static_cast<int32_t>(r.kind), r.device, r.cls, r.parameter, r.old_value, r.new_value, r.since_us};
    return 1;
}

int64_t hm_estimator_n_rejected(const hm_estimator * e) {
    return e ? e->estimator.n_rejected() : 0;
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
