// The plug-in's C interface: everything Python (or any other host) may ask of libggml-hybrimoe.so beyond ggml's backend
// API. All functions are thread-safe. Strings are UTF-8 and owned by the library unless stated otherwise.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define HYBRIMOE_API __attribute__((visibility("default")))
#else
#define HYBRIMOE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Raised by one with every change of this header that an older caller would misread.
#define HYBRIMOE_ABI_VERSION 1

HYBRIMOE_API int hybrimoe_abi_version(void);
HYBRIMOE_API const char * hybrimoe_version(void);
// The ggml release and backend API the plug-in was compiled for; both must equal the running ggml's.
HYBRIMOE_API const char * hybrimoe_ggml_version(void);
HYBRIMOE_API int hybrimoe_ggml_backend_api_version(void);

// Why the running ggml cannot be used, or NULL when it can. Call it before ggml_backend_load().
HYBRIMOE_API const char * hybrimoe_check_ggml(void);

// Sets what backend instances created from now on use; instances that exist keep their settings.
// `json` is one object; known key: "cpu_kernels" ("auto", "ggml",
// "avx512", "avxvnni", "avx2", "scalar"). Returns 0, or -1 with a message in `error` and nothing
// changed.
HYBRIMOE_API int hybrimoe_configure(const char * json, char * error, size_t error_size);

// llama.cpp creates one backend instance per llama_context. Ids start at 1 and are never used twice.
// The id of the instance that the calling thread created last, 0 if none.
HYBRIMOE_API uint64_t hybrimoe_last_instance(void);

// Counts since the instance was made or reset. A block is one layer's whole MoE computation in one step.
struct hybrimoe_layer_counters {
    uint64_t n_steps;            // graph computations that contained this layer
    uint64_t n_tokens;           // tokens routed
    uint64_t n_blocks;           // blocks run by the plug-in's own dispatch
    uint64_t n_blocks_delegated; // blocks not recognised: handed node by node to ggml's CPU backend
    uint64_t n_experts_cpu;      // (expert, step) pairs computed on the CPU
    uint64_t n_experts_gpu;      // (expert, step) pairs computed on an accelerator
    double router_us;            // router, top-k and weights
    double experts_us;           // expert FFNs
    double merge_us;             // weighted sum over a token's experts
};

// Number of layers for which the instance holds counters (highest layer index seen + 1); 0 for an unknown instance.
HYBRIMOE_API int32_t hybrimoe_n_layers(uint64_t instance);
// Copies the counters of `layer` (0-based, llama.cpp's layer index). Returns 0, or -1 for an unknown instance or layer.
HYBRIMOE_API int hybrimoe_get_layer_counters(uint64_t instance, int32_t layer, struct hybrimoe_layer_counters * out);
// Nodes computed outside any recognised MoE block (evaluation callbacks, unmatched graphs), by ggml's CPU backend.
HYBRIMOE_API uint64_t hybrimoe_n_nodes_delegated(uint64_t instance);
HYBRIMOE_API int hybrimoe_reset_counters(uint64_t instance);

#ifdef __cplusplus
}
#endif
