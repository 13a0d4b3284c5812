// Runs a described block with our CPU kernels, on the threads of ggml's own CPU backend.
#pragma once

#include "cpu_executor.h"
#include "describe.h"
#include "router_scores.h"
#include "settings.h"
#include "thread_pins.h"

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
// Takes pairs of a block away from the CPU, between router and experts.
class block_share {
public:
    virtual ~block_share() = default;

    // On one thread, when the step's routing is known. `ids` and `weights` are [top_k, n_tokens]; ids may be replaced.
    // `scores` [n_expert, n_tokens] is what the router gave every expert, null unless wants_scores(). Returns
    // which pairs are the CPU's ([top_k, n_tokens], non-zero: compute), null for all of them.
    virtual const uint8_t * route(int32_t * ids, const float * weights, const float * scores) = 0;
    virtual bool wants_scores() const                                                         = 0;
    // On every thread of the team, before route().
    virtual void look_ahead(int thread, int n_threads) = 0;
};

class kernel_executor {
public:
    // Throws std::invalid_argument when this CPU or build lacks the instruction set that the settings name.
    explicit kernel_executor(const settings & config);
    ~kernel_executor();
    kernel_executor(const kernel_executor &)             = delete;
    kernel_executor & operator=(const kernel_executor &) = delete;

    // Empty when the block must run through ggml's kernels instead.
    std::optional<described_block> accept(ggml_tensor ** nodes, const moe_block & block);

    // ggml's own dot product for a type that our kernels do not know; `context` is not used. Null when it has none.
    static const kernels::external_type * external_of(ggml_type type, void * context);

    struct result {
        ggml_status status  = GGML_STATUS_SUCCESS;
        uint64_t router_ns  = 0;
        uint64_t experts_ns = 0; // with the weighted sum, which the kernels fuse with the down product
        uint64_t begin_ns   = 0; // when the router began, of std::chrono::steady_clock
    };

    // Runs router and experts; `cpu` supplies the threads. Afterwards ids() holds the step's expert ids. `share` may be
    // null.
    result run(cpu_executor & cpu, ggml_tensor ** nodes, const moe_block & block, const described_block & described,
               int n_threads, block_share * share);
    // Where the block's result is while it is not stored: [n_embd, n_tokens], rows y_token_bytes() apart.
    float * y() { return batch_.y; }
    size_t y_token_bytes() const { return batch_.y_token_bytes; }
    const kernels::moe_batch & batch() const { return batch_; }
    // Puts the result where the graph wants it: the last step of a block, once nothing reads x any more.
    void store_result();
    // Adds more pairs of the block that run() has just computed ([top_k, n_tokens], non-zero: compute) to y.
    ggml_status run_rest(cpu_executor & cpu, const uint8_t * pairs, int n_threads);
    // Runs the experts alone, e.g. to time them.
    ggml_status run_experts(cpu_executor & cpu, const kernels::moe_layer & layer, const kernels::moe_batch & batch,
                            int n_threads);
    const kernels::kernel_set * set() const { return set_; }

    // [top_k, n_tokens] of the last run, contiguous.
    const std::vector<int32_t> & ids() const { return ids_; }

private:
    static void callback(ggml_tensor * dst, int thread, int n_threads, void * self);
    static void keep_scores(ggml_tensor * dst, int thread, int n_threads, void * self);
    void prepare(const kernels::moe_layer & layer, int64_t n_tokens, int32_t top_k, int n_threads);
    void work(int thread, int n_threads);
    void share_out(int thread, int n_threads);
    void take_inputs();
    void reserve(size_t n_bytes);

    const kernels::kernel_set * set_ = nullptr;
    thread_pins pins_;
    ggml_context * context_    = nullptr;
    ggml_tensor * node_        = nullptr; // the experts
    ggml_tensor * scores_node_ = nullptr; // keeps the router's scores before ggml reuses their memory
    std::vector<ggml_tensor *> graph_;
    std::unique_ptr<uint8_t, void (*)(void *)> scratch_;
    size_t scratch_bytes_ = 0;
    spin_barrier barrier_;

    // The step at hand, read by all threads.
    const moe_block * block_           = nullptr; // null: batch_ is complete as it is
    const described_block * described_ = nullptr;
    const kernels::moe_layer * layer_  = nullptr;
    block_share * share_               = nullptr;
    router_scores scores_at_;
    std::vector<float> scores_;
    kernels::moe_plan plan_;
    kernels::moe_batch batch_;
    std::vector<int32_t> ids_;
    std::vector<float> weights_;
    std::vector<float> y_copy_; // used only where ggml placed y over x
    uint64_t experts_start_ns_ = 0;
};

} // namespace hybrimoe
