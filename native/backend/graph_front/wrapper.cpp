#include "graph_front/wrapper.h"

#include "accelerator/device_port.h"
#include "graph_front/graph_runner.h"
#include "observer/host.h"
#include "observer/observer.h"
#include "running_ggml/probe.h"
#include "running_ggml/tables.h"
#include "settings.h"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#ifdef __unix__
#include <unistd.h>
#endif

namespace hybrimoe {

namespace {

constexpr const char * experts_name = "HybriMoE_Graph";

struct any_buffer_type { // of whatever API
    tables::buffer_type<tables::buffer_type_functions_2> api_2{};
    tables::buffer_type<tables::buffer_type_functions_3> api_3{};

    ggml_backend_buffer_type_t get() {
        return running_api_version() == 2 ? reinterpret_cast<ggml_backend_buffer_type_t>(&api_2)
                                          : reinterpret_cast<ggml_backend_buffer_type_t>(&api_3);
    }
    template <class filler> void fill(const filler & fill_one) {
        fill_one(api_2);
        fill_one(api_3);
    }
};

struct wrapper {
    ggml_backend_dev_t inner = nullptr;
    std::string name, description;
    tables::device device{};
    any_buffer_type memory;
};

struct wrappers {
    tables::device experts_device{};
    any_buffer_type experts;
    std::vector<std::unique_ptr<wrapper>> all;
};

wrappers & made() {
    static wrappers all;
    return all;
}

long process_id() {
#ifdef __unix__
    return static_cast<long>(::getpid());
#else
    return 0;
#endif
}

// --- experts: host memory that wrappers take

ggml_backend_buffer_t as_experts(ggml_backend_buffer_t buffer) {
    if (buffer != nullptr) {
        note_buffer(ggml_backend_buffer_get_base(buffer), ggml_backend_buffer_get_size(buffer));
        start_observer();
        tables::of(buffer)->buft = made().experts.get();
    }
    return buffer;
}

const char * experts_type_name(ggml_backend_buffer_type_t) {
    return experts_name;
}

ggml_backend_buffer_t experts_alloc(ggml_backend_buffer_type_t, size_t size) {
    return as_experts(ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size));
}

size_t experts_alignment(ggml_backend_buffer_type_t) {
    return ggml_backend_buft_get_alignment(ggml_backend_cpu_buffer_type());
}

bool is_host(ggml_backend_buffer_type_t) {
    return true;
}

const char * experts_device_name(ggml_backend_dev_t) {
    return experts_name;
}

const char * experts_description(ggml_backend_dev_t) {
    return "experts in host memory for devices that take the whole graph";
}

void no_memory(ggml_backend_dev_t, size_t * free, size_t * total) {
    *free = *total = 0;
}

enum ggml_backend_dev_type experts_type(ggml_backend_dev_t) {
    return GGML_BACKEND_DEVICE_TYPE_ACCEL;
}

void experts_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    props->name                      = experts_device_name(dev);
    props->description               = experts_description(dev);
    props->type                      = experts_type(dev);
    props->caps.buffer_from_host_ptr = true; // the file's memory map becomes the experts' buffer
    props->caps.mmap_support         = true;
}

const char * idle_name(ggml_backend_t) {
    return experts_name;
}

void idle_free(ggml_backend_t backend) {
    delete tables::of(backend);
}

ggml_status compute_nothing(ggml_backend_t, ggml_cgraph *) {
    return GGML_STATUS_FAILED;
}

ggml_guid_t idle_guid() {
    static ggml_guid guid = {0x68, 0x79, 0x62, 0x72, 0x69, 0x6d, 0x6f, 0x65,
                             0x9d, 0x1c, 0x4e, 0x53, 0xa7, 0x20, 0x3b, 0xf2};
    return &guid;
}

ggml_backend_t experts_init(ggml_backend_dev_t dev, const char *) {
    auto backend                 = std::make_unique<tables::backend>();
    backend->guid                = idle_guid();
    backend->iface.get_name      = idle_name;
    backend->iface.free          = idle_free;
    backend->iface.graph_compute = compute_nothing;
    backend->device              = dev;
    return reinterpret_cast<ggml_backend_t>(backend.release());
}

ggml_backend_buffer_type_t experts_buffer_type(ggml_backend_dev_t) {
    return made().experts.get();
}

ggml_backend_buffer_t experts_from_host(ggml_backend_dev_t, void * data, size_t size, size_t) {
    return as_experts(ggml_backend_cpu_buffer_from_ptr(data, size));
}

bool supports_nothing(ggml_backend_dev_t, const ggml_tensor *) {
    return false;
}

