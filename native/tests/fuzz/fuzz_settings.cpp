// The settings of hybrimoe_configure and HYBRIMOE_CONFIG.
#include "fuzz.h"
#include "hybrimoe.h"
#include "settings.h"

#include <cstring>
#include <stdexcept>

std::vector<std::string> fuzz_seeds() {
    return {
        R"({"cpu_kernels": "auto", "devices": ["CPU"], "expert_cache": {"bytes": 1048576}, "fit_margin_bytes": 1024})",
        R"({"expert_cache": {"fraction": 0.5}, "devices": "auto", "cache_policy": "mrs:alpha=0.3", "guard": false})",
        R"({"costs": {"cpu_us": 1, "cpu_first_us": 0, "gpu_us": 2, "copy_us": 3}, "max_batch_tokens": 512})",
        R"({"costs": {"layer_class": [0], "classes": [{"cpu": {"points": [[1, 2]]}}], "devices": []}, "trace": 0})",
        R"({"faults": {"fail_copy_every": 3, "stick_us": 5}, "throttle_link_bytes_per_s": 1e9, "state_path": ""})",
        R"({"expert_cache": 4, "n_cpu_layers": 1, "route_trace": "", "pin_experts": true, "log_to_stderr": false})",
        R"({"reproducible": true, "state_path": "s", "schedule": "gpu-only", "prefetch": "none", "admission": "always"})",
        R"({"live_costs": true, "trace_scores": false, "trace_spans": true, "pin_threads": [0, 3]})",
    };
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    const std::string text(reinterpret_cast<const char *>(data), size);
    try {
        const hybrimoe::settings read = hybrimoe::parse_settings(text, {});
        REQUIRE(read.max_batch_tokens >= 1 && read.fit_margin_bytes >= 0 && read.n_cpu_layers >= 0);
        REQUIRE(read.expert_cache.fraction >= 0.0 && read.expert_cache.fraction <= 1.0);
        const hybrimoe::settings held = hybrimoe::in_force(read);
        REQUIRE(held.reproducible == read.reproducible && held.devices == read.devices);
        REQUIRE(!held.reproducible || (held.state_path.empty() && held.costs_json.empty() && !held.live_costs));
    } catch (const std::invalid_argument & error) {
        REQUIRE(std::strlen(error.what()) > 0);
    }
    // The C interface: any failure is a message that fits, never an exception.
    char message[64];
    std::memset(message, 'x', sizeof(message));
    if (hybrimoe_configure(text.c_str(), message, sizeof(message)) != 0) {
        REQUIRE(std::memchr(message, 0, sizeof(message)) != nullptr && message[0] != 0);
    }
    return 0;
}
