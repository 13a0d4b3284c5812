// A ggml_cgraph as ggml lays it out, which no public header shows: what is needed to hand a slice of llama.cpp's graph
// to another backend with everything that ggml knows about it (use counts, on which fusion rests). Written from the
// interface of ggml 0.25 to 0.27; checked against the running ggml before it is used.
#pragma once

#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace hybrimoe {

struct graph_layout {
    int size;
    int n_nodes;
    int n_leafs;
    ggml_tensor ** nodes;
    ggml_tensor ** grads;
    ggml_tensor ** grad_accs;
    ggml_tensor ** leafs;
    int32_t * use_counts;
    size_t visited_size;
    uint32_t * visited_used;
    ggml_tensor ** visited_keys;
    int order;
    uint64_t uid; // graphs with the same number, unless it is 0, are the same: CUDA then replays what it has captured
};

// The number of a graph; 0: it has none.
inline uint64_t graph_number(const ggml_cgraph * graph) {
    return reinterpret_cast<const graph_layout *>(graph)->uid;
}

// Why slices cannot be made with the running ggml; empty: they can.
std::string why_no_slices();

// Nodes [begin, end) of a graph as a graph of its own, valid as long as both live and until the next one is made.
class graph_slice {
public:
    // With nodes of ours among them, in rising order; ggml does not know their use counts, so it fuses them with
    // nothing. `salt`: what decides what the nodes compute beside the graph, the range and the number of ours.
    struct insertion {
        int before; // this node of the graph
        ggml_tensor * node;
    };
    ggml_cgraph * make(const ggml_cgraph * graph, int begin, int end, const std::vector<insertion> & ours,
                       uint64_t salt);

private:
    graph_layout made_{};
    std::vector<ggml_tensor *> nodes_; // with ours
};

} // namespace hybrimoe
