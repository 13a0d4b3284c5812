// The tables of functions through which ggml uses the device.
#include "counts.h"
#include "graph_copy.h"
#include "memory.h"
#include "running_ggml/tables.h"
#include "stream.h"
#include "test_device.h"

#include "ggml-backend-impl.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

// Only a ggml of API 3 has it.
extern "C" __attribute__((weak)) void ggml_backend_buft_alloc_buffer_n(void);

namespace test_device {

namespace {

using hybrimoe::tables::buffer_type;
using hybrimoe::tables::buffer_type_functions_2;
using hybrimoe::tables::buffer_type_functions_3;

constexpr int64_t row_padding  = 512; // of quantised rows, in numbers: as the CUDA backend's
constexpr int64_t offload_rows = 32;  // a batch from which it takes operations on host weights, likewise
constexpr size_t alignment     = 128;
constexpr size_t max_devices   = 8;

// -------------------------------------------------------------------------------------------------------------------
// settings

struct settings {
    size_t n_devices = 1;
    run_mode mode    = run_mode::lazy;
    std::vector<size_t> mib{4096};
    std::vector<std::string> ids{};
    bool reuse        = true;
    bool may_register = true;
    size_t fail_from = 0, fail_until = 0; // allocations from 1 on; 0: none
    size_t work_us = 0;
};

std::vector<std::string> split(const std::string & text) {
    std::vector<std::string> parts(1);
    for (const char c : text) {
        if (c == ',') {
            parts.emplace_back();
        } else {
            parts.back() += c;
        }
    }
    return parts;
}

size_t number_of(const char * variable, const std::string & text) {
    char * end    = nullptr;
    const auto at = std::strtoul(text.c_str(), &end, 10);
    if (text.empty() || *end != 0 || at == 0 || at > (1 << 24)) {
        throw std::runtime_error(std::string(variable) + " holds '" + text + "', which is no size or count");
    }
    return at;
}

template <class value>
value choice(const char * variable, const std::string & text, std::vector<std::pair<std::string, value>> known) {
    for (const auto & one : known) {
        if (one.first == text) {
            return one.second;
        }
    }
    throw std::runtime_error(std::string(variable) + " does not know '" + text + "'");
}

settings read_settings() {
    settings out;
    const auto with = [](const char * variable, auto use) {
        const char * text = std::getenv(variable);
        if (text != nullptr && *text != 0) {
            use(variable, std::string(text));
        }
    };
    with("HYBRIMOE_TEST_DEVICES", [&](const char * variable, const std::string & text) {
        out.n_devices = number_of(variable, text);
        if (out.n_devices > max_devices) {
            throw std::runtime_error(std::string(variable) + " is more than " + std::to_string(max_devices));
        }
    });
    with("HYBRIMOE_TEST_DEVICE_MODE", [&](const char * variable, const std::string & text) {
        out.mode = choice<run_mode>(
            variable, text, {{"lazy", run_mode::lazy}, {"eager", run_mode::eager}, {"random", run_mode::random}});
    });
    with("HYBRIMOE_TEST_DEVICE_MIB", [&](const char * variable, const std::string & text) {
        out.mib.clear();
        for (const std::string & part : split(text)) {
            out.mib.push_back(number_of(variable, part));
        }
    });
    with("HYBRIMOE_TEST_DEVICE_ID", [&](const char *, const std::string & text) { out.ids = split(text); });
    with("HYBRIMOE_TEST_DEVICE_ADDRESSES", [&](const char * variable, const std::string & text) {
        out.reuse = choice<bool>(variable, text, {{"reuse", true}, {"fresh", false}});
    });
    with("HYBRIMOE_TEST_DEVICE_REGISTER", [&](const char * variable, const std::string & text) {
        out.may_register = choice<bool>(variable, text, {{"1", true}, {"0", false}});
    });
    with("HYBRIMOE_TEST_DEVICE_WORK_US",
         [&](const char * variable, const std::string & text) { out.work_us = number_of(variable, text); });
    with("HYBRIMOE_TEST_DEVICE_FAIL", [&](const char * variable, const std::string & text) {
        const size_t dash = text.find('-');
        out.fail_from     = number_of(variable, text.substr(0, dash));
        out.fail_until    = out.fail_from;
        if (dash != std::string::npos) {
            const std::string last = text.substr(dash + 1);
            out.fail_until         = last.empty() ? SIZE_MAX : number_of(variable, last);
        }
    });
    with("HYBRIMOE_TEST_DEVICE_TRACE", [](const char *, const std::string & text) { open_trace(text.c_str()); });
    return out;
}

// -------------------------------------------------------------------------------------------------------------------
// what there is

struct device_state {
    device_state(int at, size_t n_bytes, bool reuse) : index(at), memory(n_bytes, reuse) {}
    const int index;
    std::string name;
    std::string id;
    device_memory memory;
    ggml_backend_device device{};
    // One of the two is given to ggml.
    buffer_type<buffer_type_functions_2> type_2{};
    buffer_type<buffer_type_functions_3> type_3{};
    ggml_backend_buffer_type_t type = nullptr;
};

struct module_state {
    settings config;
    int api = 0;
    ggml_backend_reg registry{};
    std::vector<std::unique_ptr<device_state>> devices;
    buffer_type<buffer_type_functions_2> host_type_2{};
    buffer_type<buffer_type_functions_3> host_type_3{};
    ggml_backend_buffer_type_t host_type = nullptr;
    std::atomic<size_t> n_allocations{0}; // tried so far
    std::mutex events_mutex;
    std::set<ggml_backend_event_t> events;
};

// Never destroyed: ggml, which holds our tables, may outlive static objects of ours.
module_state & here() {
    static auto & one = *new module_state;
    return one;
}

// Looked up when it is needed: programs may load us before it. By name, so that nobody is asked for a type.
ggml_backend_dev_t cpu() {
    static const ggml_backend_dev_t one = [] {
        ggml_backend_dev_t found = ggml_backend_dev_by_name("CPU");
        if (found == nullptr) {
            complain("ggml has no device CPU to compute with");
        }
        return found;
    }();
    return one;
}

device_state & of(ggml_backend_dev_t device) {
    return *static_cast<device_state *>(device->context);
}

struct backend_state {
    device_state & device;
    std::shared_ptr<stream> queue;
    // Runs on the queue's thread alone.
    ggml_backend_t inner;
    graph_memory graphs{};
};

backend_state & of(ggml_backend_t backend) {
    return *static_cast<backend_state *>(backend->context);
}

ggml_backend_buffer_t buffer_of(const ggml_tensor * t) {
    return t->view_src != nullptr ? t->view_src->buffer : t->buffer;
}

region_ptr find_or_complain(const device_state & device, const ggml_tensor * t, size_t offset, size_t size,
                            const char * what) {
    region_ptr found = device.memory.find(static_cast<const char *>(t->data) + offset, size);
    if (found == nullptr) {
        complain("%s: %zu bytes at %zu of '%s' are not in the memory of %s, or not any more", what, size, offset,
                 t->name, device.name.c_str());
    }
    return found;
}

// For transfers of a stream. The CUDA backend asserts the buffer type, too.
region_ptr of_this_device(const device_state & device, const ggml_tensor * t, size_t offset, size_t size,
                          const char * what) {
    ggml_backend_buffer_t buffer = buffer_of(t);
    if (buffer == nullptr || buffer->buft != device.type) {
        complain("%s: '%s' is in a buffer of type %s, not %s", what, t->name,
                 buffer == nullptr ? "none" : ggml_backend_buffer_name(buffer), device.name.c_str());
    }
    return find_or_complain(device, t, offset, size, what);
}

// -------------------------------------------------------------------------------------------------------------------
// buffers

// A wrapper may put a type of its own on the buffer, so the device is kept here.
struct buffer_state {
    device_state & device;
    region_ptr memory;
};

buffer_state & of(ggml_backend_buffer_t buffer) {
    return *static_cast<buffer_state *>(buffer->context);
}

struct transfer_counts {
    count n, bytes;
};

// A transfer between host and device; `stream` 0 is done when the call returns.
void note_transfer(bool is_set, int device, int stream, const void * host, size_t size, const ggml_tensor * t) {
    const bool pinned                           = pinned_memory().find(host, size) != nullptr;
    static const transfer_counts kinds[2][2][2] = {
        {{{count::gets_pageable, count::gets_pageable_bytes}, {count::gets_pinned, count::gets_pinned_bytes}},
         {{count::sets_pageable, count::sets_pageable_bytes}, {count::sets_pinned, count::sets_pinned_bytes}}},
        {{{count::blocking_gets_pageable, count::blocking_gets_pageable_bytes},
          {count::blocking_gets_pinned, count::blocking_gets_pinned_bytes}},
         {{count::blocking_sets_pageable, count::blocking_sets_pageable_bytes},
          {count::blocking_sets_pinned, count::blocking_sets_pinned_bytes}}}};
    const transfer_counts & kind = kinds[stream == 0][is_set][pinned];
    add(kind.n);
    add(kind.bytes, static_cast<int64_t>(size));
    call line;
    line.kind    = is_set ? "set" : "get";
    line.device  = device;
    line.stream  = stream;
    line.n_bytes = static_cast<int64_t>(size);
    line.first   = t->name;
    line.host    = pinned ? "pinned" : "pageable";
    trace(line);
}

void note_copy(int device, int stream, size_t size, const char * name) {
    add(stream == 0 ? count::blocking_copies : count::copies);
    add(stream == 0 ? count::blocking_copies_bytes : count::copies_bytes, static_cast<int64_t>(size));
    call line;
    line.kind    = "copy";
    line.device  = device;
    line.stream  = stream;
    line.n_bytes = static_cast<int64_t>(size);
    line.first   = name;
    trace(line);
}

void note(const char * kind, int device, int64_t n_bytes) {
    call line;
    line.kind    = kind;
    line.device  = device;
    line.n_bytes = n_bytes;
    trace(line);
}

void free_buffer(ggml_backend_buffer_t buffer) {
    buffer_state * state = &of(buffer);
    add(count::frees);
    note("free", state->device.index, static_cast<int64_t>(state->memory->size));
    state->device.memory.free(state->memory->begin);
    delete state;
}

void * get_base(ggml_backend_buffer_t buffer) {
    return of(buffer).memory->begin;
}

size_t alloc_size(ggml_backend_buffer_type_t, const ggml_tensor * t) {
    size_t size = ggml_nbytes(t);
    if (ggml_is_quantized(t->type) && t->ne[0] % row_padding != 0) {
        size += ggml_row_size(t->type, row_padding - t->ne[0] % row_padding);
    }
    return size;
}

// As the CUDA backend does: what pads a quantised tensor is zero, so that no kernel reads NaN there.
ggml_status init_tensor(ggml_backend_buffer_t buffer, ggml_tensor * t) {
    if (t->view_src != nullptr) {
        return GGML_STATUS_SUCCESS;
    }
    const size_t used  = ggml_nbytes(t);
    const size_t size  = alloc_size(buffer->buft, t);
    const region & all = *of(buffer).memory;
    const char * at    = static_cast<const char *>(t->data);
    if (at < all.begin || at + size > all.begin + all.size) {
        complain("'%s' with its padding is not inside its buffer: %zu bytes at %zd of %zu", t->name, size,
                 at - all.begin, all.size);
    }
    if (size > used && ggml_backend_buffer_get_usage(buffer) != GGML_BACKEND_BUFFER_USAGE_COMPUTE) {
        std::memset(all.real_of(at) + used, 0, size - used);
    }
    return GGML_STATUS_SUCCESS;
}

void memset_tensor(ggml_backend_buffer_t buffer, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
    const device_state & device = of(buffer).device;
    const region_ptr memory     = find_or_complain(device, t, offset, size, "memset_tensor");
    note_copy(device.index, 0, size, t->name);
    std::memset(memory->real_of(t->data) + offset, value, size);
}

void set_tensor(ggml_backend_buffer_t buffer, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    const device_state & device = of(buffer).device;
    const region_ptr memory     = find_or_complain(device, t, offset, size, "set_tensor");
    note_transfer(true, device.index, 0, data, size, t);
    std::memcpy(memory->real_of(t->data) + offset, data, size);
}

void get_tensor(ggml_backend_buffer_t buffer, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    const device_state & device = of(buffer).device;
    const region_ptr memory     = find_or_complain(device, t, offset, size, "get_tensor");
    note_transfer(false, device.index, 0, data, size, t);
    std::memcpy(data, memory->real_of(t->data) + offset, size);
}

// The device that a buffer is of, whatever its type says now; nullptr: none of ours.
device_state * owner(ggml_backend_buffer_t buffer) {
    return buffer != nullptr && buffer->iface.free_buffer == free_buffer ? &of(buffer).device : nullptr;
}

bool copy_tensor(ggml_backend_buffer_t buffer, const ggml_tensor * from, ggml_tensor * to) {
    device_state * source = owner(buffer_of(from));
    if (source == nullptr) {
        return false;
    }
    const device_state & device = of(buffer).device;
    const size_t size           = ggml_nbytes(from);
    const region_ptr a          = find_or_complain(*source, from, 0, size, "copy_tensor");
    const region_ptr b          = find_or_complain(device, to, 0, size, "copy_tensor");
    note_copy(device.index, 0, size, to->name);
    std::memcpy(b->real_of(to->data), a->real_of(from->data), size);
    return true;
}

void clear(ggml_backend_buffer_t buffer, uint8_t value) {
    const region & all = *of(buffer).memory;
    note_copy(of(buffer).device.index, 0, all.size, nullptr);
    std::memset(all.real, value, all.size);
}

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t type, size_t size) {
    device_state & device = of(ggml_backend_buft_get_device(type));
    const size_t n        = ++here().n_allocations;
    const bool fails      = n >= here().config.fail_from && n <= here().config.fail_until;
    region_ptr memory     = fails ? nullptr : device.memory.allocate(size);
    add(memory == nullptr ? count::allocations_failed : count::allocations);
    note(memory == nullptr ? "failed allocation" : "allocation", device.index, static_cast<int64_t>(size));
    if (memory == nullptr) {
        return nullptr;
    }
    ggml_backend_buffer_i functions{};
    functions.free_buffer   = free_buffer;
    functions.get_base      = get_base;
    functions.init_tensor   = init_tensor;
    functions.memset_tensor = memset_tensor;
    functions.set_tensor    = set_tensor;
    functions.get_tensor    = get_tensor;
    functions.cpy_tensor    = copy_tensor;
    functions.clear         = clear;
    return ggml_backend_buffer_init(type, functions, new buffer_state{device, memory}, size);
}

const char * type_name(ggml_backend_buffer_type_t type) {
    return of(ggml_backend_buft_get_device(type)).name.c_str();
}

// Host memory that transfers read and write without the host's help, and so late.

void begin_pinned(char * begin, size_t size) {
    auto one   = std::make_shared<region>();
    one->begin = one->real = begin;
    one->size              = size;
    pinned_memory().add(std::move(one));
}

void end_pinned(const void * begin, const char * what) {
    const region_ptr one = pinned_memory().remove(begin);
    if (one == nullptr) {
        complain("%s: nothing pinned begins at %p", what, begin);
    }
    if (one->n_queued > 0) {
        complain("%s: queued transfers use these %zu bytes of pinned memory", what, one->size);
    }
}

void free_host_buffer(ggml_backend_buffer_t buffer) {
    add(count::host_frees);
    note("host free", -1, static_cast<int64_t>(buffer->size));
    end_pinned(buffer->context, "freeing a host buffer");
    std::free(buffer->context);
}

ggml_backend_buffer_t alloc_host_buffer(ggml_backend_buffer_type_t type, size_t size) {
    const size_t step = 256;
    void * memory     = std::aligned_alloc(step, (size + step - 1) / step * step);
    if (memory == nullptr) {
        return nullptr;
    }
    std::memset(memory, poison, size);
    add(count::host_allocations);
    note("host allocation", -1, static_cast<int64_t>(size));
    begin_pinned(static_cast<char *>(memory), size);
    // Otherwise as the CPU's; its context is the address.
    ggml_backend_buffer_t made = ggml_backend_cpu_buffer_from_ptr(memory, size);
    made->buft                 = type;
    made->iface.free_buffer    = free_host_buffer;
    return made;
}

bool register_host_buffer(void * memory, size_t size) {
    if (!here().config.may_register || pinned_memory().overlaps(memory, size)) {
        return false;
    }
    add(count::host_registrations);
    note("host registration", -1, static_cast<int64_t>(size));
    begin_pinned(static_cast<char *>(memory), size);
    return true;
}

void unregister_host_buffer(void * memory) {
    end_pinned(memory, "unregistering host memory");
}

// -------------------------------------------------------------------------------------------------------------------
// backends: a stream each

const char * backend_name(ggml_backend_t backend) {
    return of(backend).device.name.c_str();
}

void free_backend(ggml_backend_t backend) {
    backend_state * state = &of(backend);
    state->queue->finish();
    ggml_backend_free(state->inner);
    delete state;
    delete backend;
}

void set_tensor_async(ggml_backend_t backend, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    backend_state & state   = of(backend);
    const region_ptr memory = of_this_device(state.device, t, offset, size, "set_tensor_async");
    note_transfer(true, state.device.index, state.queue->number(), data, size, t);
    char * to = memory->real_of(t->data) + offset;
    operation one;
    one.uses.push_back(memory);
    const region_ptr pinned = pinned_memory().find(data, size);
    if (pinned != nullptr) { // as DMA reads it: when it gets there
        one.uses.push_back(pinned);
        one.run = [=] { std::memcpy(to, data, size); };
    } else {
        const char * bytes = static_cast<const char *>(data);
        one.run            = [to, staged = std::vector<char>(bytes, bytes + size)] {
            std::copy(staged.begin(), staged.end(), to);
        };
    }
    state.queue->push(std::move(one));
}

void get_tensor_async(ggml_backend_t backend, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    backend_state & state   = of(backend);
    const region_ptr memory = of_this_device(state.device, t, offset, size, "get_tensor_async");
    note_transfer(false, state.device.index, state.queue->number(), data, size, t);
    const char * from = memory->real_of(t->data) + offset;
    operation one;
    one.uses.push_back(memory);
    const region_ptr pinned = pinned_memory().find(data, size);
    if (pinned != nullptr) {
        one.uses.push_back(pinned);
    }
    one.run = [=] { std::memcpy(data, from, size); };
    state.queue->push(std::move(one));
}

bool is_ours(ggml_backend_t backend);

// In the source's stream; the target's waits for it.
bool copy_tensor_async(ggml_backend_t source, ggml_backend_t target, const ggml_tensor * from, ggml_tensor * to) {
    if (!is_ours(source) || !is_ours(target) || owner(buffer_of(from)) != &of(source).device ||
        owner(buffer_of(to)) != &of(target).device) {
        return false;
    }
    const size_t size  = ggml_nbytes(from);
    const region_ptr a = find_or_complain(of(source).device, from, 0, size, "copy_tensor_async");
    const region_ptr b = find_or_complain(of(target).device, to, 0, size, "copy_tensor_async");
    stream & queue     = *of(source).queue;
    note_copy(of(source).device.index, queue.number(), size, to->name);
    operation one;
    one.uses = {a, b};
    one.run  = [into = b->real_of(to->data), bytes = a->real_of(from->data), size] { std::memcpy(into, bytes, size); };
    queue.push(std::move(one));
    of(target).queue->wait_for(queue.here());
    return true;
}

void note_wait(const char * kind, int device, int number, bool waited) {
    add(waited ? count::waits : count::idle_syncs);
    call line;
    line.kind   = kind;
    line.device = device;
    line.stream = number;
    line.waited = waited;
    trace(line);
}

void synchronize(ggml_backend_t backend) {
    stream & queue    = *of(backend).queue;
    const bool waited = stream::wait(queue.here());
    note_wait("synchronize", queue.device(), queue.number(), waited);
}

ggml_status compute_graph(ggml_backend_t backend, ggml_cgraph * graph) {
    backend_state & state = of(backend);
    const auto found      = state.graphs.of(graph, state.device.memory, state.device.name.c_str());
    const auto & copy     = found.graph;
    const int n           = ggml_graph_n_nodes(graph);
    add(count::graphs);
    add(count::graphs_changed, found.is_same ? 0 : 1);
    add(count::nodes, copy->n_nodes);
    call line;
    line.kind    = "graph";
    line.device  = state.device.index;
    line.stream  = state.queue->number();
    line.n_nodes = copy->n_nodes;
    line.changed = found.is_same ? 0 : 1;
    line.first   = n == 0 ? nullptr : ggml_graph_node(graph, 0)->name;
    line.last    = n == 0 ? nullptr : ggml_graph_node(graph, n - 1)->name;
    trace(line);
    operation one;
    one.uses = copy->uses;
    one.run  = [copy, inner = state.inner] {
        const ggml_status status = ggml_backend_graph_compute(inner, copy->graph);
        if (status != GGML_STATUS_SUCCESS) {
            complain("a graph failed with status %d", static_cast<int>(status));
        }
    };
    state.queue->push(std::move(one));
    return GGML_STATUS_SUCCESS;
}

// -------------------------------------------------------------------------------------------------------------------
// events

point & of(ggml_backend_event_t event) {
    std::lock_guard<std::mutex> lock(here().events_mutex);
    if (here().events.count(event) == 0) {
        complain("an event is used that was freed, or is none of this device");
    }
    return *static_cast<point *>(event->context);
}

void record_event(ggml_backend_t backend, ggml_backend_event_t event) {
    stream & queue = *of(backend).queue;
    of(event)      = queue.here();
    add(count::events_recorded);
    call line;
    line.kind   = "event record";
    line.device = queue.device();
    line.stream = queue.number();
    trace(line);
}

void wait_for_event(ggml_backend_t backend, ggml_backend_event_t event) {
    stream & queue = *of(backend).queue;
    queue.wait_for(of(event));
    add(count::events_waited);
    call line;
    line.kind   = "event wait";
    line.device = queue.device();
    line.stream = queue.number();
    trace(line);
}

ggml_backend_event_t new_event(ggml_backend_dev_t device) {
    add(count::events_made);
    auto * made = new ggml_backend_event{device, new point};
    std::lock_guard<std::mutex> lock(here().events_mutex);
    here().events.insert(made);
    return made;
}

void free_event(ggml_backend_dev_t, ggml_backend_event_t event) {
    point * state = &of(event);
    add(count::events_freed);
    {
        std::lock_guard<std::mutex> lock(here().events_mutex);
        here().events.erase(event);
    }
    delete state;
    delete event;
}

void synchronize_event(ggml_backend_dev_t device, ggml_backend_event_t event) {
    const point until = of(event);
    const bool waited = stream::wait(until);
    of(event); // it must outlive the wait
    note_wait("event synchronize", of(device).index, until.on == nullptr ? -1 : until.on->number(), waited);
}

// -------------------------------------------------------------------------------------------------------------------
// devices

const char * device_name(ggml_backend_dev_t device) {
    return of(device).name.c_str();
}

const char * device_description(ggml_backend_dev_t) {
    return "test device";
}

void note_query(ggml_backend_dev_t device, count what, const char * kind) {
    add(what);
    note(kind, of(device).index, -1);
}

void device_memory_of(ggml_backend_dev_t device, size_t * free, size_t * total) {
    note_query(device, count::memory_queries, "memory query");
    *free  = of(device).memory.n_free();
    *total = of(device).memory.n_bytes();
}

enum ggml_backend_dev_type device_type(ggml_backend_dev_t device) {
    note_query(device, count::type_queries, "type query");
    return GGML_BACKEND_DEVICE_TYPE_GPU;
}

void device_props(ggml_backend_dev_t device, ggml_backend_dev_props * props) {
    note_query(device, count::props_queries, "properties query");
    const device_state & state = of(device);
    props->name                = state.name.c_str();
    props->description         = device_description(device);
    props->memory_free         = state.memory.n_free();
    props->memory_total        = state.memory.n_bytes();
    props->type                = GGML_BACKEND_DEVICE_TYPE_GPU;
    props->device_id           = state.id == "none" ? nullptr : state.id.c_str();
    props->caps                = {};
    props->caps.async          = true;
    props->caps.host_buffer    = true;
    props->caps.events         = true;
    props->caps.mmap_support   = true;
}

ggml_guid_t guid() {
    static ggml_guid one = {0x74, 0x65, 0x73, 0x74, 0x2d, 0x64, 0x65, 0x76,
                            0x69, 0x63, 0x65, 0x00, 0x00, 0x00, 0x00, 0x01};
    return &one;
}

bool is_ours(ggml_backend_t backend) {
    return backend != nullptr && ggml_guid_matches(backend->guid, guid());
}

ggml_backend_t init_backend(ggml_backend_dev_t device, const char *) {
    ggml_backend_t inner = ggml_backend_dev_init(cpu(), nullptr);
    if (inner == nullptr) {
        return nullptr;
    }
    const auto set_n_threads = reinterpret_cast<ggml_backend_set_n_threads_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu()), "ggml_backend_set_n_threads"));
    if (set_n_threads != nullptr) {
        set_n_threads(inner, 1);
    }
    add(count::streams_made);
    ggml_backend_i functions{};
    functions.get_name         = backend_name;
    functions.free             = free_backend;
    functions.set_tensor_async = set_tensor_async;
    functions.get_tensor_async = get_tensor_async;
    functions.cpy_tensor_async = copy_tensor_async;
    functions.synchronize      = synchronize;
    functions.graph_compute    = compute_graph;
    functions.event_record     = record_event;
    functions.event_wait       = wait_for_event;
    auto * state = new backend_state{of(device),
                                     stream::start(of(device).index, here().config.mode, here().config.work_us), inner};
    return new ggml_backend{guid(), functions, device, state};
}

ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t device) {
    return of(device).type;
}

