// One graph from the scheduler: match -> route -> plan -> experts -> merge, block by block.
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

class dispatcher : public cpu_timer, public instance_view {
public:
    dispatcher(const settings & config, std::shared_ptr<counters> data);

    // Computes the whole graph and returns when it is finished: llama.cpp reads the outputs without waiting for us.
    ggml_status compute(ggml_cgraph * graph, const std::vector<graph_input> & inputs);

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
};

} // namespace hybrimoe
