// Per-layer counters of one backend instance: written by the computing thread, read by any other.
#pragma once

#include "hybrimoe.h"

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace hybrimoe {

// llama.cpp's own limit (LLAMA_MAX_LAYERS); tensors of a higher layer cannot exist.
constexpr int max_counted_layers = 512;

struct layer_counters {
    std::atomic<uint64_t> n_steps{0};
    std::atomic<uint64_t> n_tokens{0};
    std::atomic<uint64_t> n_blocks{0};
    std::atomic<uint64_t> n_blocks_delegated{0};
    std::atomic<uint64_t> n_experts_cpu{0};
    std::atomic<uint64_t> n_experts_gpu{0};
    std::atomic<uint64_t> router_ns{0};
    std::atomic<uint64_t> experts_ns{0};
    std::atomic<uint64_t> merge_ns{0};
    std::atomic<uint64_t> plan_ns{0}; // planning and launching
    std::atomic<uint64_t> wait_ns{0}; // for accelerators, after the CPU's share
    std::atomic<uint64_t> n_hits{0};
    std::atomic<uint64_t> n_misses{0};
    std::atomic<uint64_t> n_late{0};
    std::atomic<uint64_t> n_evictions{0};
    std::atomic<uint64_t> n_copies{0};
    std::atomic<uint64_t> n_prefetched{0};
    std::atomic<uint64_t> h2d_bytes{0};
    std::atomic<uint64_t> n_decode{0};
    std::atomic<uint64_t> decode_ns{0};
    std::atomic<uint64_t> predicted_ns{0};
};

class counters {
public:
    // The counters of a layer; layers outside 0..max_counted_layers - 1 share the last one.
    layer_counters & layer(int index);

    int n_layers() const { return n_layers_.load(std::memory_order_relaxed); }
    hybrimoe_layer_counters read(int index) const;
    void reset();

    std::atomic<uint64_t> n_nodes_delegated{0};

private:
    std::array<layer_counters, max_counted_layers> layers_;
    std::atomic<int> n_layers_{0};
};

inline void add(std::atomic<uint64_t> & counter, uint64_t amount) {
    counter.fetch_add(amount, std::memory_order_relaxed);
}

// What a host may ask of a living instance beyond counters.
class instance_view {
public:
    virtual ~instance_view()                                                             = default;
    virtual std::string describe_state() const                                           = 0;
    virtual bool residency(int layer, std::vector<int32_t> & device) const               = 0;
    virtual bool next_event(uint64_t after, uint64_t & number, std::string & line) const = 0;
    // See hybrimoe_read_trace and its neighbours.
    virtual int64_t read_trace(uint8_t * out, size_t size) const = 0;
    virtual bool stop_trace() const                              = 0;
    virtual std::string describe_trace() const                   = 0;
};

// Instances by id, so that a host can ask for counters without holding ggml objects.
struct instance_ticket {
    uint64_t id = 0;
    std::shared_ptr<counters> data;
};

instance_ticket register_instance();
void show_instance(uint64_t id, const instance_view * view);
void forget_instance(uint64_t id);
// Calls `ask` with the instance's view while it is sure to live; false when there is none.
bool ask_instance(uint64_t id, const std::function<bool(const instance_view &)> & ask);
std::shared_ptr<counters> find_instance(uint64_t id);
uint64_t last_instance_of_thread();

} // namespace hybrimoe
