// A graph as it is at the time of a call, ready to be run later on the CPU.
#pragma once

#include "memory.h"

#include "ggml.h"

#include <deque>
#include <vector>

namespace test_device {

// Backends read nodes during graph_compute, so callers may change them afterwards; only contents are read later.
struct graph_copy {
    std::deque<ggml_tensor> tensors; // `data` leads to real memory
    std::vector<char> memory;        // of the graph itself
    ggml_cgraph * graph = nullptr;
    std::vector<region_ptr> uses;
    int n_nodes = 0; // that compute something

    // Complains when a tensor that is computed or read is not in `memory`.
    graph_copy(ggml_cgraph * of, const device_memory & memory, const char * device);
    graph_copy(const graph_copy &)             = delete;
    graph_copy & operator=(const graph_copy &) = delete;
};

// Views and reshapes: nothing to compute.
bool is_nothing(const ggml_tensor * node);

} // namespace test_device
