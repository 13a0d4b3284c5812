#include "graph_copy.h"

#include "counts.h"

#include <algorithm>
#include <unordered_map>

namespace test_device {

namespace {

bool is_empty(const ggml_tensor * t) {
    return ggml_nelements(t) == 0;
}

// Nothing to compute: views and reshapes, and what ggml keeps in a graph without computing it.
bool is_nothing(const ggml_tensor * node) {
    switch (node->op) {
    case GGML_OP_NONE:
    case GGML_OP_VIEW:
    case GGML_OP_RESHAPE:
    case GGML_OP_PERMUTE:
    case GGML_OP_TRANSPOSE:
        return true;
    default:
        return is_empty(node) || (node->flags & GGML_TENSOR_FLAG_COMPUTE) == 0;
    }
}

// ggml's graph, from the interface of ggml 0.25 to 0.27.
struct graph_layout {
    int size;
    int n_nodes;
    int n_leafs;
    ggml_tensor ** nodes;
    void * tensors[3]; // gradients, accumulators, leafs
    void * use_counts;
    struct {
        size_t size;
        void * used;
        void * keys;
    } visited;
    int order;
    uint64_t uid;
};

const graph_layout & layout_of(const ggml_cgraph * graph) {
    return *reinterpret_cast<const graph_layout *>(graph);
}

// All that a recorded graph holds of the nodes and of where their sources are.
std::vector<char> properties_of(ggml_cgraph * graph) {
    std::vector<char> all;
    const auto append = [&](const auto & value) {
        const auto * bytes = reinterpret_cast<const char *>(&value);
        all.insert(all.end(), bytes, bytes + sizeof(value));
    };
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        append(*node);
        for (const ggml_tensor * from : node->src) {
            if (from != nullptr) {
                append(from->data);
                append(from->ne);
                append(from->nb);
            }
        }
    }
    return all;
}

} // namespace

uint64_t uid_of(const ggml_cgraph * graph) {
    return layout_of(graph).uid;
}

bool knows_graphs() {
    ggml_init_params params{};
    params.mem_size        = ggml_graph_overhead_custom(3, false) + ggml_tensor_overhead();
    params.no_alloc        = true;
    ggml_context * context = ggml_init(params);
    ggml_cgraph * graph    = ggml_new_graph_custom(context, 3, false);
    ggml_graph_add_node(graph, ggml_new_tensor_1d(context, GGML_TYPE_F32, 1));
    const graph_layout & seen = layout_of(graph);
    const bool knows          = seen.size == ggml_graph_size(graph) && seen.n_nodes == ggml_graph_n_nodes(graph) &&
                                seen.nodes == ggml_graph_nodes(graph) && seen.n_leafs == 0 && seen.uid == 0;
    ggml_free(context);
    return knows;
}

graph_memory::found graph_memory::of(ggml_cgraph * graph, const device_memory & memory, const char * device) {
    const int n = ggml_graph_n_nodes(graph);
    if (n == 0) {
        return {std::make_shared<graph_copy>(graph, memory, device), false};
    }
    remembered & last  = graphs_[ggml_graph_node(graph, 0)];
    const uint64_t uid = uid_of(graph);
    if (uid != 0 && uid == last.uid) {
        if (n != last.n_nodes) {
            complain("%s was given a graph of %d nodes whose uid is that of one with %d", device, n, last.n_nodes);
        }
        for (const region_ptr & used : last.graph->uses) {
            if (memory.find(used->begin, used->size) != used) {
                complain(
                    "%s was given a graph whose uid says that it is the same as before, but memory of that is freed",
                    device);
            }
        }
        return {last.graph, true};
    }
    std::vector<char> properties = properties_of(graph);
    const bool is_same           = properties == last.properties;
    last                         = {uid, n, std::move(properties), std::make_shared<graph_copy>(graph, memory, device)};
    return {last.graph, is_same};
}

graph_copy::graph_copy(ggml_cgraph * of, const device_memory & device, const char * name) {
    std::unordered_map<const ggml_tensor *, ggml_tensor *> copies;
    const auto copy_of = [&](const ggml_tensor * from) {
        ggml_tensor *& known = copies[from];
        if (known == nullptr) {
            tensors.push_back(*from);
            known           = &tensors.back();
            known->buffer   = nullptr; // the CPU looks for packed weights there
            known->view_src = nullptr;
            std::fill(known->src, known->src + GGML_MAX_SRC, nullptr);
        }
        return known;
    };
    // A graph runs many nodes on few buffers.
    const auto note = [&](const region_ptr & one) {
        if (std::find(uses.rbegin(), uses.rend(), one) == uses.rend()) {
            uses.push_back(one);
        }
    };
    std::unordered_map<const ggml_tensor *, bool> is_placed;
    const auto place = [&](const ggml_tensor * from, const ggml_tensor * node, int i_src) {
        if (is_empty(from) || !is_placed.emplace(from, true).second) {
            return;
        }
        const region_ptr found = device.find(from->data, ggml_nbytes(from));
        if (found == nullptr) {
            const std::string part = i_src < 0 ? "itself" : "source " + std::to_string(i_src) + " '" + from->name + "'";
            // Not by its buffer, which may be freed.
            complain("%s was given a graph with node '%s' (%s), of which %s is not in its memory: %zu bytes at %p, %s",
                     name, node->name, ggml_op_name(node->op), part.c_str(), ggml_nbytes(from), from->data,
                     device.holds(from->data) ? "beyond any allocation or in a freed one" : "the host's or another's");
        }
        copy_of(from)->data = found->real_of(from->data);
        note(found);
    };
    const int n = ggml_graph_n_nodes(of);
    memory.resize(ggml_graph_overhead_custom(static_cast<size_t>(std::max(n, 1)), false));
    ggml_init_params params{};
    params.mem_size        = memory.size();
    params.mem_buffer      = memory.data();
    params.no_alloc        = true;
    ggml_context * context = ggml_init(params);
    graph                  = ggml_new_graph_custom(context, static_cast<size_t>(std::max(n, 1)), false);
    ggml_free(context); // the graph stays: the memory is ours
    for (int i = 0; i < n; i++) {
        const ggml_tensor * node = ggml_graph_node(of, i);
        if (is_nothing(node)) {
            continue;
        }
        n_nodes++;
        place(node, node, -1);
        ggml_tensor * to = copy_of(node);
        for (int j = 0; j < GGML_MAX_SRC; j++) {
            if (node->src[j] != nullptr) {
                place(node->src[j], node, j);
                to->src[j] = copy_of(node->src[j]);
            }
        }
        ggml_graph_add_node(graph, to);
    }
}

} // namespace test_device
