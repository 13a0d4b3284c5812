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

layer_counts counters::read(int index) const {
    const layer_counters & source = at(index);
    layer_counts out;
#define HYBRIMOE_COUNT(name) out.name = get(source.name);
#define HYBRIMOE_TIME(name) out.name##_us = get_us(source.name##_ns);
#include "counters.def"
    return out;
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

std::vector<uint64_t> all_instances() {
    instance_table & all = table();
    std::lock_guard<std::mutex> lock(all.mutex);
    std::vector<uint64_t> ids;
    for (const auto & [id, data] : all.by_id) {
        ids.push_back(id);
    }
    return ids;
}

uint64_t last_instance_of_thread() {
    return last_instance;
}

void set_last_instance_of_thread(uint64_t id) {
    last_instance = id;
}

} // namespace hybrimoe