ggml_backend_buffer_type_t host_buffer_type(ggml_backend_dev_t) {
    return here().host_type;
}

bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    switch (op->op) {
    case GGML_OP_MAP_CUSTOM1: // functions of the host
    case GGML_OP_MAP_CUSTOM2:
    case GGML_OP_MAP_CUSTOM3:
    case GGML_OP_CUSTOM:
        return false;
    default:
        return ggml_backend_dev_supports_op(cpu(), op);
    }
}

bool supports_buffer_type(ggml_backend_dev_t device, ggml_backend_buffer_type_t type) {
    return type == of(device).type;
}

bool offloads(ggml_backend_dev_t, const ggml_tensor * op) {
    switch (op->op) {
    case GGML_OP_GET_ROWS:
        return false;
    case GGML_OP_MUL_MAT:
        return op->ne[1] >= offload_rows;
    case GGML_OP_MUL_MAT_ID:
    case GGML_OP_ROPE:
        return op->ne[2] >= offload_rows;
    default:
        return ggml_nrows(op) >= offload_rows;
    }
}

// -------------------------------------------------------------------------------------------------------------------
// registry

const char * registry_name(ggml_backend_reg_t) {
    return "TEST";
}

size_t device_count(ggml_backend_reg_t) {
    return here().devices.size();
}

