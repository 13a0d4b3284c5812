// What the host may set before a llama_context is made. Each backend instance keeps the settings it was created with.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace hybrimoe {

// Who computes experts on the CPU: ggml's kernels, our best for this CPU, or ours for one instruction set.
enum class cpu_kernels { ggml, best, named };

// How much of the accelerators' memory experts may take.
struct expert_cache_size {
    enum class kind { automatic, slots, bytes, fraction };

    kind is         = kind::automatic; // what is free, less the margin
    int64_t n_slots = 0;               // per layer, all devices together
    double n_bytes  = 0.0;             // all layers and devices together
    double fraction = 0.0;             // of the experts
    bool is_off() const { return is == kind::slots && n_slots == 0; }
};

// How the plug-in gets to see experts: as a host buffer's MoE blocks, or as a device that takes llama.cpp's whole graph
// (graph_front/wrapper.h).
enum class front_end { block, graph };

// Every expert alike: for tests and experiments. Microseconds.
struct simple_costs {
    double cpu_us = 0.0, cpu_first_us = 0.0, gpu_us = 0.0, copy_us = 0.0;
};

// What goes wrong on purpose, for tests. Counts start at 1; 0: never.
struct fault_plan {
    int64_t fail_copy_every  = 0; // every n-th copy fails
    int64_t stick_copy       = 0; // the n-th copy does not end for stick_us
    int64_t stick_us         = 0;
    int64_t delay_copy_us    = 0;  // added to every copy
    int64_t fail_alloc_from  = 0;  // this device allocation and all after it give nothing
    int64_t fail_alloc_until = 0;  // ... up to this one; 0: without end
    int64_t free_bytes       = -1; // what devices report as free; below 0: the truth
    int64_t scarce_from      = 0;  // from this look at free memory on there are scarce_bytes
    int64_t scarce_until     = 0;  // ... and from this one on free_bytes again; 0: for good
    int64_t scarce_bytes     = 0;
    int64_t fail_step        = 0; // the n-th planned step fails once it has been launched
    int64_t fail_finish      = 0; // ... or when its results are fetched
    int64_t fail_pass_end    = 0; // what is done after the n-th pass fails
    int64_t fail_set_up      = 0; // not 0: set-up fails once the caches are filled
    int64_t fail_worker      = 0; // the n-th order of each accelerator's worker fails
    int64_t pause_us         = 0; // how long the first pause after a failed step is; 0: as long as usual
    int64_t copy_patience_us = 0; // how long a copy may take; 0: as long as usual
};

struct settings {
    cpu_kernels kernels = cpu_kernels::best;
    std::string kernel_set; // with cpu_kernels::named: "avx512", "avxvnni", "avx2" or "scalar"

    front_end front = front_end::block; // counts when the library is loaded

    bool all_devices = true;          // every GPU that ggml has; else those named
    std::vector<std::string> devices; // ggml's names, e.g. "CUDA0"; "CPU" is a second CPU backend
    expert_cache_size expert_cache;
    int64_t fit_margin_bytes = int64_t{1} << 30;
    std::string cache_policy = "mrs"; // each as "name" or "name:param=value,..."
    std::string schedule     = "two-threshold";
    std::string prefetch     = "impact";
    std::string admission    = "pays";
    bool guard               = true;
    bool live_costs          = true;
    bool reproducible        = false; // nothing follows timings, earlier runs or free memory (see in_force)
    std::optional<simple_costs> simple;
    std::string costs_json;            // cost section of a calibration; empty: measured at the start
    int64_t n_cpu_layers     = 0;      // the first layers (llama.cpp's indices) that have no slots
    int64_t max_batch_tokens = 512;    // work memory that is reserved for prefill
    int64_t trace_bytes      = 0;      // ring of the recording; 0: nothing is recorded
    bool trace_scores        = true;   // ... with all router scores
    bool trace_spans         = true;   // ... with when each phase of a block and each copy began and ended
    std::string route_trace;           // benchmark only: a file whose expert ids replace the router's
    double throttle_bytes_per_s = 0.0; // benchmark only: copies are no faster
    std::string state_path;            // residency is read from and written to this file; empty: not kept
    bool observe       = false;        // serve what is known to others of this user (see observer/observer.h)
    bool log_to_stderr = true;
    bool pin_experts   = false;   // register the mapped file with the device, so that copies need no staging
    std::vector<int> pin_threads; // processors of the CPU kernels' threads (see thread_pins.h); empty: not pinned
    fault_plan faults;
};

// Parses one JSON object over `base`. Throws std::invalid_argument naming the key and the values it may have.
settings parse_settings(const std::string & json, settings base);

// What holds of `given`. With `reproducible`: experts stay where set-up put them, and policies, guard, live costs, kept
// residency and costs of any kind have no say, whatever their keys hold.
settings in_force(settings given);

// The process-wide settings that new instances copy; the environment gives the defaults: HYBRIMOE_CONFIG (a JSON
// object) and HYBRIMOE_CPU.
settings current_settings();
void set_current_settings(const settings & value);

} // namespace hybrimoe
