#include "running_ggml/graph_layout.h"

#include <memory>

namespace hybrimoe {

namespace {

// SplitMix64 (Steele, Lea, Flood 2014).
uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15ULL;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return x ^ (x >> 31);
}

} // namespace

std::string why_no_slices() {
    constexpr size_t n_nodes = 8;
    ggml_init_params params{};
    params.mem_size = 4 * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes, false);
    params.no_alloc = true;
    const std::unique_ptr<ggml_context, decltype(&ggml_free)> context(ggml_init(params), ggml_free);
    if (context == nullptr) {
        return "no graph can be made";
    }
    ggml_tensor * leaf  = ggml_new_tensor_1d(context.get(), GGML_TYPE_F32, 4);
    ggml_tensor * once  = ggml_sqr(context.get(), leaf);
    ggml_tensor * twice = ggml_mul(context.get(), once, once);
    ggml_cgraph * graph = ggml_new_graph_custom(context.get(), n_nodes, false);
    ggml_build_forward_expand(graph, twice);
    const auto * read = reinterpret_cast<const graph_layout *>(graph);
    // The lists lie behind the structure in one piece, so the first one shows how long it is.
    const auto * lists = reinterpret_cast<const char *>(ggml_graph_nodes(graph));
    bool same          = lists == reinterpret_cast<const char *>(graph) + sizeof(graph_layout);
    same = same && read->size == static_cast<int>(n_nodes) && read->n_nodes == ggml_graph_n_nodes(graph) &&
           read->n_leafs == 1 && read->nodes == ggml_graph_nodes(graph) && read->grads == nullptr &&
           read->grad_accs == nullptr && read->leafs[0] == leaf && read->order == 0 && read->uid == 0;
    if (same) {
        bool is_counted = false;
        for (size_t i = 0; i < read->visited_size; i++) {
            const bool used = (read->visited_used[i / 32] >> (i % 32) & 1u) != 0;
            is_counted      = is_counted || (used && read->visited_keys[i] == once && read->use_counts[i] == 2);
        }
        same = is_counted;
    }
    return same ? std::string() : "graphs have another layout there";
}

ggml_cgraph * graph_slice::make(const ggml_cgraph * graph, int begin, int end, const std::vector<insertion> & ours,
                                uint64_t salt) {
    made_         = *reinterpret_cast<const graph_layout *>(graph);
    made_.n_leafs = 0;
    made_.leafs   = nullptr;
    if (ours.empty()) {
        made_.nodes += begin;
        made_.n_nodes = end - begin;
    } else {
        nodes_.clear();
        int at = begin;
        for (const insertion & one : ours) {
            nodes_.insert(nodes_.end(), made_.nodes + at, made_.nodes + one.before);
            nodes_.push_back(one.node);
            at = one.before;
        }
        nodes_.insert(nodes_.end(), made_.nodes + at, made_.nodes + end);
        made_.nodes   = nodes_.data();
        made_.n_nodes = static_cast<int>(nodes_.size());
    }
    if (made_.uid != 0) {
        const auto range = static_cast<uint64_t>(begin) << 32 | static_cast<uint32_t>(end);
        made_.uid        = mix(mix(mix(made_.uid) ^ range) ^ (salt * 4 + ours.size())) | 1;
    }
    return reinterpret_cast<ggml_cgraph *>(&made_);
}

} // namespace hybrimoe
