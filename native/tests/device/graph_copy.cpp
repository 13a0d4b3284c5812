#include "graph_copy.h"

#include "counts.h"

#include <algorithm>
#include <unordered_map>

namespace test_device {

namespace {

bool is_empty(const ggml_tensor * t) {
    return ggml_nelements(t) == 0;
}

} // namespace

bool is_nothing(const ggml_tensor * node) {
    switch (node->op) {
    case GGML_OP_NONE:
    case GGML_OP_VIEW:
    case GGML_OP_RESHAPE:
    case GGML_OP_PERMUTE:
    case GGML_OP_TRANSPOSE:
        return true;
    default:
        return is_empty(node);
    }
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