ggml_backend_dev_t device_at(ggml_backend_reg_t, size_t index) {
    return &here().devices.at(index)->device;
}

void * find_function(ggml_backend_reg_t, const char * name) {
    const std::string wanted = name;
    if (wanted == "ggml_backend_register_host_buffer") {
        return reinterpret_cast<void *>(register_host_buffer);
    }
    if (wanted == "ggml_backend_unregister_host_buffer") {
        return reinterpret_cast<void *>(unregister_host_buffer);
    }
    if (wanted == "test_device_counts") {
        return reinterpret_cast<void *>(test_device_counts);
    }
    if (wanted == "test_device_stand_first") {
        return reinterpret_cast<void *>(test_device_stand_first);
    }
    if (wanted == "test_device_reset_counts") {
        return reinterpret_cast<void *>(test_device_reset_counts);
    }
    return nullptr;
}

// Members that tables.h leaves untyped, too.
template <class member, class function> void put(member & where, function * what) {
    where = reinterpret_cast<member>(what);
}

template <class functions>
ggml_backend_buffer_type_t fill_device_type(buffer_type<functions> & type, ggml_backend_dev_t device) {
    type.iface.get_name      = type_name;
    type.iface.alloc_buffer  = alloc_buffer;
    type.iface.get_alignment = [](ggml_backend_buffer_type_t) { return alignment; };
    put(type.iface.get_alloc_size, alloc_size);
    type.iface.is_host = [](ggml_backend_buffer_type_t) { return false; };
    type.device        = device;
    return reinterpret_cast<ggml_backend_buffer_type_t>(&type);
}

