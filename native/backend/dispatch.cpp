#include "dispatch.h"

#include <algorithm>
#include <chrono>

namespace hybrimoe {

namespace {

// Below this much data one thread is done before a team has woken up and passed its barriers: a router of
// 64 experts x 2048 in F32 is 512 KiB, about 25 microseconds for one thread.
constexpr size_t min_parallel_bytes = 512 * 1024;

class stopwatch {
public:
    // Nanoseconds since the last call, or since construction.
    uint64_t lap_ns() {
        const auto now  = std::chrono::steady_clock::now();
        const auto past = std::chrono::duration_cast<std::chrono::nanoseconds>(now - last_).count();
        last_           = now;
        return static_cast<uint64_t>(past);
    }

private:
    std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

} // namespace

dispatcher::dispatcher(const settings & config, std::shared_ptr<counters> data) : counters_(std::move(data)) {
    if (config.kernels != cpu_kernels::ggml) {
        kernels_ = std::make_unique<kernel_executor>(config);
    }
}

ggml_status dispatcher::compute(ggml_cgraph * graph) {
    ggml_tensor ** nodes = ggml_graph_nodes(graph);
    find_segments(nodes, ggml_graph_n_nodes(graph), segments_);
    for (const segment & one : segments_) {
        const ggml_status status = one.is_block ? run_block(nodes, one.block) : run_delegated(nodes, one);
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
    }
    return GGML_STATUS_SUCCESS;
}

int dispatcher::n_threads_for(size_t n_bytes) const {
    return n_bytes < min_parallel_bytes ? 1 : n_threads_;
}

ggml_status dispatcher::run_block(ggml_tensor ** nodes, const moe_block & block) {
    is_active_.assign(static_cast<size_t>(block.n_expert), 0);
    const std::optional<described_block> described = kernels_ ? kernels_->accept(nodes, block) : std::nullopt;
    const ggml_status status = described ? run_with_kernels(nodes, block, *described) : run_with_ggml(nodes, block);
    if (status != GGML_STATUS_SUCCESS) {
        return status;
    }
    const block_plan planned = plan();
    layer_counters & counts  = counters_->layer(block.layer);
    add(counts.n_steps, 1);
    add(counts.n_tokens, static_cast<uint64_t>(block.n_tokens()));
    add(counts.n_blocks, 1);
    add(counts.n_experts_cpu, static_cast<uint64_t>(planned.n_experts_cpu));
    add(counts.n_experts_gpu, static_cast<uint64_t>(planned.n_experts_gpu));
    return GGML_STATUS_SUCCESS;
}

ggml_status dispatcher::run_with_kernels(ggml_tensor ** nodes, const moe_block & block,
                                         const described_block & described) {
    const kernel_executor::result done = kernels_->run(cpu_, nodes, block, described, n_threads_);
    layer_counters & counts            = counters_->layer(block.layer);
    add(counts.router_ns, done.router_ns);
    add(counts.experts_ns, done.experts_ns);
    mark_active(kernels_->ids().data(), kernels_->ids().size());
    return done.status;
}

ggml_status dispatcher::run_with_ggml(ggml_tensor ** nodes, const moe_block & block) {
    layer_counters & counts = counters_->layer(block.layer);
    stopwatch watch;

    const size_t n_tokens     = static_cast<size_t>(block.n_tokens());
    const size_t router_bytes = block.router == nullptr ? 0 : ggml_nbytes(block.router) * ((n_tokens + 3) / 4);
    ggml_status status        = cpu_.run(nodes + block.begin, block.experts - block.begin, n_threads_for(router_bytes));
    if (status != GGML_STATUS_SUCCESS) {
        return status;
    }
    const char * ids = static_cast<const char *>(block.ids->data);
    for (size_t token = 0; token < n_tokens; token++) {
        mark_active(reinterpret_cast<const int32_t *>(ids + token * block.ids->nb[1]),
                    static_cast<size_t>(block.top_k()));
    }
    add(counts.router_ns, watch.lap_ns());

    status = cpu_.run(nodes + block.experts, block.merge - block.experts, n_threads_);
    if (status != GGML_STATUS_SUCCESS) {
        return status;
    }
    add(counts.experts_ns, watch.lap_ns());

    const size_t merge_bytes = ggml_nbytes(nodes[block.merge - 1]);
    status                   = cpu_.run(nodes + block.merge, block.end - block.merge, n_threads_for(merge_bytes));
    add(counts.merge_ns, watch.lap_ns());
    return status;
}

void dispatcher::mark_active(const int32_t * ids, size_t n_ids) {
    for (size_t i = 0; i < n_ids; i++) {
        if (ids[i] >= 0 && static_cast<size_t>(ids[i]) < is_active_.size()) {
            is_active_[static_cast<size_t>(ids[i])] = 1;
        }
    }
}

// Every active expert goes to the CPU: there is no accelerator to share with yet.
block_plan dispatcher::plan() const {
    block_plan planned;
    planned.n_experts_cpu = static_cast<int>(std::count(is_active_.begin(), is_active_.end(), 1));
    return planned;
}

ggml_status dispatcher::run_delegated(ggml_tensor ** nodes, const segment & rest) {
    const int n_nodes = rest.block.end - rest.block.begin;
    if (rest.has_experts && rest.block.layer >= 0) {
        layer_counters & counts = counters_->layer(rest.block.layer);
        add(counts.n_steps, 1);
        add(counts.n_blocks_delegated, 1);
    }
    add(counters_->n_nodes_delegated, static_cast<uint64_t>(n_nodes));
    return cpu_.run(nodes + rest.block.begin, n_nodes, n_threads_);
}

} // namespace hybrimoe
