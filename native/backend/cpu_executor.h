// Runs stretches of a graph through ggml's own CPU backend.
#pragma once

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace hybrimoe {

class cpu_executor {
public:
    // Throws std::runtime_error when the host has no CPU backend or it lacks a function that we need.
    cpu_executor();
    ~cpu_executor();
    cpu_executor(const cpu_executor &)             = delete;
    cpu_executor & operator=(const cpu_executor &) = delete;

    // Computes nodes[0..n_nodes) in order with `n_threads` threads. The tensors are used as they are; nothing is
    // copied.
    ggml_status run(ggml_tensor ** nodes, int n_nodes, int n_threads);

    void set_abort_callback(ggml_abort_callback callback, void * data);

private:
    void reserve(int n_nodes);

    ggml_backend_t backend_                     = nullptr;
    ggml_backend_set_n_threads_t set_n_threads_ = nullptr;
    ggml_context * graph_context_               = nullptr;
    ggml_cgraph * graph_                        = nullptr;
    int capacity_                               = 0;
    int n_threads_                              = 0;
};

// The host's CPU device; null when it has none.
ggml_backend_dev_t find_cpu_device();

// ggml's own row operations for a type; null when the library that holds the CPU backend does not export them.
const ggml_type_traits_cpu * find_type_traits(ggml_type type);

} // namespace hybrimoe
