// Expert FFNs on one accelerator. Decode: a persistent graph per layer and number of experts, one upload, one launch,
// one download. Prefill: chunks of experts, each a graph over its own (token, expert) pairs, and one weighted sum.
//
// Everything is queued on the port's computing instance in the order of the calls; what comes back may be read after
// synchronize(). Not thread-safe: callers take turns.
#pragma once

#include "accelerator/device_port.h"
#include "accelerator/expert_layout.h"
#include "accelerator/ffn_graph.h"
#include "accelerator/slot_set.h"

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

struct ggml_gallocr;

namespace hybrimoe {

struct gallocr_deleter {
    void operator()(ggml_gallocr * allocator) const;
};

// Memory that graphs are placed in, front to back.
class device_arena {
public:
    bool reserve(device_port & port, size_t n_bytes);
    void reset() { used_ = 0; }
    // False when the arena is full.
    bool place(const device_port & port, ggml_tensor * tensor);
    size_t capacity() const { return buffer_ == nullptr ? 0 : ggml_backend_buffer_get_size(buffer_.get()); }

private:
    buffer_ptr buffer_;
    size_t used_ = 0;
};

// Rows that a backend has just computed on a device, and that lie in host memory too.
struct device_rows {
    const ggml_tensor * tensor = nullptr; // [n_embd, n_tokens] contiguous; null: host memory only
    ggml_backend_t source      = nullptr;
};

// One token through n experts of a layer.
struct rows_request {
    const expert_layout * layout = nullptr;
    const slot_set * slots       = nullptr;
    const float * x              = nullptr; // [n_embd], or [n_embd, rows] where layout.x_per_pair
    device_rows x_there;                    // the same on a device
    const int32_t * x_rows   = nullptr;     // [n], where layout.x_per_pair: each expert's row of x; null: 0 for all
    const int32_t * slot_ids = nullptr;     // [n]
    const int32_t * experts  = nullptr;     // [n], for their scales
    int n                    = 0;
    int lane                 = 0; // 0 or 1: two requests may be under way in one step
};

// (token, expert) pairs whose experts all lie in one slot set. A pair's token is its row of x: token * top_k + k where
// layout.x_per_pair.
struct pair_list {
    std::vector<int32_t> tokens, slots, experts;

    void clear();
    void add(int32_t token, int32_t slot, int32_t expert);
    int64_t size() const { return static_cast<int64_t>(tokens.size()); }
};

class device_compute {
public:
    static constexpr int n_lanes = 2;

    explicit device_compute(device_port & port) : port_(port) {}
    ~device_compute();

    // Work memory for every layout at up to top_k experts. False when the device has too little.
    bool reserve(const std::vector<const expert_layout *> & layouts, int top_k);
    // Device bytes that prefill of n_tokens will need beyond that.
    static size_t batch_bytes(const expert_layout & layout, int64_t n_tokens, int top_k);
    // Whether the device has every operation that the layout needs.
    static bool supports(const device_port & port, const expert_layout & layout);

    // False when the graph could not be made; nothing was launched then.
    bool launch_rows(const rows_request & request);
    // [n, n_embd] of the last launch_rows on this lane, after synchronize().
    const float * rows(int lane) const { return lanes_[lane].rows; }

    // A batch of one layer: begin, then chunks, then one of the two ends.
    // x holds n_x_rows contiguous rows for each token.
    bool begin_batch(const expert_layout & layout, const float * x, size_t x_token_bytes, const device_rows & x_there,
                     int64_t n_tokens, int64_t max_pairs, int n_chunks, int n_x_rows = 1);
    // first_row: where the chunk's rows begin, in the order of its pairs.
    bool launch_chunk(const expert_layout & layout, const slot_set & slots, const pair_list & pairs,
                      int64_t & first_row);
    // y [n_embd, n_tokens] = sum over k of weights[k, t] * row pos[k, t]; a negative pos contributes nothing.
    bool end_batch_with_sum(const int32_t * pos, const float * weights, int64_t n_k);
    bool end_batch_with_rows();
    // [n_tokens, n_embd] or [row, n_embd] after synchronize().
    const float * batch_result() const { return batch_result_; }

    void synchronize() { ggml_backend_synchronize(port_.compute()); }
    void forget_graphs() { graphs_.clear(); }

private:
    struct row_graph {
        context_ptr context;
        ggml_cgraph * graph = nullptr;
        ggml_tensor * input = nullptr; // all inputs as one tensor of bytes
        ggml_tensor * x     = nullptr; // the front of the input
        ggml_tensor * rows  = nullptr;
        uint64_t generation = 0;
        size_t scale_at[3]  = {}; // offsets of gate, up and down scales in the input; 0: none
        size_t ids_at       = 0;
        size_t x_bytes      = 0; // up to the scales or ids
        size_t input_bytes  = 0;
    };
    struct lane_memory {
        char * input = nullptr;
        float * rows = nullptr;
    };

    row_graph * find_graph(const rows_request & request);
    bool build_rows(const rows_request & request, row_graph & out);
    static size_t arena_bytes(const device_port & port, const expert_layout & layout, int n);

    bool take_over(const device_rows & rows, ggml_tensor * to) const;
    char * stage(const void * data, size_t n_bytes);
    bool upload(ggml_tensor * tensor, const void * data, size_t n_bytes);
    bool reserve_batch(size_t device_bytes, size_t host_bytes);
    bool run_batch_graph(ggml_context * context, ggml_tensor * last, size_t n_nodes);
    ggml_tensor * batch_input(ggml_context * context, ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2);
    ggml_tensor * chunk_scale(ggml_context * context, const float * scale, const pair_list & pairs);
    int64_t round_row(int64_t row) const;

    device_port & port_;
    device_arena arena_; // decode graphs, all in the same place: one runs at a time
    buffer_ptr host_;    // lanes
    lane_memory lanes_[n_lanes];
    int64_t max_embd_   = 0;
    int top_k_          = 0;
    size_t input_bytes_ = 0;
    std::unordered_map<uint64_t, row_graph> graphs_;

    device_arena batch_arena_;
    std::unique_ptr<ggml_gallocr, gallocr_deleter> batch_allocator_, batch_measure_;
    size_t batch_allocated_ = 0;
    buffer_ptr batch_host_;
    size_t batch_staged_ = 0;
    std::vector<context_ptr> batch_contexts_; // tensors of launches that may still be running
    ggml_tensor * batch_x_    = nullptr;
    ggml_tensor * batch_rows_ = nullptr; // [n_embd, rows]; row 0 is zero
    int64_t n_tokens_ = 0, n_embd_ = 0, next_row_ = 0;
    float * batch_result_ = nullptr;
    std::vector<float> scale_values_, weight_of_;
    std::vector<int32_t> row_of_;
};

} // namespace hybrimoe
