#include "host_rows.h"

#include "accelerator/ffn_graph.h"

#include <cstring>
#include <new>

namespace hybrimoe {

ggml_status host_rows::run(cpu_executor & cpu, const expert_layout & layout, const routed_pairs & pairs,
                           const uint8_t * wanted, int n_threads, bool keep) {
    const size_t n_pairs = static_cast<size_t>(pairs.n_tokens * pairs.top_k);
    const auto width     = static_cast<size_t>(layout.n_embd);
    n_embd_              = layout.n_embd;
    if (!keep) {
        row_of_.assign(n_pairs, -1);
        rows_.clear();
    }
    x_.clear();
    ids_.clear();
    const int64_t first = static_cast<int64_t>(rows_.size() / width);
    for (size_t p = 0; p < n_pairs; p++) {
        if (wanted != nullptr && wanted[p] == 0) {
            continue;
        }
        const float * x = x_of(layout, pairs, static_cast<int64_t>(p));
        row_of_[p]      = first + static_cast<int64_t>(ids_.size());
        ids_.push_back(pairs.ids[p]);
        x_.insert(x_.end(), x, x + width);
    }
    const auto n = static_cast<int64_t>(ids_.size());
    if (n == 0) {
        return GGML_STATUS_SUCCESS;
    }
    constexpr size_t n_nodes = max_ffn_nodes + 16;
    ggml_init_params params{};
    params.mem_size = n_nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes, false);
    params.no_alloc = true;
    const context_ptr context(ggml_init(params));
    if (context == nullptr) {
        throw std::bad_alloc();
    }
    const auto input = [&](ggml_type type, int64_t ne0, int64_t ne1, void * data) {
        ggml_tensor * t = ggml_new_tensor_3d(context.get(), type, ne0, ne1, n);
        t->data         = data;
        return t;
    };
    ggml_tensor * x      = input(GGML_TYPE_F32, layout.n_embd, 1, x_.data());
    ggml_tensor * ids    = ggml_new_tensor_2d(context.get(), GGML_TYPE_I32, 1, n);
    ids->data            = ids_.data();
    const float * have[] = {layout.scale_gate, layout.scale_up, layout.scale_down};
    ggml_tensor * scales[3]{};
    for (int i = 0; i < 3; i++) {
        if (have[i] == nullptr) {
            continue;
        }
        scales_[i].clear();
        for (const int32_t id : ids_) {
            scales_[i].push_back(have[i][id]);
        }
        scales[i] = input(GGML_TYPE_F32, 1, 1, scales_[i].data());
    }
    ggml_tensor * out   = build_ffn(context.get(), layout, host_tensors(context.get(), layout), x, ids,
                                    {scales[0], scales[1], scales[2]});
    ggml_cgraph * graph = ggml_new_graph_custom(context.get(), n_nodes, false);
    ggml_build_forward_expand(graph, out);
    rows_.resize(rows_.size() + static_cast<size_t>(n) * width);
    work_.resize(n_nodes);
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        ggml_tensor * node = ggml_graph_node(graph, i);
        if (node->view_src != nullptr) {
            node->data = static_cast<char *>(node->view_src->data) + node->view_offs;
        } else if (node == out) {
            node->data = rows_.data() + static_cast<size_t>(first) * width;
        } else {
            std::vector<float> & memory = work_[static_cast<size_t>(i)];
            memory.resize(ggml_nbytes(node) / sizeof(float));
            node->data = memory.data();
        }
    }
    return cpu.run(ggml_graph_nodes(graph), ggml_graph_n_nodes(graph), n_threads);
}

} // namespace hybrimoe
