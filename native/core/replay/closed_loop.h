// Decisions on believed costs, executed at true ones: a routing trace through runtime and governor, on a virtual
// machine whose costs change while it runs. Every token is one decoded token. Times are simulated, never measured.
#pragma once

#include "../governor.h"
#include "cache_replay.h"

#include <vector>

namespace hybrimoe {

// What is true from one token on, until the next phase.
struct machine_phase {
    int64_t from_token = 0;
    cost_model costs;
    double noise           = 0.0; // standard deviation of the logarithm of every time
    double outlier_share   = 0.0; // of all times that take outlier_factor times as long
    double outlier_factor  = 1.0;
    int waits_every_layers = 0; // an accelerator's batch waits in each so-manyth layer; 0: never
    double waits_us        = 0.0;
};

struct loop_options {
    std::vector<machine_phase> phases; // the first one from token 0 on
    int64_t n_tokens   = 0;            // the trace is repeated until there are so many
    double gap_us      = 0.0;          // attention and all else between two MoE layers
    double overhead_us = 0.0;          // per layer, of what no plan changes (governor.h)
    uint64_t seed      = 1;            // of noise and outliers: equal seeds give all runs the same ones
    bool is_told       = false;        // the runtime is told the true costs of each phase: the oracle
};

struct loop_token {
    double us              = 0.0; // of the MoE layers
    double cpu_only_us     = 0.0; // of plain placements under the same noise: all experts on the CPU,
    double whole_layers_us = 0.0; // or whole layers on the accelerators as far as the cache's memory reaches
    double trying_us       = 0.0; // of `us`: trials, and slots filled anew for a change of the guard's level
    int n_trials           = 0;
    int n_gpu              = 0; // experts computed on accelerators
    int n_copies           = 0; // issued
    guard_level level      = guard_level::full;
    // What is believed of an expert of the first layer over what is true: its time on the CPU and on the first
    // accelerator, its copy, and a byte under the DRAM ceiling.
    double believed_cpu = 1.0, believed_gpu = 1.0, believed_link = 1.0, believed_dram = 1.0;
};

// `tokens`: options.n_tokens of them. The runtime has the believed costs, those that `gov` was made with. Refuses
// phases that are not in order, and costs that lack one.
status run_closed_loop(const replay_trace & trace, const loop_options & options, runtime & rt, governor & gov,
                       loop_token * tokens);

} // namespace hybrimoe