template <class functions>
ggml_backend_buffer_type_t fill_host_type(buffer_type<functions> & type, ggml_backend_dev_t device) {
    type.iface.get_name      = [](ggml_backend_buffer_type_t) { return "TEST_Host"; };
    type.iface.alloc_buffer  = alloc_host_buffer;
    type.iface.get_alignment = [](ggml_backend_buffer_type_t) {
        return ggml_backend_buft_get_alignment(ggml_backend_cpu_buffer_type());
    };
    type.iface.is_host = [](ggml_backend_buffer_type_t) { return true; };
    type.device        = device;
    return reinterpret_cast<ggml_backend_buffer_type_t>(&type);
}

void add_device(module_state & all, size_t i) {
    const auto of_list = [&](const auto & list) { return list[std::min(i, list.size() - 1)]; };
    auto made  = std::make_unique<device_state>(static_cast<int>(i), of_list(all.config.mib) << 20, all.config.reuse);
    made->name = "TEST" + std::to_string(i);
    made->id   = i < all.config.ids.size() ? all.config.ids[i] : "test:" + std::to_string(i);
    made->device.context              = made.get();
    made->device.reg                  = &all.registry;
    ggml_backend_device_i & functions = made->device.iface;
    functions.get_name                = device_name;
    functions.get_description         = device_description;
    functions.get_memory              = device_memory_of;
    functions.get_type                = device_type;
    functions.get_props               = device_props;
    functions.init_backend            = init_backend;
    functions.get_buffer_type         = device_buffer_type;
    functions.get_host_buffer_type    = host_buffer_type;
    functions.supports_op             = supports_op;
    functions.supports_buft           = supports_buffer_type;
    functions.offload_op              = offloads;
    functions.event_new               = new_event;
    functions.event_free              = free_event;
    functions.event_synchronize       = synchronize_event;
    made->type =
        all.api == 2 ? fill_device_type(made->type_2, &made->device) : fill_device_type(made->type_3, &made->device);
    all.devices.push_back(std::move(made));
}

