// A virtual clock over a routing trace: the runtime plans every layer, copies take the time that the cost model says,
// and the clock advances by the planned makespans. Times are simulated, never measured.
#pragma once

#include "../runtime.h"
#include "cache_replay.h"

namespace hybrimoe {

struct clock_options {
    const int64_t * step_offsets = nullptr; // [n_steps + 1] tokens of each step (one token: decode; more: prefill)
    int64_t n_steps              = 0;
    double gap_us                = 0.0;     // attention and all else between two MoE layers
    double shared_us             = 0.0;     // shared experts, first on device 0 in every layer
    bool scratch                 = true;    // steps of several tokens may stream copies through scratch slots
    const float * lookahead      = nullptr; // [n_tokens, n_layers, max_lookahead, n_expert] or null
};

struct clock_layer { // one record per step and layer that ran
    int64_t step;
    int32_t layer, n_rows, n_hits, n_misses, n_cpu, n_gpu, n_copies, n_prefetched;
    double start_us, makespan_us, cpu_us, gpu_us, link_us;
};

struct clock_result {
    double total_us    = 0.0; // virtual time of all steps
    double experts_us  = 0.0; // of it in experts
    double cpu_busy_us = 0.0, gpu_busy_us = 0.0, link_busy_us = 0.0;
    int64_t n_layers_run = 0;
};

// `records` is null, or has room for `capacity` of them; records beyond are not written.
status replay_clock(const replay_trace & trace, const clock_options & options, runtime & rt, clock_layer * records,
                    int64_t capacity, clock_result & out);

} // namespace hybrimoe
