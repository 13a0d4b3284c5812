// Measurements for the cost model, part of libggml-hybrimoe.so: what hybrimoe.h is to running, this is to probing.
//
// Functions return 0, or -1 with a message in `error` (always terminated). Times are microseconds of single runs, in
// order; the caller takes care of outliers. Device indices are those of ggml's registry (ggml_backend_dev_get). One
// thread at a time. A graphics driver that fails may end the process: probe in a child.
#pragma once

#include "hybrimoe.h"

#ifdef __cplusplus
extern "C" {
#endif

// One gated expert: gate and up [n_embd, n_ff] of gate_type, down [n_ff, n_embd] of down_type (ggml_type numbers).
// `op` is a ggml_glu_op. Weights are random, quantised by ggml.
struct hybrimoe_ffn_shape {
    int64_t n_embd, n_ff;
    int32_t gate_type, down_type;
    int32_t op;
    int32_t n_experts; // held in memory and used in turn, so that weights come from there and not from caches
};

// The plug-in's own CPU path: one node of a graph of ggml's CPU backend, whose callback is the expert kernels.
typedef struct hybrimoe_cpu_probe hybrimoe_cpu_probe;
HYBRIMOE_API int hybrimoe_cpu_probe_open(const struct hybrimoe_ffn_shape * shape, hybrimoe_cpu_probe ** out,
                                         char * error, size_t error_size);
HYBRIMOE_API void hybrimoe_cpu_probe_close(hybrimoe_cpu_probe * probe);
// One batch: n_active experts (0: the fixed cost alone) with n_tokens each. us: [n_runs].
HYBRIMOE_API int hybrimoe_cpu_probe_run(hybrimoe_cpu_probe * probe, int32_t n_active, int32_t n_tokens,
                                        int32_t n_threads, int32_t n_runs, double * us, char * error,
                                        size_t error_size);

// A graph of n_nodes small row operations of n_embd values: what ggml's team pays for every node of a decode step.
HYBRIMOE_API int hybrimoe_cpu_probe_nodes(hybrimoe_cpu_probe * probe, int32_t n_nodes, int32_t n_threads,
                                          int32_t n_runs, double * us, char * error, size_t error_size);

// Dense products as ggml's own kernels run them on weights in the file's layout: one row of n_embd values times the
// gate matrices of n_experts experts at once. Bytes read: n_experts gate matrices.
HYBRIMOE_API int hybrimoe_cpu_probe_dense(hybrimoe_cpu_probe * probe, int32_t n_experts, int32_t n_threads,
                                          int32_t n_runs, double * us, char * error, size_t error_size);

// What n_threads read per microsecond from main memory, from a buffer of n_bytes, in about `seconds`.
HYBRIMOE_API int hybrimoe_probe_read(int32_t n_threads, size_t n_bytes, double seconds, double * bytes_per_us,
                                     char * error, size_t error_size);

// Any ggml device as an accelerator: a computing instance, a copying one, slots [n_embd, n_ff, n_experts].
typedef struct hybrimoe_device_probe hybrimoe_device_probe;
HYBRIMOE_API int hybrimoe_device_probe_open(int32_t device, const struct hybrimoe_ffn_shape * shape,
                                            hybrimoe_device_probe ** out, char * error, size_t error_size);
HYBRIMOE_API void hybrimoe_device_probe_close(hybrimoe_device_probe * probe);

enum hybrimoe_copy_kind { HYBRIMOE_H2D_PINNED = 0, HYBRIMOE_H2D_PAGEABLE = 1, HYBRIMOE_D2H_PINNED = 2 };
// Whether copies of `kind` exist on this device (pinned memory may not).
HYBRIMOE_API int hybrimoe_device_probe_has(const hybrimoe_device_probe * probe, int32_t kind);
// n_bytes is at most the bytes of all experts.
HYBRIMOE_API int hybrimoe_device_probe_copy(hybrimoe_device_probe * probe, int32_t kind, size_t n_bytes, int32_t n_runs,
                                            double * us, char * error, size_t error_size);
// A graph of next to no work: launch and wait.
HYBRIMOE_API int hybrimoe_device_probe_sync(hybrimoe_device_probe * probe, int32_t n_runs, double * us, char * error,
                                            size_t error_size);
// One batch as the dispatcher runs it: x up, gate, up, activation, down, rows back.
HYBRIMOE_API int hybrimoe_device_probe_run(hybrimoe_device_probe * probe, int32_t n_active, int32_t n_tokens,
                                           int32_t n_runs, double * us, char * error, size_t error_size);
// Reads of n_threads from main memory beside copies to the device.
HYBRIMOE_API int hybrimoe_device_probe_together(hybrimoe_device_probe * probe, int32_t n_threads, size_t n_bytes,
                                                double seconds, double * read_bytes_per_us, double * copy_bytes_per_us,
                                                char * error, size_t error_size);

#ifdef __cplusplus
}
#endif