bool supports_experts(ggml_backend_dev_t, ggml_backend_buffer_type_t type) {
    return type == made().experts.get();
}

// --- a wrapper's backend

struct graph_state {
    explicit graph_state(ggml_backend_t backend) : runner(backend) {}

    const long process = process_id();
    std::string name;
    idleness idle;
    const bool may_log = current_settings().log_to_stderr;
    graph_runner runner;
};

graph_state & state_of(ggml_backend_t backend) {
    return *static_cast<graph_state *>(tables::of(backend)->context);
}

ggml_backend_t inner_of(ggml_backend_t backend) {
    return state_of(backend).runner.inner();
}

tables::backend_functions & inner_functions(ggml_backend_t backend) {
    return tables::of(inner_of(backend))->iface;
}

ggml_guid_t graph_guid() {
    static ggml_guid guid = {0x68, 0x79, 0x62, 0x72, 0x69, 0x6d, 0x6f, 0x65,
                             0x9d, 0x1c, 0x4e, 0x53, 0xa7, 0x20, 0x3b, 0xf3};
    return &guid;
}

bool is_wrapped(ggml_backend_t backend) {
    return backend != nullptr && tables::of(backend)->guid == graph_guid();
}

const char * graph_name(ggml_backend_t backend) {
    return state_of(backend).name.c_str();
}

void graph_free(ggml_backend_t backend) {
    graph_state * state = &state_of(backend);
    if (state->process != process_id()) {
        return; // a forked child has none of the threads; see plugin.cpp
    }
    delete state;
    delete tables::of(backend);
}

void set_async(ggml_backend_t backend, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    ggml_backend_tensor_set_async(inner_of(backend), tensor, data, offset, size);
}

void get_async(ggml_backend_t backend, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    ggml_backend_tensor_get_async(inner_of(backend), tensor, data, offset, size);
}

// Between two cards both sides are wrapped.
bool copy_async(ggml_backend_t source, ggml_backend_t target, const ggml_tensor * from, ggml_tensor * to) {
    const auto copy = inner_functions(target).cpy_tensor_async;
    return copy != nullptr && copy(is_wrapped(source) ? inner_of(source) : source, inner_of(target), from, to);
}

void synchronize(ggml_backend_t backend) {
    ggml_backend_synchronize(inner_of(backend));
}

ggml_status graph_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    return state_of(backend).runner.compute(graph);
}

void event_record(ggml_backend_t backend, ggml_backend_event_t event) {
    inner_functions(backend).event_record(inner_of(backend), event);
}

void event_wait(ggml_backend_t backend, ggml_backend_event_t event) {
    inner_functions(backend).event_wait(inner_of(backend), event);
}

void graph_optimize(ggml_backend_t backend, ggml_cgraph * graph, void * params) {
    const auto optimize = inner_functions(backend).graph_optimize;
    if (optimize != nullptr) {
        optimize(inner_of(backend), graph, params);
    }
}

// --- a wrapper's memory: the inner device's buffers, counted as the wrapper's

wrapper & of_type(ggml_backend_buffer_type_t type) {
    for (const auto & one : made().all) {
        if (one->memory.get() == type) {
            return *one;
        }
    }
    std::abort(); // no table of ours has another context
}

ggml_backend_buffer_type_t inner_type(ggml_backend_buffer_type_t type) {
    return ggml_backend_dev_buffer_type(of_type(type).inner);
}

const char * memory_name(ggml_backend_buffer_type_t type) {
    return of_type(type).name.c_str();
}

ggml_backend_buffer_t memory_alloc(ggml_backend_buffer_type_t type, size_t size) {
    return ggml_backend_buft_alloc_buffer(inner_type(type), size);
}

size_t memory_alignment(ggml_backend_buffer_type_t type) {
    return ggml_backend_buft_get_alignment(inner_type(type));
}

size_t memory_max_size(ggml_backend_buffer_type_t type) {
    return ggml_backend_buft_get_max_size(inner_type(type));
}

size_t memory_alloc_size(ggml_backend_buffer_type_t type, const ggml_tensor * tensor) {
    return ggml_backend_buft_get_alloc_size(inner_type(type), tensor);
}

bool memory_is_host(ggml_backend_buffer_type_t type) {
    return ggml_backend_buft_is_host(inner_type(type));
}

// --- a wrapper

wrapper & of(ggml_backend_dev_t dev) {
    return *static_cast<wrapper *>(tables::of(dev)->context);
}

const char * wrapper_name(ggml_backend_dev_t dev) {
    return of(dev).name.c_str();
}

const char * wrapper_description(ggml_backend_dev_t dev) {
    return of(dev).description.c_str();
}

