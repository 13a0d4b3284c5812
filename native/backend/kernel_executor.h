// Runs a described block with our CPU kernels, on the threads of ggml's own CPU backend.
#pragma once

#include "cpu_executor.h"
#include "describe.h"
#include "settings.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

namespace hybrimoe {

// All threads of one graph computation meet here between two phases.
class spin_barrier {
public:
    void wait(int n_threads);

private:
    std::atomic<int> n_arrived_{0};
    std::atomic<int> generation_{0};
};

// A block becomes two stretches of one ggml graph: the router's own nodes and one GGML_OP_CUSTOM node whose callback is
// the expert kernels. So the team is ggml's (OpenMP or its thread pool), woken once per block, and no second team spins
// beside it.
class kernel_executor {
public:
    // Throws std::invalid_argument when this CPU or build lacks the instruction set that the settings name.
    explicit kernel_executor(const settings & config);
    ~kernel_executor();
    kernel_executor(const kernel_executor &)             = delete;
    kernel_executor & operator=(const kernel_executor &) = delete;

    // Empty when the block must run through ggml's kernels instead.
    std::optional<described_block> accept(ggml_tensor ** nodes, const moe_block & block);

    struct result {
        ggml_status status  = GGML_STATUS_SUCCESS;
        uint64_t router_ns  = 0;
        uint64_t experts_ns = 0; // with the weighted sum, which the kernels fuse with the down product
    };

    // Runs router and experts; `cpu` supplies the threads. Afterwards ids() holds the step's expert ids.
    result run(cpu_executor & cpu, ggml_tensor ** nodes, const moe_block & block, const described_block & described,
               int n_threads);

    // [top_k, n_tokens] of the last run, contiguous.
    const std::vector<int32_t> & ids() const { return ids_; }

private:
    static void callback(ggml_tensor * dst, int thread, int n_threads, void * self);
    void work(int thread, int n_threads);
    void take_inputs();
    void reserve(size_t n_bytes);

    static const kernels::external_type * external(ggml_type type, void * self);

    const kernels::kernel_set * set_ = nullptr;
    ggml_context * context_          = nullptr;
    ggml_tensor * node_              = nullptr;
    std::vector<ggml_tensor *> graph_;
    std::unordered_map<int32_t, kernels::external_type> externals_;
    std::unique_ptr<uint8_t, void (*)(void *)> scratch_;
    size_t scratch_bytes_ = 0;
    spin_barrier barrier_;

    // The step at hand, read by all threads.
    const moe_block * block_           = nullptr;
    const described_block * described_ = nullptr;
    kernels::moe_plan plan_;
    kernels::moe_batch batch_;
    std::vector<int32_t> ids_;
    std::vector<float> weights_;
    std::vector<float> y_copy_; // used only where ggml placed y over x
    uint64_t experts_start_ns_ = 0;
};

} // namespace hybrimoe
