// One graph from the scheduler: match -> route -> plan -> experts -> merge, block by block.
#pragma once

#include "counters.h"
#include "cpu_executor.h"
#include "kernel_executor.h"
#include "match.h"
#include "settings.h"

#include <memory>
#include <vector>

namespace hybrimoe {

// How one block's active experts are shared out in this step.
struct block_plan {
    int n_experts_cpu = 0;
    int n_experts_gpu = 0;
};

class dispatcher {
public:
    dispatcher(const settings & config, std::shared_ptr<counters> data);

    // Computes the whole graph and returns when it is finished: llama.cpp reads the outputs without waiting for us.
    ggml_status compute(ggml_cgraph * graph);

    void set_n_threads(int n_threads) { n_threads_ = n_threads; }
    void set_abort_callback(ggml_abort_callback callback, void * data) { cpu_.set_abort_callback(callback, data); }

private:
    ggml_status run_block(ggml_tensor ** nodes, const moe_block & block);
    ggml_status run_with_kernels(ggml_tensor ** nodes, const moe_block & block, const described_block & described);
    ggml_status run_with_ggml(ggml_tensor ** nodes, const moe_block & block);
    ggml_status run_delegated(ggml_tensor ** nodes, const segment & rest);
    int n_threads_for(size_t n_bytes) const;
    void mark_active(const int32_t * ids, size_t n_ids);
    block_plan plan() const;

    std::shared_ptr<counters> counters_;
    cpu_executor cpu_;
    std::unique_ptr<kernel_executor> kernels_; // null: everything through ggml's kernels
    int n_threads_ = GGML_DEFAULT_N_THREADS;
    std::vector<segment> segments_;
    std::vector<uint8_t> is_active_; // per expert: routed to in this step
};

} // namespace hybrimoe
