// The cost model applied to one layer: per-item prices, the makespan of an assignment, and its timeline. Every
// scheduler is judged by these same functions, so "never worse than X" holds under one model.
#pragma once

#include "problem.h"

namespace hybrimoe {

// An assignment: per item, the device that computes it. A hit may move to the CPU but not to another card.
using assignment = int8_t[max_experts];

struct priced_problem {
    const layer_problem * problem;
    const work_item * items;
    int n_items;
    int n_devices;

    int order[max_experts]; // item indices, heaviest load first
    int n_loading;
    int loading[max_experts]; // loading items, earliest copy first
    double cpu_us[max_experts];
    double gpu_us[max_devices][max_experts];

    double cpu_first_us;
    double cpu_step_us;
    double gpu_step_us[max_devices];
    double copy_us[max_devices];
    double link_ready_us[max_devices]; // never before the copies already under way
    double bytes;
    double dram_bytes_per_us;

    bool is_hit(int i) const { return items[i].device != cpu_device && !items[i].loading; }
    bool is_miss(int i) const { return items[i].device == cpu_device; }
};

// Checks the problem and prices it. Costs that are unknown are an error.
status price(const layer_problem & problem, priced_problem & out);

// Time to finish the layer: the CPU works through its experts; each card runs hits first, then experts in the order in
// which their copies end; each link copies heaviest loads first (Johnson's rule for equal copy times); and CPU reads
// and copies together are bound by the DRAM ceiling.
double makespan(const priced_problem & priced, const assignment & device_of);

// The same with start and end of everything.
void build_plan(const priced_problem & priced, const assignment & device_of, layer_plan & out);

} // namespace hybrimoe
