// Counters of one backend instance, which only grow: written by the computing thread, read by any other.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace hybrimoe {

// llama.cpp's own limit (LLAMA_MAX_LAYERS); tensors of a higher layer cannot exist.
constexpr int max_counted_layers = 512;

struct layer_counters {
#define HYBRIMOE_COUNT(name) std::atomic<uint64_t> name{0};
#define HYBRIMOE_TIME(name) std::atomic<uint64_t> name##_ns{0};
#include "counters.def"

    // What the layer is, as its blocks showed it; 0 before the first one. A warm-up asks for more experts than a token
    // does, so `top_k` is the smallest that was seen.
    std::atomic<int32_t> n_experts{0}, top_k{0};
};

// A layer's counters as they were at one moment.
struct layer_counts {
#define HYBRIMOE_COUNT(name) uint64_t name = 0;
#define HYBRIMOE_TIME(name) double name##_us = 0.0;
#include "counters.def"
};

// Tokens that went through the model, and the time that took: what a reader needs for tokens per second in any host.
// A step of at most governor::most_decode_tokens rows is generation, a larger one reads a prompt.
struct pass_counters {
    std::atomic<uint64_t> n_passes{0}, n_prompt_tokens{0}, n_generated_tokens{0}, prompt_ns{0}, generation_ns{0};
};

class counters {
public:
    // The counters of a layer; layers outside 0..max_counted_layers - 1 share the last one.
    layer_counters & layer(int index);

    int n_layers() const { return n_layers_.load(std::memory_order_relaxed); }
    const layer_counters & at(int index) const { return layers_[static_cast<size_t>(index)]; }
    layer_counts read(int index) const;

    std::atomic<uint64_t> n_nodes_delegated{0}; // computed outside any recognised MoE block
    pass_counters passes;

private:
    std::array<layer_counters, max_counted_layers> layers_;
    std::atomic<int> n_layers_{0};
};

inline void add(std::atomic<uint64_t> & counter, uint64_t amount) {
    counter.fetch_add(amount, std::memory_order_relaxed);
}

class trace_feed;

// Parts of what an instance says of itself, as JSON.
struct instance_report {
    std::string state, residency, trace; // empty: was not asked for
};
enum report_parts : unsigned { report_state = 1, report_residency = 2, report_trace = 4 };

// What a host may ask of a living instance beyond counters.
class instance_view {
public:
    virtual ~instance_view()                                                             = default;
    virtual instance_report report(unsigned parts) const                                 = 0;
    virtual bool next_event(uint64_t after, uint64_t & number, std::string & line) const = 0;
    virtual trace_feed * feed() const                                                    = 0; // null: records nothing
    virtual bool stop_trace() const                                                      = 0; // false: records nothing
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
std::vector<uint64_t> all_instances();
// The instance that this thread made, or was given, last.
uint64_t last_instance_of_thread();
void set_last_instance_of_thread(uint64_t id);

} // namespace hybrimoe
