#include "handles.h"

using namespace hybrimoe;

namespace {

status read_curve(const hm_curve * c, cost_curve & out) {
    if (!c) {
        return null_argument("curve");
    }
    return c->n_points == 0 ? cost_curve::affine(c->fixed_us, c->per_token_us, out)
                            : cost_curve::piecewise(c->n_tokens, c->us, c->n_points, out);
}

} // namespace

extern "C" {

int hm_costs_create(int32_t n_layers, int32_t n_classes, int32_t n_devices, hm_costs ** out, char * message,
                    size_t message_size) {
    return guarded(message, message_size, [&]() -> status {
        if (!out) {
            return null_argument("out");
        }
        auto made = std::make_unique<hm_costs>();
        HYBRIMOE_TRY(cost_model::create(n_layers, n_classes, n_devices, made->model));
        *out = made.release();
        return {};
    });
}

void hm_costs_destroy(hm_costs * costs) {
    delete costs;
}

int hm_costs_set_layer_class(hm_costs * costs, int32_t layer, int32_t cls, char * message, size_t message_size) {
    return leave(costs ? costs->model.set_layer_class(layer, cls) : null_argument("costs"), message, message_size);
}

int hm_costs_set_bytes(hm_costs * costs, int32_t cls, double bytes, char * message, size_t message_size) {
    return leave(costs ? costs->model.set_bytes(cls, bytes) : null_argument("costs"), message, message_size);
}

int hm_costs_set_cpu(hm_costs * costs, int32_t cls, const hm_curve * curve, double first_us, char * message,
                     size_t message_size) {
    return guarded(message, message_size, [&]() -> status {
        cost_curve c;
        HYBRIMOE_TRY(read_curve(curve, c));
        return costs ? costs->model.set_cpu(cls, c, first_us) : null_argument("costs");
    });
}

int hm_costs_set_gpu(hm_costs * costs, int32_t cls, int32_t device, const hm_curve * curve, char * message,
                     size_t message_size) {
    return guarded(message, message_size, [&]() -> status {
        cost_curve c;
        HYBRIMOE_TRY(read_curve(curve, c));
        return costs ? costs->model.set_gpu(cls, device, c) : null_argument("costs");
    });
}

int hm_costs_set_link(hm_costs * costs, int32_t device, double latency_us, double bytes_per_us, char * message,
                      size_t message_size) {
    return leave(costs ? costs->model.set_link(device, latency_us, bytes_per_us) : null_argument("costs"), message,
                 message_size);
}

int hm_costs_set_step(hm_costs * costs, int32_t device, double step_us, char * message, size_t message_size) {
    return leave(costs ? costs->model.set_step(device, step_us) : null_argument("costs"), message, message_size);
}

int hm_costs_set_dram(hm_costs * costs, double bytes_per_us, char * message, size_t message_size) {
    return leave(costs ? costs->model.set_dram(bytes_per_us) : null_argument("costs"), message, message_size);
}

int hm_costs_check(const hm_costs * costs, char * message, size_t message_size) {
    return leave(costs ? costs->model.check() : null_argument("costs"), message, message_size);
}

int hm_scheduler_create(const hm_policy * policy, hm_scheduler ** out, char * message, size_t message_size) {
    return guarded(message, message_size, [&]() -> status {
        if (!out) {
            return null_argument("out");
        }
        auto made = std::make_unique<hm_scheduler>();
        HYBRIMOE_TRY(make_from(schedulers(), policy, model_shape{1, max_experts, 1}, made->policy));
        *out = made.release();
        return {};
    });
}

void hm_scheduler_destroy(hm_scheduler * scheduler) {
    delete scheduler;
}

int hm_scheduler_plan(const hm_scheduler * scheduler, const hm_costs * costs, const hm_problem * given, hm_plan * out,
                      char * message, size_t message_size) {
    return guarded(message, message_size, [&]() -> status {
        if (!scheduler || !costs || !given || !out || !out->placements || (given->n_items > 0 && !given->items)) {
            return null_argument("scheduler, costs, problem, items, plan or placements");
        }
        std::vector<work_item> items;
        for (int i = 0; i < given->n_items; ++i) {
            const hm_work_item & w = given->items[i];
            items.push_back({w.expert, w.n_tokens, w.device, w.loading != 0, w.may_copy != 0, w.ready_us});
        }
        layer_problem problem;
        problem.costs        = &costs->model;
        problem.layer        = given->layer;
        problem.items        = items.data();
        problem.n_items      = given->n_items;
        problem.cpu_ready_us = given->cpu_ready_us;
        for (int d = 0; d < max_devices; ++d) {
            problem.gpu_ready_us[d]  = given->gpu_ready_us[d];
            problem.link_ready_us[d] = given->link_ready_us[d];
            problem.max_copies[d]    = given->max_copies[d];
        }
        layer_plan plan;
        HYBRIMOE_TRY(plan_layer(*scheduler->policy, problem, plan));
        out->n_placements = static_cast<int32_t>(plan.placements.size());
        for (size_t i = 0; i < plan.placements.size(); ++i) {
            const placement & p = plan.placements[i];
            out->placements[i]  = {p.expert, p.device, p.copied, p.start_us, p.end_us, p.copy_start_us, p.copy_end_us};
        }
        out->makespan_us = plan.makespan_us;
        out->cpu_end_us  = plan.cpu_end_us;
        out->dram_us     = plan.dram_us;
        out->cpu_bytes   = plan.cpu_bytes;
        out->copy_bytes  = plan.copy_bytes;
        for (int d = 0; d < max_devices; ++d) {
            out->gpu_end_us[d]  = plan.gpu_end_us[d];
            out->link_end_us[d] = plan.link_end_us[d];
        }
        out->n_cpu    = plan.n_cpu;
        out->n_gpu    = plan.n_gpu;
        out->n_copies = plan.n_copies;
        return {};
    });
}

} // extern "C"
