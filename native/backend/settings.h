// What the host may set before a llama_context is made. Each backend instance keeps the settings it was created with.
#pragma once

#include <string>

namespace hybrimoe {

// Who computes experts on the CPU: ggml's kernels, our best for this CPU, or ours for one instruction set.
enum class cpu_kernels { ggml, best, named };

struct settings {
    cpu_kernels kernels = cpu_kernels::best;
    std::string kernel_set; // with cpu_kernels::named: "avx512", "avxvnni", "avx2" or "scalar"
};

// Parses one JSON object over `base`. Throws std::invalid_argument naming the key and the values it may have.
settings parse_settings(const std::string & json, settings base);

// The process-wide settings that new instances copy; the environment (HYBRIMOE_CPU) gives the defaults.
settings current_settings();
void set_current_settings(const settings & value);

} // namespace hybrimoe