void wrapper_memory(ggml_backend_dev_t dev, size_t * free, size_t * total) {
    ggml_backend_dev_memory(of(dev).inner, free, total);
}

enum ggml_backend_dev_type wrapper_type(ggml_backend_dev_t) {
    return GGML_BACKEND_DEVICE_TYPE_GPU; // constant: CUDA asks its driver
}

void wrapper_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    ggml_backend_dev_get_props(of(dev).inner, props);
    props->name        = wrapper_name(dev);
    props->description = wrapper_description(dev);
    props->type        = wrapper_type(dev);
    // Where it is cut, a graph is queued only up to its last cut; and what else is offered has no function of ours.
    const bool host_buffer  = props->caps.host_buffer;
    props->caps             = {};
    props->caps.host_buffer = host_buffer;
}

ggml_backend_t wrapper_init(ggml_backend_dev_t dev, const char * params) {
    try {
        ggml_backend_t inner = ggml_backend_dev_init(of(dev).inner, params);
        if (inner == nullptr) {
            return nullptr;
        }
        start_observer();
        auto state                            = std::make_unique<graph_state>(inner);
        state->name                           = of(dev).name;
        const tables::backend_functions & has = tables::of(inner)->iface;
        auto backend                          = std::make_unique<tables::backend>();
        backend->guid                         = graph_guid();
        backend->iface.get_name               = graph_name;
        backend->iface.free                   = graph_free;
        backend->iface.set_tensor_async       = has.set_tensor_async != nullptr ? set_async : nullptr;
        backend->iface.get_tensor_async       = has.get_tensor_async != nullptr ? get_async : nullptr;
        backend->iface.cpy_tensor_async       = copy_async;
        backend->iface.synchronize            = has.synchronize != nullptr ? synchronize : nullptr;
        backend->iface.graph_compute          = graph_compute;
        backend->iface.event_record           = has.event_record != nullptr ? event_record : nullptr;
        backend->iface.event_wait             = has.event_wait != nullptr ? event_wait : nullptr;
        backend->iface.graph_optimize         = has.graph_optimize != nullptr ? graph_optimize : nullptr;
        backend->device                       = dev;
        backend->context                      = state.release();
        return reinterpret_cast<ggml_backend_t>(backend.release());
    } catch (const std::exception & error) {
        std::fprintf(stderr, "HybriMoE: %s\n", error.what());
        return nullptr;
    }
}

ggml_backend_buffer_type_t wrapper_buffer_type(ggml_backend_dev_t dev) {
    return of(dev).memory.get();
}

ggml_backend_buffer_type_t wrapper_host_type(ggml_backend_dev_t dev) {
    return ggml_backend_dev_host_buffer_type(of(dev).inner);
}

// Experts in our memory are taken as weights of products alone: no other operation may ever see that memory.
bool wrapper_supports_op(ggml_backend_dev_t dev, const ggml_tensor * op) {
    for (size_t i = 0; i < GGML_MAX_SRC && op->op != GGML_OP_NONE; i++) {
        const bool is_product = op->op == GGML_OP_MUL_MAT_ID && i == 0;
        if (op->src[i] != nullptr && is_expert_weight_of_ours(op->src[i]) && !is_product) {
            return false;
        }
    }
    return ggml_backend_dev_supports_op(of(dev).inner, op);
}

bool wrapper_supports_type(ggml_backend_dev_t dev, ggml_backend_buffer_type_t type) {
    return type == made().experts.get() || type == of(dev).memory.get() ||
           ggml_backend_dev_supports_buft(of(dev).inner, type);
}

bool wrapper_offloads(ggml_backend_dev_t dev, const ggml_tensor * op) {
    return ggml_backend_dev_offload_op(of(dev).inner, op);
}

ggml_backend_event_t wrapper_event_new(ggml_backend_dev_t dev) {
    return ggml_backend_event_new(of(dev).inner); // it knows its own device from now on
}

void wrapper_event_free(ggml_backend_dev_t, ggml_backend_event_t event) {
    ggml_backend_event_free(event);
}

void wrapper_event_synchronize(ggml_backend_dev_t, ggml_backend_event_t event) {
    ggml_backend_event_synchronize(event);
}

// --- which devices get one

// A device that is named twice has one wrapper.
std::vector<ggml_backend_dev_t> devices_to_wrap(const settings & config) {
    std::vector<ggml_backend_dev_t> chosen;
    for (ggml_backend_dev_t device : choose_devices(config)) {
        if (std::find(chosen.begin(), chosen.end(), device) == chosen.end()) {
            chosen.push_back(device);
        }
    }
    return chosen;
}

