// Computes llama.cpp's whole graph on a device that we wrap, and cuts it only in front of a layer's expert products,
// whose weights lie in host memory: ids come down, a plan is made, slots and slot ids take the place of experts and
// ids, and the graph goes on. What the device does not hold is computed by the CPU; its sum is added by one node of
// ours in front of the rest. One for each context; contexts of one model take turns.
#pragma once

#include "accelerator/device_port.h"
#include "graph_front/expert_core.h"
#include "graph_front/expert_cuts.h"
#include "running_ggml/graph_layout.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <memory>
#include <unordered_map>
#include <vector>

namespace hybrimoe {

class graph_runner {
public:
    // `backend`: an instance of the device that is wrapped.
    explicit graph_runner(ggml_backend_t backend);
    ~graph_runner();
    graph_runner(const graph_runner &)             = delete;
    graph_runner & operator=(const graph_runner &) = delete;

    ggml_backend_t inner() const { return inner_.get(); }
    // Queues the graph on the device, as it would itself; blocks until the ids of the last layer that is cut are known.
    ggml_status compute(ggml_cgraph * graph);
    void set_n_threads(int n_threads);
    void set_abort_callback(ggml_abort_callback callback, void * data);

private:
    // Up to so many tokens, hits are computed by the graph: products of vectors, like llama.cpp's own.
    static constexpr int64_t most_graph_tokens = 32;

    // Host memory that copies to and from the device need no staging for, in pieces; it grows between two cuts.
    class pinned {
    public:
        void reserve(ggml_backend_dev_t device, size_t n_bytes);
        void reset() { used_ = 0; }
        char * take(size_t n_bytes);
        static size_t padded(size_t n_bytes) { return (n_bytes + 63) / 64 * 64; }

    private:
        buffer_ptr buffer_;
        char * base_ = nullptr;
        size_t size_ = 0;
        size_t used_ = 0;
    };
    struct replaced {
        ggml_tensor * node;
        ggml_tensor * experts;
        ggml_tensor * ids;
    };
    // Of ours on the device: the memory is the same for all layers, since one is computed at a time.
    struct layer_nodes {
        ggml_tensor * cpu_sum = nullptr; // what the CPU computed of y
        ggml_tensor * add     = nullptr; // y += cpu_sum
        ggml_tensor * scores  = nullptr; // copied before their memory is used again
    };

    ggml_status run_cuts(int n_nodes);
    ggml_status run_to(int end);
    ggml_status run_cut(const expert_cut & cut);
    ggml_status run_block(const expert_cut & cut);
    ggml_status run_in_graph(const expert_cut & cut, const remote_block & one,
                             const dispatcher::remote_shares & shares);
    ggml_status run_on_host(const expert_cut & cut, const remote_block & one, dispatcher::remote_shares shares);
    ggml_status run_products(const expert_cut & cut);
    ggml_status run_product(ggml_tensor * node);
    remote_block fetch(const expert_cut & cut, const ggml_tensor * scores);
    void keep_gate_input(const expert_cut & cut, const remote_block & one);
    ggml_tensor * make_node(const char * name, ggml_op op);
    bool reserve_device(const expert_cut & cut);
    bool use_slots(const expert_cut & cut, const remote_block & one, const dispatcher::remote_shares & shares);
    const ggml_tensor * keep_scores(const expert_cut & cut);
    void add_on_device(int layer, ggml_tensor * y, const float * cpu_sum);
    void put_back();

    backend_ptr inner_;
    ggml_backend_dev_t device_;
    bool is_cpu_; // its work is done when a call returns
    std::shared_ptr<expert_core> core_;
    int n_threads_                = GGML_DEFAULT_N_THREADS;
    ggml_abort_callback callback_ = nullptr;
    void * callback_data_         = nullptr;

    // The graph at hand.
    ggml_cgraph * graph_  = nullptr;
    ggml_tensor ** nodes_ = nullptr;
    int at_               = 0;                 // what comes before has been queued
    std::vector<graph_slice::insertion> ours_; // nodes among those that come next
    uint64_t salt_ = 0;
    std::vector<replaced> replaced_;
    graph_slice slice_;
    // Cuts of the last graph: llama.cpp uses a graph again and again.
    std::vector<expert_cut> cuts_;
    uint64_t cuts_of_ = 0; // its number; 0: none

    std::vector<context_ptr> contexts_;
    std::unordered_map<int, layer_nodes> added_; // by llama.cpp's layer
    ggml_tensor * slot_ids_ = nullptr;           // [top_k, n_tokens] int32, of the step at hand
    buffer_ptr device_memory_;                   // slot ids, then cpu_sum
    size_t ids_bytes_ = 0, sum_bytes_ = 0;
    buffer_ptr scores_memory_;
    pinned down_, up_;

    // The block at hand, as it came down.
    std::vector<int32_t> ids_;
    std::vector<float> weights_, scores_;
    std::vector<float> gate_input_; // of the last block of this graph, [n_embd, n_tokens]; empty: not known
    int64_t gate_tokens_ = 0;
};

} // namespace hybrimoe
