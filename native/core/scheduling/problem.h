// One layer to schedule, and the plan for it.
#pragma once

#include "../cost_model.h"

#include <limits>
#include <vector>

namespace hybrimoe {

struct work_item {
    int expert      = 0;
    int n_tokens    = 1;
    int device      = cpu_device; // accelerator that holds it or is loading it; cpu_device: none (a miss)
    bool loading    = false;      // its copy to `device` is under way
    bool may_copy   = true;       // a miss that may be copied in this layer
    double ready_us = 0.0;        // loading: end of its copy, from the layer's start
};

// Times count from the start of the layer.
struct layer_problem {
    const cost_model * costs = nullptr;
    int layer                = 0;
    const work_item * items  = nullptr;
    int n_items              = 0;

    double cpu_ready_us = 0.0;
    double gpu_ready_us[max_devices]{};  // e.g. the shared expert, first on the GPU
    double link_ready_us[max_devices]{}; // e.g. a prefetch still under way
    int max_copies[max_devices];         // slots (or scratch) that demanded copies may take

    // Cards of the slots that demanded copies would take, the slot that loses least first. Between cards that serve the
    // layer equally well it decides; null: nothing does.
    const int8_t * slot_order = nullptr;
    int n_slot_order          = 0;
    bool copies_stay          = false; // in slots: later steps find what was copied

    layer_problem() {
        for (int & n : max_copies) {
            n = std::numeric_limits<int>::max();
        }
    }
};

struct placement {
    int expert           = 0;
    int device           = cpu_device; // who computes it
    bool copied          = false;      // needs a demanded copy first
    double start_us      = 0.0;
    double end_us        = 0.0;
    double copy_start_us = 0.0;
    double copy_end_us   = 0.0;
};

struct layer_plan {
    std::vector<placement> placements; // in the order of the problem's items

    double makespan_us = 0.0;
    double cpu_end_us  = 0.0;
    double gpu_end_us[max_devices]{};
    double link_end_us[max_devices]{}; // end of the last demanded copy; the link's ready time if there is none
    double dram_us    = 0.0;           // what the shared DRAM ceiling alone needs
    double cpu_bytes  = 0.0;           // read by the CPU
    double copy_bytes = 0.0;           // moved by demanded copies
    int n_cpu         = 0;
    int n_gpu         = 0;
    int n_copies      = 0;
};

} // namespace hybrimoe
