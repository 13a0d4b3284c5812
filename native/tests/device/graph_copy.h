// A graph as it is at the time of a call, ready to be run later on the CPU.
#pragma once

#include "memory.h"

#include "ggml.h"

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
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

// What a stream remembers of its graphs, as the CUDA backend does to launch a recorded graph again: a graph is known by
// its first node. One that says by its uid that it is the same is taken for the same without a look, however it has
// changed; another is compared, node by node.
class graph_memory {
public:
    struct found {
        std::shared_ptr<graph_copy> graph;
        bool is_same = false; // as the last one with that first node: CUDA would launch it as one
    };
    // Complains as graph_copy does, and when what is to run again has lost its memory or another number of nodes.
    found of(ggml_cgraph * graph, const device_memory & memory, const char * device);

private:
    struct remembered {
        uint64_t uid = 0;
        int n_nodes  = 0;
        std::vector<char> properties;
        std::shared_ptr<graph_copy> graph;
    };
    std::map<const ggml_tensor *, remembered> graphs_;
};

// The graph's uid, which no function of ggml tells; 0: none.
uint64_t uid_of(const ggml_cgraph * graph);
// Whether uid_of reads this ggml's graphs rightly, as far as that can be told.
bool knows_graphs();

} // namespace test_device