// Throws std::runtime_error.
ggml_backend_reg_t start() {
    module_state & all = here();
    if (!all.devices.empty()) {
        return &all.registry;
    }
    all.config = read_settings();
    all.api    = ggml_backend_buft_alloc_buffer_n == nullptr ? 2 : 3;
    if (!knows_graphs()) {
        throw std::runtime_error("ggml's graphs are not as they were up to 0.27");
    }
    all.registry.api_version            = all.api;
    all.registry.iface.get_name         = registry_name;
    all.registry.iface.get_device_count = device_count;
    all.registry.iface.get_device       = device_at;
    all.registry.iface.get_proc_address = find_function;
    for (size_t i = 0; i < all.config.n_devices; i++) {
        add_device(all, i);
    }
    ggml_backend_dev_t first = &all.devices.front()->device;
    all.host_type = all.api == 2 ? fill_host_type(all.host_type_2, first) : fill_host_type(all.host_type_3, first);
    return &all.registry;
}

} // namespace

} // namespace test_device

extern "C" {

__attribute__((visibility("default"))) ggml_backend_reg_t test_device_registry(void) {
    try {
        return test_device::start();
    } catch (const std::exception & error) {
        std::fprintf(stderr, "test device: %s\n", error.what());
        return nullptr;
    }
}

__attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init(void) {
    return test_device_registry();
}

__attribute__((visibility("default"))) int64_t test_device_counts(char * json, size_t size) {
    const std::string text = test_device::counts_json();
    if (json != nullptr && size > 0) {
        const size_t n = std::min(text.size(), size - 1);
        std::memcpy(json, text.data(), n);
        json[n] = 0;
    }
    return static_cast<int64_t>(text.size());
}

__attribute__((visibility("default"))) void test_device_reset_counts(void) {
    test_device::reset_counts();
}

__attribute__((visibility("default"))) void test_device_stand_first(void) {
    ggml_backend_reg_t registry = ggml_backend_dev_backend_reg(test_device::cpu());
    ggml_backend_unload(registry); // forgets a registry that is linked in, no more
    ggml_backend_register(registry);
}
}
