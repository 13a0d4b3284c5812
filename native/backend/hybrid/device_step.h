// One accelerator's share of one layer in one step.
#pragma once

#include "hybrid/accelerator.h"

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

namespace hybrimoe {

constexpr double least_wait_us = 5.0; // a shorter wait says nothing about the accelerator's time

// An active expert that the plan gave to this accelerator.
struct device_item {
    int expert          = 0;
    int n_tokens        = 1;
    int slot            = 0;
    const slot_set * on = nullptr;
    int64_t transfer    = 0;     // what it waits for; 0: it is resident
    bool is_scratch     = false; // in a scratch slot
    bool done           = false; // computed: its rows are among the results
};

// The step's pairs, as the router gave them.
struct routed_pairs {
    int64_t n_tokens      = 0;
    int32_t top_k         = 0;
    const int32_t * ids   = nullptr; // [top_k, n_tokens]
    const float * weights = nullptr; // [top_k, n_tokens]
    const float * x       = nullptr; // [n_embd, n_tokens], or [n_embd, top_k, n_tokens] where layout.x_per_pair
    size_t x_token_bytes  = 0;
    device_rows x_there; // the same where a backend computed it
    bool exact = false;  // rows are wanted one by one, to be summed in ggml's order
};

// The input row [n_embd] of pair token * top_k + k.
inline const float * x_of(const expert_layout & layout, const routed_pairs & pairs, int64_t pair) {
    const auto token = static_cast<size_t>(pair / pairs.top_k);
    const auto * row =
        reinterpret_cast<const float *>(reinterpret_cast<const char *>(pairs.x) + token * pairs.x_token_bytes);
    return layout.x_per_pair ? row + pair % pairs.top_k * layout.n_embd : row;
}

// Filled in by the computing thread and run by it and the device's worker, never by both at once. A step whose copies
// do not come in time is abandoned; the worker touches it no more then.
class device_step : public worker_call {
public:
    explicit device_step(accelerator & device) : device_(device) {}

    // `in_graph`: the graph of whoever calls computes the items, in their slots, once their copies have come; nothing
    // is computed here, and there are no results.
    void begin(const expert_layout & layout, const routed_pairs & pairs, bool timed, bool in_graph);
    std::vector<device_item> & items() { return items_; }
    const std::vector<device_item> & items() const { return items_; }
    bool has_work() const { return !items_.empty(); }

    // Starts the computation. Copies for this step's items are in `orders`, in the order of the items that wait for
    // one; those whose transfer was ordered in an earlier step have no order here (layout is null). `looks`: the worker
    // watches for the end, if it has nothing else to do and the device has events.
    void launch(const std::vector<copy_order> & orders, bool looks);
    // In a graph: waits for the copies, after which items that have come are done; true when the step was abandoned.
    bool await_copies(double timeout_us);
    // The slot in which the graph computes an expert; -1: it does not.
    int slot_in_graph(int32_t expert) const;
    // In a graph: the worker watches for the end of what was queued on `compute` so far, where the device has events.
    void watch(ggml_backend_t compute);
    // Waits until all is computed, or until the timeout has passed with a copy outstanding: then the items that wait
    // are not done, and the step is abandoned (true).
    bool finish(double timeout_us);

    // Of a device that computes within the call, since begin() was told to time it.
    double computed_us() const { return computed_us_; }
    std::chrono::steady_clock::time_point computed_until() const { return computed_until_; }
    // Whether the worker saw the computation end, and when; after finish().
    bool has_seen_end() const { return has_seen_end_; }
    std::chrono::steady_clock::time_point seen_end() const { return seen_end_; }

    // Row [n_embd] of pair (token, k), from finish until the next begin; null where this device has none. With a batch
    // only if rows were wanted exactly.
    const float * row(int64_t token, int32_t k) const;
    // Adds the weighted rows of this device to y [n_embd, n_tokens].
    void add_to(float * y, size_t y_token_bytes) const;

    void run(int stage) override;
    void on_failure() noexcept override;

private:
    bool is_decode() const { return pairs_.n_tokens == 1; }
    const device_item * find(int32_t expert) const;
    void sort_items();
    bool wait_for_worker(double timeout_us);
    void launch_lane(int lane, bool waiting);
    void watch_end();
    void run_batch_stage(size_t stage);
    void begin_batch();
    void launch_items(const size_t * which, size_t n);
    void end_batch();
    template <class body> bool timed(body run);

    accelerator & device_;
    const expert_layout * layout_ = nullptr;
    routed_pairs pairs_;
    std::vector<device_item> items_;
    std::vector<int32_t> item_of_; // [n_expert]; -1: not here

    // decode
    std::vector<int32_t> slots_, experts_, x_rows_;
    std::vector<std::pair<int, int>> lane_row_; // per item
    // batch
    std::vector<size_t> waiting_, resident_;
    std::vector<std::vector<int32_t>> pairs_of_; // per item: token * top_k + k
    std::vector<int32_t> row_of_pair_;           // [top_k, n_tokens]; -1: none
    std::vector<int32_t> sum_rows_;
    std::vector<float> sum_weights_;
    pair_list chunk_;
    bool batch_open_ = false;
    bool batch_sum_  = false; // the result is one row per token

    bool in_graph_      = false;
    bool is_timed_      = false;
    double computed_us_ = 0.0;
    std::chrono::steady_clock::time_point computed_until_;

    bool has_seen_end_ = false;
    std::chrono::steady_clock::time_point seen_end_;

    std::mutex mutex_;
    std::condition_variable done_;
    bool pending_   = false; // the worker has a stage left
    bool abandoned_ = false;
    bool broken_    = false; // a stage failed
};

} // namespace hybrimoe
