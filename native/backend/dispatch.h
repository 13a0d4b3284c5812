// The MoE blocks of one model's graphs: route -> plan -> experts -> merge. They come as a graph in host memory from the
// scheduler (dispatch.cpp), or one by one from a graph that a device computes (graph_front/graph_runner.h ->
// dispatch_remote.cpp).
#pragma once

#include "counters.h"
#include "cpu_executor.h"
#include "host_rows.h"
#include "hybrid/hybrid.h"
#include "kernel_executor.h"
#include "match.h"
#include "observer/report_exchange.h"
#include "pass_meter.h"
#include "settings.h"

#include <memory>
#include <vector>

namespace hybrimoe {

// An input of the graph that a backend computed on its device.
struct graph_input {
    void * data = nullptr;          // its copy in host memory
    device_rows there;              // where it came from
    const void * same_as = nullptr; // host copy of the same rows, to be copied instead of downloaded again
};

// A block of a graph whose tensors lie on a device, with host copies of what it reads: of x and of what the router
// said.
struct remote_block {
    const moe_block * block           = nullptr;
    const described_block * described = nullptr; // with host copies of small weights
    const float * x                   = nullptr; // [n_embd, n_tokens], or a row for each pair
    size_t x_token_bytes              = 0;
    int32_t * ids                     = nullptr; // [top_k, n_tokens]; a route trace may replace them
    const float * weights             = nullptr; // [top_k, n_tokens]
    const float * scores              = nullptr; // [n_expert, n_tokens]; null: not known
    device_rows there;                           // x where it was computed
};

class dispatcher : public cpu_timer, public instance_view {
public:
    // `inner`: the device whose graphs have the blocks; null: they come in host memory.
    dispatcher(const settings & config, std::shared_ptr<counters> data, ggml_backend_dev_t inner = nullptr);

    // Computes the whole graph and returns when it is finished: llama.cpp reads the outputs without waiting for us.
    ggml_status compute(ggml_cgraph * graph, const std::vector<graph_input> & inputs);

    // A remote block, in this order: begin, then whatever of it is the CPU's, then end.
    // Decides who computes what. With `may_share_graph` the accelerator's pairs are the graph's: `slots` says so.
    struct remote_shares {
        const slot_set * slots = nullptr; // that the graph's products read; null: the graph computes nothing of it
        const uint8_t * cpu    = nullptr; // [top_k, n_tokens], non-zero: the CPU's; null: all of them
        bool is_watched        = false;   // hybrid: watch() is wanted
    };
    remote_shares begin_remote(const remote_block & one, bool may_share_graph);
    // y [n_embd, n_tokens] = the CPU's pairs and, unless the graph has them, the accelerator's. In a graph the device
    // adds the bias of the last product itself, whoever computes the pair.
    ggml_status compute_remote(const remote_block & one, const remote_shares & shares, float * y);
    void end_remote(const remote_block & one, ggml_status status);
    bool knows(const described_block & described) const { return hybrid_.knows(described); }
    bool wants_scores() const { return hybrid_.wants_scores(); }
    int slot_in_graph(int32_t expert) const { return hybrid_.slot_in_graph(expert); }
    void watch(ggml_backend_t compute) { hybrid_.watch(compute); }
    void add_inline_us(double us) { hybrid_.add_inline_us(us); }
    const expert_layout & shared_layout() const { return hybrid_.layout(); } // of the block at hand
    void count_delegated(int layer, uint64_t n_nodes);
    cpu_executor & cpu() { return cpu_; }
    int n_threads() const { return n_threads_; }

    void set_n_threads(int n_threads) { n_threads_ = n_threads; }
    void set_abort_callback(ggml_abort_callback callback, void * data) { cpu_.set_abort_callback(callback, data); }

    double time_us(const known_layer & layer, const std::vector<int32_t> & experts, int n_tokens) override;

    instance_report report(unsigned parts) const override;
    bool next_event(uint64_t after, uint64_t & number, std::string & line) const override {
        return hybrid_.log().next(after, number, line);
    }
    trace_feed * feed() const override { return hybrid_.feed(); }
    bool stop_trace() const override { return hybrid_.stop_trace(); }

private:
    instance_report make_report(unsigned parts) const;
    void begin_block(const moe_block & block);
    void end_block(const moe_block & block);
    void count_block(const moe_block & block, bool was_planned, const std::vector<int32_t> & ids);
    ggml_status compute_pairs(const remote_block & one, const uint8_t * cpu, bool with_down_bias, float * y,
                              bool accumulate);
    ggml_status run_block(ggml_tensor ** nodes, const moe_block & block);
    ggml_status run_experts(ggml_tensor ** nodes, const moe_block & block);
    ggml_status run_with_kernels(ggml_tensor ** nodes, const moe_block & block, const described_block & described,
                                 bool is_shared);
    ggml_status run_with_ggml(ggml_tensor ** nodes, const moe_block & block, const described_block * shared);
    ggml_status run_router(ggml_tensor ** nodes, const moe_block & block, bool with_scores);
    ggml_status run_shared(const moe_block & block, const described_block & described);
    ggml_status run_tail(ggml_tensor ** nodes, const moe_block & block, const described_block & described);
    device_rows origin_of(const ggml_tensor * x) const;
    void take_routing(const moe_block & block, const described_block * described);
    void sum_rows(const described_block & described) const;
    ggml_status run_delegated(ggml_tensor ** nodes, const segment & rest);
    int n_threads_for(size_t n_bytes) const;
    int count_active(const std::vector<int32_t> & ids, int64_t n_expert);

    std::shared_ptr<counters> counters_;
    cpu_executor cpu_;
    std::unique_ptr<kernel_executor> kernels_; // null: everything through ggml's kernels
    host_rows rows_;                           // with ggml's kernels: pairs of blocks that are shared
    hybrid hybrid_;
    int n_threads_                           = GGML_DEFAULT_N_THREADS;
    const std::vector<graph_input> * inputs_ = nullptr; // of the graph at hand
    pass_meter meter_;
    report_exchange<instance_report> reports_;
    std::vector<segment> segments_;
    std::vector<uint8_t> is_active_; // per expert: routed to in this step
    std::vector<int32_t> ids_;       // with ggml's kernels: [top_k, n_tokens] of the block at hand
    std::vector<float> weights_, scores_, x_;
    bool is_shared_ = false, is_finished_ = false; // the remote block at hand
};

} // namespace hybrimoe
