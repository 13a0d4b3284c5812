#include "counters.h"

#include <algorithm>
#include <map>
#include <mutex>

namespace hybrimoe {

namespace {

struct instance_table {
    std::mutex mutex;
    std::map<uint64_t, std::shared_ptr<counters>> by_id;
    std::map<uint64_t, const instance_view *> views;
    uint64_t next_id = 1;
};

instance_table & table() {
    static instance_table instances;
    return instances;
}

thread_local uint64_t last_instance = 0;

void clear(std::atomic<uint64_t> & counter) {
    counter.store(0, std::memory_order_relaxed);
}

uint64_t get(const std::atomic<uint64_t> & counter) {
    return counter.load(std::memory_order_relaxed);
}

double get_us(const std::atomic<uint64_t> & counter_ns) {
    return static_cast<double>(get(counter_ns)) / 1000.0;
}

} // namespace

layer_counters & counters::layer(int index) {
    const int clamped = std::clamp(index, 0, max_counted_layers - 1);
    if (clamped >= n_layers()) {
        n_layers_.store(clamped + 1, std::memory_order_relaxed);
    }
    return layers_[static_cast<size_t>(clamped)];
}

hybrimoe_layer_counters counters::read(int index) const {
    const layer_counters & source = layers_[static_cast<size_t>(index)];
    hybrimoe_layer_counters out{};
    out.n_steps            = get(source.n_steps);
    out.n_tokens           = get(source.n_tokens);
    out.n_blocks           = get(source.n_blocks);
    out.n_blocks_delegated = get(source.n_blocks_delegated);
    out.n_experts_cpu      = get(source.n_experts_cpu);
    out.n_experts_gpu      = get(source.n_experts_gpu);
    out.router_us          = get_us(source.router_ns);
    out.experts_us         = get_us(source.experts_ns);
    out.merge_us           = get_us(source.merge_ns);
    out.plan_us            = get_us(source.plan_ns);
    out.wait_us            = get_us(source.wait_ns);
    out.n_hits             = get(source.n_hits);
    out.n_misses           = get(source.n_misses);
    out.n_late             = get(source.n_late);
    out.n_evictions        = get(source.n_evictions);
    out.n_copies           = get(source.n_copies);
    out.n_prefetched       = get(source.n_prefetched);
    out.h2d_bytes          = get(source.h2d_bytes);
    out.n_decode           = get(source.n_decode);
    out.decode_us          = get_us(source.decode_ns);
    out.predicted_us       = get_us(source.predicted_ns);
    return out;
}

void counters::reset() {
    for (layer_counters & one : layers_) {
        for (auto * counter : {&one.n_steps,       &one.n_tokens,      &one.n_blocks,    &one.n_blocks_delegated,
                               &one.n_experts_cpu, &one.n_experts_gpu, &one.router_ns,   &one.experts_ns,
                               &one.merge_ns,      &one.plan_ns,       &one.wait_ns,     &one.n_hits,
                               &one.n_misses,      &one.n_late,        &one.n_evictions, &one.n_copies,
                               &one.n_prefetched,  &one.h2d_bytes,     &one.n_decode,    &one.decode_ns,
                               &one.predicted_ns}) {
            clear(*counter);
        }
    }
    clear(n_nodes_delegated);
}

instance_ticket register_instance() {
    auto data            = std::make_shared<counters>();
    instance_table & all = table();
    std::lock_guard<std::mutex> lock(all.mutex);
    const uint64_t id = all.next_id++;
    all.by_id.emplace(id, data);
    last_instance = id;
    return {id, std::move(data)};
}

void show_instance(uint64_t id, const instance_view * view) {
    instance_table & all = table();
    std::lock_guard<std::mutex> lock(all.mutex);
    all.views[id] = view;
}

bool ask_instance(uint64_t id, const std::function<bool(const instance_view &)> & ask) {
    instance_table & all = table();
    std::lock_guard<std::mutex> lock(all.mutex);
    const auto found = all.views.find(id);
    return found != all.views.end() && ask(*found->second);
}

void forget_instance(uint64_t id) {
    instance_table & all = table();
    std::lock_guard<std::mutex> lock(all.mutex);
    all.by_id.erase(id);
    all.views.erase(id);
}

std::shared_ptr<counters> find_instance(uint64_t id) {
    instance_table & all = table();
    std::lock_guard<std::mutex> lock(all.mutex);
    const auto found = all.by_id.find(id);
    return found == all.by_id.end() ? nullptr : found->second;
}

uint64_t last_instance_of_thread() {
    return last_instance;
}

} // namespace hybrimoe
