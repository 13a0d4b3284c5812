#include "pricing.h"

#include <algorithm>
#include <cmath>

namespace hybrimoe {

namespace {

bool is_time(double us) {
    return std::isfinite(us) && us >= 0.0;
}

status check(const layer_problem & p) {
    if (!p.costs) {
        return status::fail(error_code::missing_cost, "no cost model");
    }
    if (p.layer < 0 || p.layer >= p.costs->n_layers()) {
        return status::fail(error_code::invalid_argument, "layer %d is outside 0..%d", p.layer,
                            p.costs->n_layers() - 1);
    }
    if (p.n_items < 1 || p.n_items > max_experts || !p.items) {
        return status::fail(error_code::invalid_argument, "%d active experts, must be 1..%d", p.n_items, max_experts);
    }
    if (!is_time(p.cpu_ready_us)) {
        return status::fail(error_code::invalid_argument, "cpu_ready_us = %g must be finite and at least 0",
                            p.cpu_ready_us);
    }
    const int n_devices = p.costs->n_devices();
    for (int d = 0; d < n_devices; ++d) {
        if (!is_time(p.gpu_ready_us[d]) || !is_time(p.link_ready_us[d])) {
            return status::fail(error_code::invalid_argument,
                                "device %d: gpu_ready_us = %g, link_ready_us = %g must be finite and at least 0", d,
                                p.gpu_ready_us[d], p.link_ready_us[d]);
        }
    }
    for (int i = 0; i < p.n_items; ++i) {
        const work_item & item = p.items[i];
        if (item.n_tokens < 1) {
            return status::fail(error_code::invalid_argument, "expert %d: %d tokens, must be at least 1", item.expert,
                                item.n_tokens);
        }
        if (item.device < cpu_device || item.device >= n_devices || (item.loading && item.device == cpu_device)) {
            return status::fail(error_code::invalid_argument, "expert %d: device %d is outside %d..%d", item.expert,
                                item.device, item.loading ? 0 : cpu_device, n_devices - 1);
        }
        if (item.loading && !is_time(item.ready_us)) {
            return status::fail(error_code::invalid_argument, "expert %d: ready_us = %g must be finite and at least 0",
                                item.expert, item.ready_us);
        }
    }
    return {};
}

// Timeline of one card; `visit(item, start, end)` sees its experts in order. Returns the card's end.
template <class visitor>
double run_card(const priced_problem & p, const assignment & device_of, int d, double link_us, visitor visit) {
    double now = p.problem->gpu_ready_us[d];
    bool used  = false;
    auto run   = [&](int i, double arrival_us) {
        if (!used) {
            now += p.gpu_step_us[d];
            used = true;
        }
        const double start = std::max(now, arrival_us);
        now                = start + p.gpu_us[d][i];
        visit(i, start, now);
    };
    for (int k = 0; k < p.n_items; ++k) {
        const int i = p.order[k];
        if (device_of[i] == d && p.is_hit(i)) {
            run(i, 0.0);
        }
    }
    for (int k = 0; k < p.n_loading; ++k) {
        const int i = p.loading[k];
        if (device_of[i] == d) {
            run(i, p.items[i].ready_us);
        }
    }
    for (int k = 0; k < p.n_items; ++k) {
        const int i = p.order[k];
        if (device_of[i] == d && p.is_miss(i)) {
            link_us += p.copy_us[d];
            run(i, link_us);
        }
    }
    return now;
}

} // namespace

status price(const layer_problem & problem, priced_problem & p) {
    HYBRIMOE_TRY(check(problem));
    const cost_model & costs = *problem.costs;
    const layer_class & cls  = costs.of_layer(problem.layer);

    p.problem      = &problem;
    p.items        = problem.items;
    p.n_items      = problem.n_items;
    p.n_devices    = costs.n_devices();
    p.n_loading    = 0;
    p.cpu_first_us = cls.cpu_first_us;
    p.cpu_step_us  = costs.step_us(cpu_device);
    p.bytes        = cls.bytes;

    p.dram_bytes_per_us = costs.dram_bytes_per_us();

    double sum = p.cpu_first_us + p.cpu_step_us + p.bytes + 1.0 / p.dram_bytes_per_us;
    for (int d = 0; d < p.n_devices; ++d) {
        p.gpu_step_us[d]   = costs.step_us(d);
        p.copy_us[d]       = costs.t_copy(d, cls.bytes);
        p.link_ready_us[d] = problem.link_ready_us[d];
        sum += p.gpu_step_us[d] + p.copy_us[d];
    }
    // Most layers of a decode step have one load only: price each load once.
    for (int i = 0; i < p.n_items; ++i) {
        const work_item & item = p.items[i];
        p.order[i]             = i;
        if (i > 0 && item.n_tokens == p.items[i - 1].n_tokens) {
            p.cpu_us[i] = p.cpu_us[i - 1];
            for (int d = 0; d < p.n_devices; ++d) {
                p.gpu_us[d][i] = p.gpu_us[d][i - 1];
            }
        } else {
            p.cpu_us[i] = cls.cpu.at(item.n_tokens);
            sum += p.cpu_us[i];
            for (int d = 0; d < p.n_devices; ++d) {
                p.gpu_us[d][i] = cls.gpu[d].at(item.n_tokens);
                sum += p.gpu_us[d][i];
            }
        }
        if (item.loading) {
            p.loading[p.n_loading++]     = i;
            p.link_ready_us[item.device] = std::max(p.link_ready_us[item.device], item.ready_us);
        }
    }
    if (!std::isfinite(sum)) {
        HYBRIMOE_TRY(costs.check()); // names the cost
        return status::fail(error_code::invalid_argument, "costs of layer %d are too large", problem.layer);
    }
    const work_item * items = p.items;
    std::sort(p.order, p.order + p.n_items, [items](int a, int b) {
        return items[a].n_tokens != items[b].n_tokens ? items[a].n_tokens > items[b].n_tokens : a < b;
    });
    std::sort(p.loading, p.loading + p.n_loading, [items](int a, int b) {
        return items[a].ready_us != items[b].ready_us ? items[a].ready_us < items[b].ready_us : a < b;
    });
    return {};
}

double makespan(const priced_problem & p, const assignment & device_of) {
    double cpu_us = 0.0;
    int n_reads   = 0;
    bool any_cpu  = false;
    for (int i = 0; i < p.n_items; ++i) {
        if (device_of[i] == cpu_device) {
            cpu_us += p.cpu_us[i];
            any_cpu = true;
            ++n_reads;
        } else if (p.is_miss(i)) {
            ++n_reads;
        }
    }
    double end = p.problem->cpu_ready_us;
    if (any_cpu) {
        end += p.cpu_step_us + p.cpu_first_us + cpu_us;
    }
    for (int d = 0; d < p.n_devices; ++d) {
        end = std::max(end, run_card(p, device_of, d, p.link_ready_us[d], [](int, double, double) {}));
    }
    return std::max(end, n_reads * p.bytes / p.dram_bytes_per_us);
}

void build_plan(const priced_problem & p, const assignment & device_of, layer_plan & out) {
    out.placements.assign(static_cast<size_t>(p.n_items), placement());
    out.n_cpu = out.n_gpu = out.n_copies = 0;
    out.cpu_bytes = out.copy_bytes = 0.0;

    // CPU: misses before hits that it takes over, lightest first (HybriMoE sec. IV-B).
    double now = p.problem->cpu_ready_us;
    bool used  = false;
    for (int pass = 0; pass < 2; ++pass) {
        for (int k = p.n_items - 1; k >= 0; --k) {
            const int i = p.order[k];
            if (device_of[i] != cpu_device || p.is_miss(i) != (pass == 0)) {
                continue;
            }
            placement & at = out.placements[static_cast<size_t>(i)];
            if (!used) {
                now += p.cpu_step_us;
            }
            at.start_us = now;
            now += p.cpu_us[i] + (used ? 0.0 : p.cpu_first_us);
            at.end_us = now;
            used      = true;
            out.cpu_bytes += p.bytes;
            ++out.n_cpu;
        }
    }
    out.cpu_end_us  = now;
    out.makespan_us = now;

    for (int d = 0; d < max_devices; ++d) {
        out.gpu_end_us[d] = out.link_end_us[d] = 0.0;
    }
    for (int d = 0; d < p.n_devices; ++d) {
        double link_us     = p.link_ready_us[d];
        out.gpu_end_us[d]  = run_card(p, device_of, d, link_us, [&](int i, double start, double end) {
            placement & at = out.placements[static_cast<size_t>(i)];
            at.start_us    = start;
            at.end_us      = end;
            ++out.n_gpu;
            if (p.is_miss(i)) {
                at.copied        = true;
                at.copy_start_us = link_us;
                link_us += p.copy_us[d];
                at.copy_end_us = link_us;
                out.copy_bytes += p.bytes;
                ++out.n_copies;
            }
        });
        out.link_end_us[d] = link_us;
        out.makespan_us    = std::max(out.makespan_us, out.gpu_end_us[d]);
    }
    for (int i = 0; i < p.n_items; ++i) {
        placement & at = out.placements[static_cast<size_t>(i)];
        at.expert      = p.items[i].expert;
        at.device      = device_of[i];
    }
    out.dram_us     = (out.n_copies + out.n_cpu) * p.bytes / p.dram_bytes_per_us;
    out.makespan_us = std::max(out.makespan_us, out.dram_us);
}

} // namespace hybrimoe