void fill_experts_device(ggml_backend_reg_t registry) {
    tables::device & device           = made().experts_device;
    device.iface.get_name             = experts_device_name;
    device.iface.get_description      = experts_description;
    device.iface.get_memory           = no_memory;
    device.iface.get_type             = experts_type;
    device.iface.get_props            = experts_props;
    device.iface.init_backend         = experts_init;
    device.iface.get_buffer_type      = experts_buffer_type;
    device.iface.buffer_from_host_ptr = experts_from_host;
    device.iface.supports_op          = supports_nothing;
    device.iface.supports_buft        = supports_experts;
    device.reg                        = registry;
    made().experts.fill([&](auto & type) {
        type.iface.get_name      = experts_type_name;
        type.iface.alloc_buffer  = experts_alloc;
        type.iface.get_alignment = experts_alignment;
        type.iface.is_host       = is_host;
        type.device              = reinterpret_cast<ggml_backend_dev_t>(&device);
    });
}

void fill_wrapper(wrapper & one, ggml_backend_reg_t registry) {
    one.name                          = std::string(plugin_registry_name) + "_" + ggml_backend_dev_name(one.inner);
    one.description                   = ggml_backend_dev_description(one.inner);
    tables::device & device           = one.device;
    device.iface.get_name             = wrapper_name;
    device.iface.get_description      = wrapper_description;
    device.iface.get_memory           = wrapper_memory;
    device.iface.get_type             = wrapper_type;
    device.iface.get_props            = wrapper_props;
    device.iface.init_backend         = wrapper_init;
    device.iface.get_buffer_type      = wrapper_buffer_type;
    device.iface.get_host_buffer_type = wrapper_host_type;
    device.iface.supports_op          = wrapper_supports_op;
    device.iface.supports_buft        = wrapper_supports_type;
    device.iface.offload_op           = wrapper_offloads;
    device.iface.event_new            = wrapper_event_new;
    device.iface.event_free           = wrapper_event_free;
    device.iface.event_synchronize    = wrapper_event_synchronize;
    device.reg                        = registry;
    device.context                    = &one;
    one.memory.fill([&](auto & type) {
        type.iface.get_name       = memory_name;
        type.iface.alloc_buffer   = memory_alloc;
        type.iface.get_alignment  = memory_alignment;
        type.iface.get_max_size   = memory_max_size;
        type.iface.get_alloc_size = memory_alloc_size;
        type.iface.is_host        = memory_is_host;
        type.device               = reinterpret_cast<ggml_backend_dev_t>(&device);
    });
}

} // namespace

void make_wrappers(ggml_backend_reg_t registry) {
    const settings config = current_settings();
    if (config.front != front_end::graph || !made().all.empty()) {
        return;
    }
    const std::string problem = why_no_slices();
    if (!problem.empty()) {
        std::fprintf(stderr, "HybriMoE: no device takes whole graphs: %s\n", problem.c_str());
        return;
    }
    try {
        for (ggml_backend_dev_t inner : devices_to_wrap(config)) {
            auto one   = std::make_unique<wrapper>();
            one->inner = inner;
            fill_wrapper(*one, registry);
            made().all.push_back(std::move(one));
        }
    } catch (const std::exception & error) {
        std::fprintf(stderr, "HybriMoE: no device takes whole graphs: %s\n", error.what());
        made().all.clear();
    }
    if (!made().all.empty()) {
        fill_experts_device(registry);
    }
}

size_t n_graph_devices() {
    return made().all.empty() ? 0 : made().all.size() + 1;
}

ggml_backend_dev_t graph_device(size_t index) {
    return reinterpret_cast<ggml_backend_dev_t>(index == 0 ? &made().experts_device : &made().all[index - 1]->device);
}

bool is_expert_weight_of_ours(const ggml_tensor * t) {
    const ggml_tensor * owner = t->view_src != nullptr ? t->view_src : t;
    return owner->buffer != nullptr && !made().all.empty() &&
           ggml_backend_buffer_get_type(owner->buffer) == made().experts.get();
}

bool is_cut_product(const ggml_tensor * node) {
    return node->op == GGML_OP_MUL_MAT_ID && is_expert_weight_of_ours(node->src[0]);
}

bool set_graph_threads(ggml_backend_t backend, int n_threads) {
    if (is_wrapped(backend)) {
        state_of(backend).runner.set_n_threads(n_threads);
        return true;
    }
    return tables::of(backend)->guid == idle_guid();
}

bool set_graph_abort_callback(ggml_backend_t backend, ggml_abort_callback callback, void * data) {
    if (is_wrapped(backend)) {
        state_of(backend).runner.set_abort_callback(callback, data);
        return true;
    }
    return tables::of(backend)->guid == idle_guid();
}

} // namespace hybrimoe
