// The ggml backend: one device of type ACCEL with a host buffer type, found by any llama.cpp that loads this library,
// and where they are wanted devices that wrap GPUs (graph_front/wrapper.h).
// Read from the bottom: registry, device, backend, buffer type.
#include "claim.h"
#include "counters.h"
#include "dispatch.h"
#include "graph_front/wrapper.h"
#include "hybrimoe.h"
#include "json_text.h"
#include "observer/host.h"
#include "observer/observer.h"
#include "running_ggml/binding.h"
#include "running_ggml/loaded_library.h"
#include "running_ggml/other_builds.h"
#include "running_ggml/probe.h"
#include "running_ggml/tables.h"
#include "settings.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <vector>

#ifdef __unix__
#include <unistd.h>
#endif

namespace hybrimoe {

namespace {

constexpr const char * backend_name = plugin_registry_name;

ggml_backend_reg_t registry();
ggml_backend_dev_t device();
ggml_backend_buffer_type_t buffer_type();

ggml_backend_buffer_t as_ours(ggml_backend_buffer_t buffer) {
    if (buffer != nullptr) {
        note_buffer(ggml_backend_buffer_get_base(buffer), ggml_backend_buffer_get_size(buffer));
        start_observer();
        tables::of(buffer)->buft = buffer_type();
    }
    return buffer;
}

// --- buffer type: plain host memory under a name of its own, so that the scheduler sends its users to our backend

const char * buffer_type_name(ggml_backend_buffer_type_t) {
    return backend_name;
}

ggml_backend_buffer_t buffer_type_alloc(ggml_backend_buffer_type_t, size_t size) {
    return as_ours(ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size));
}

size_t buffer_type_alignment(ggml_backend_buffer_type_t) {
    return ggml_backend_buft_get_alignment(ggml_backend_cpu_buffer_type());
}

bool buffer_type_is_host(ggml_backend_buffer_type_t) {
    return true;
}

template <typename functions> ggml_backend_buffer_type_t make_buffer_type() {
    static tables::buffer_type<functions> type = [] {
        tables::buffer_type<functions> made{};
        made.iface.get_name      = buffer_type_name;
        made.iface.alloc_buffer  = buffer_type_alloc;
        made.iface.get_alignment = buffer_type_alignment;
        made.iface.is_host       = buffer_type_is_host;
        made.device              = device();
        return made;
    }();
    return reinterpret_cast<ggml_backend_buffer_type_t>(&type);
}

ggml_backend_buffer_type_t buffer_type() {
    static ggml_backend_buffer_type_t type = running_api_version() == 2
                                                 ? make_buffer_type<tables::buffer_type_functions_2>()
                                                 : make_buffer_type<tables::buffer_type_functions_3>();
    return type;
}

// --- backend: one instance per llama_context

long process_id() {
#ifdef __unix__
    return static_cast<long>(::getpid());
#else
    return 0;
#endif
}

// Beside devices that take whole graphs, blocks in host memory are those of layers on the CPU: the caches are theirs.
settings block_settings() {
    settings config = current_settings();
    if (n_graph_devices() > 0) {
        config.expert_cache    = {};
        config.expert_cache.is = expert_cache_size::kind::slots;
        config.state_path.clear();
    }
    return config;
}

struct block_instance {
    explicit block_instance(instance_ticket ticket)
        : id(ticket.id), dispatch(block_settings(), std::move(ticket.data)) {
        show_instance(id, &dispatch);
    }
    ~block_instance() { forget_instance(id); }

    const uint64_t id;
    dispatcher dispatch;
};

struct backend_state {
    dispatcher & dispatch() {
        if (made == nullptr) {
            made = std::make_unique<block_instance>(register_instance());
        }
        return made->dispatch;
    }

    const long process = process_id();
    const bool may_log = current_settings().log_to_stderr;
    idleness idle;
    std::unique_ptr<block_instance> made;
    // Inputs that are on their way to host memory: one wait for each backend they come from when the graph begins.
    std::vector<graph_input> inputs;
    int n_threads             = GGML_DEFAULT_N_THREADS;
    ggml_abort_callback abort = nullptr;
    void * abort_data         = nullptr;
};

backend_state & state_of(ggml_backend_t backend) {
    return *static_cast<backend_state *>(tables::of(backend)->context);
}

const char * backend_get_name(ggml_backend_t) {
    return backend_name;
}

void backend_free(ggml_backend_t backend) {
    auto * state = &state_of(backend);
    // A forked child has the memory, but none of the threads that the instance would wait for; its files are the
    // parent's. It leaves all of it to the end of the process.
    if (state->process != process_id()) {
        return;
    }
    delete state;
    delete tables::of(backend);
}

void wait_for(const std::vector<graph_input> & inputs) {
    std::vector<ggml_backend_t> waited;
    for (const graph_input & input : inputs) {
        if (std::find(waited.begin(), waited.end(), input.there.source) == waited.end()) {
            ggml_backend_synchronize(input.there.source);
            waited.push_back(input.there.source);
        }
        if (input.same_as != nullptr) {
            std::memcpy(input.data, input.same_as, ggml_nbytes(input.there.tensor));
        }
    }
}

ggml_status backend_graph_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    backend_state & state = state_of(backend);
    state.idle.on_graph_of_ours();
    wait_for(state.inputs);
    std::vector<graph_input> inputs;
    inputs.swap(state.inputs);
    try {
        state.dispatch().set_n_threads(state.n_threads);
        state.dispatch().set_abort_callback(state.abort, state.abort_data);
        return state.dispatch().compute(graph, inputs);
    } catch (const std::bad_alloc &) {
        return GGML_STATUS_ALLOC_FAILED;
    } catch (const std::exception & error) {
        std::fprintf(stderr, "HybriMoE: %s\n", error.what());
        return GGML_STATUS_FAILED;
    }
}

// The scheduler asks us to bring an input over: queue the download behind what its backend still computes, instead of
// two waits and a blocking copy for every input.
bool backend_cpy_tensor_async(ggml_backend_t source, ggml_backend_t backend, const ggml_tensor * from,
                              ggml_tensor * to) {
    ggml_backend_buffer_t memory = from->view_src == nullptr ? from->buffer : from->view_src->buffer;
    if (memory == nullptr || ggml_backend_buffer_is_host(memory) || !ggml_is_contiguous(from) ||
        ggml_nbytes(from) != ggml_nbytes(to)) {
        return false;
    }
    // The same rows come twice, under two shapes.
    std::vector<graph_input> & inputs = state_of(backend).inputs;
    const auto first                  = std::find_if(inputs.begin(), inputs.end(), [&](const graph_input & other) {
        return other.there.tensor->data == from->data && other.there.source == source &&
               ggml_nbytes(other.there.tensor) == ggml_nbytes(from);
    });
    graph_input input{to->data, {from, source}, nullptr};
    if (first == inputs.end()) {
        ggml_backend_tensor_get_async(source, from, to->data, 0, ggml_nbytes(from));
    } else {
        input.same_as = first->data;
    }
    inputs.push_back(input);
    return true;
}

ggml_guid_t backend_guid() {
    static ggml_guid guid = {0x68, 0x79, 0x62, 0x72, 0x69, 0x6d, 0x6f, 0x65,
                             0x9d, 0x1c, 0x4e, 0x53, 0xa7, 0x20, 0x3b, 0xf1};
    return &guid;
}

void backend_set_n_threads(ggml_backend_t backend, int n_threads) {
    if (set_graph_threads(backend, n_threads)) {
        return;
    }
    state_of(backend).n_threads = n_threads;
    state_of(backend).idle.on_graph_announced(state_of(backend).may_log); // llama.cpp sets it before each graph
}

void backend_set_abort_callback(ggml_backend_t backend, ggml_abort_callback callback, void * data) {
    if (set_graph_abort_callback(backend, callback, data)) {
        return;
    }
    state_of(backend).abort      = callback;
    state_of(backend).abort_data = data;
}

// --- device

const char * device_get_name(ggml_backend_dev_t) {
    return backend_name;
}

const char * device_get_description(ggml_backend_dev_t) {
    return "hybrid CPU and GPU dispatch of MoE experts";
}

void device_get_memory(ggml_backend_dev_t, size_t * free, size_t * total) {
    *free  = 0; // none of its own: experts live in the host's memory
    *total = 0;
}

enum ggml_backend_dev_type device_get_type(ggml_backend_dev_t) {
    return GGML_BACKEND_DEVICE_TYPE_ACCEL;
}

void device_get_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    // By name: ggml has set it all to zero, and its structure may have more members than ours.
    props->name        = device_get_name(dev);
    props->description = device_get_description(dev);
    props->type        = device_get_type(dev);
    // The file's memory map becomes the experts' buffer; they are never copied.
    props->caps.buffer_from_host_ptr = true;
    props->caps.mmap_support         = true;
}

ggml_backend_t device_init_backend(ggml_backend_dev_t dev, const char *) {
    try {
        start_observer();
        auto state = std::make_unique<backend_state>();
        // Every context gets an instance of every device. Where graphs are taken whole, most never see a block.
        if (n_graph_devices() == 0) {
            state->dispatch();
        }
        auto made                    = std::make_unique<tables::backend>();
        made->guid                   = backend_guid();
        made->iface.get_name         = backend_get_name;
        made->iface.free             = backend_free;
        made->iface.cpy_tensor_async = backend_cpy_tensor_async;
        made->iface.graph_compute    = backend_graph_compute;
        made->device                 = dev;
        made->context                = state.release();
        return reinterpret_cast<ggml_backend_t>(made.release());
    } catch (const std::exception & error) {
        std::fprintf(stderr, "HybriMoE: %s\n", error.what());
        return nullptr;
    }
}

ggml_backend_buffer_type_t device_get_buffer_type(ggml_backend_dev_t) {
    return buffer_type();
}

ggml_backend_buffer_t device_buffer_from_host_ptr(ggml_backend_dev_t, void * ptr, size_t size, size_t) {
    return as_ours(ggml_backend_cpu_buffer_from_ptr(ptr, size));
}

bool device_supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    ggml_backend_dev_t cpu = find_cpu_device();
    return cpu != nullptr && claims(op, buffer_type(), cpu);
}

bool device_supports_buft(ggml_backend_dev_t, ggml_backend_buffer_type_t buft) {
    return ggml_backend_buft_is_host(buft);
}

ggml_backend_dev_t device() {
    static tables::device the_device = [] {
        tables::device made{};
        made.iface.get_name             = device_get_name;
        made.iface.get_description      = device_get_description;
        made.iface.get_memory           = device_get_memory;
        made.iface.get_type             = device_get_type;
        made.iface.get_props            = device_get_props;
        made.iface.init_backend         = device_init_backend;
        made.iface.get_buffer_type      = device_get_buffer_type;
        made.iface.buffer_from_host_ptr = device_buffer_from_host_ptr;
        made.iface.supports_op          = device_supports_op;
        made.iface.supports_buft        = device_supports_buft;
        made.reg                        = registry();
        return made;
    }();
    return reinterpret_cast<ggml_backend_dev_t>(&the_device);
}

// --- registry

const char * registry_get_name(ggml_backend_reg_t) {
    return backend_name;
}

size_t registry_get_device_count(ggml_backend_reg_t) {
    return 1 + n_graph_devices();
}

ggml_backend_dev_t registry_get_device(ggml_backend_reg_t, size_t index) {
    return index == 0 ? device() : graph_device(index - 1);
}

void * registry_get_proc_address(ggml_backend_reg_t, const char * name) {
    if (std::strcmp(name, "ggml_backend_set_n_threads") == 0) {
        return reinterpret_cast<void *>(backend_set_n_threads);
    }
    if (std::strcmp(name, "ggml_backend_set_abort_callback") == 0) {
        return reinterpret_cast<void *>(backend_set_abort_callback);
    }
    return nullptr;
}

ggml_backend_reg_t registry() {
    static tables::registry the_registry = [] {
        tables::registry made{};
        made.api_version            = running_api_version(); // ggml takes no other
        made.iface.get_name         = registry_get_name;
        made.iface.get_device_count = registry_get_device_count;
        made.iface.get_device       = registry_get_device;
        made.iface.get_proc_address = registry_get_proc_address;
        return made;
    }();
    return reinterpret_cast<ggml_backend_reg_t>(&the_registry);
}

// One line of JSON on stderr for `hybrimoe plugin list`, which asks programs so: what fits the host's ggml.
void tell_probe(const char * mismatch, const other_build & other) {
    const bool is_bound               = is_ggml_bound();
    const nlohmann::ordered_json told = {
        {"hybrimoe_probe", 1},
        {"ggml", is_bound ? ggml_version() : ""},
        {"backend_api", is_bound ? running_api_version() : 0},
        {"reason", mismatch == nullptr ? "" : mismatch},
        {"fits", mismatch == nullptr || !other.path.empty()},
        {"other_build", other.path},
    };
    std::fprintf(stderr, "%s\n", told.dump().c_str());
}

} // namespace

} // namespace hybrimoe

extern "C" {

HYBRIMOE_API ggml_backend_reg_t ggml_backend_init(void);

// ggml calls this once it has loaded the library. With HYBRIMOE_PROBE set it only tells what it found.
ggml_backend_reg_t ggml_backend_init(void) {
    using namespace hybrimoe;
    void * ggml             = library_of(__builtin_return_address(0));
    const char * mismatch   = hybrimoe_check_ggml(ggml);
    const other_build other = mismatch == nullptr ? other_build{} : find_build_that_fits(ggml);
    if (std::getenv("HYBRIMOE_PROBE") != nullptr) {
        tell_probe(mismatch, other);
        return nullptr;
    }
    if (mismatch == nullptr) {
        make_wrappers(registry());
        return registry();
    }
    if (other.init != nullptr) {
        return other.init();
    }
    std::fprintf(stderr,
                 "error: the HybriMoE plug-in cannot be used here: %s\n"
                 "hint: hybrimoe plugin build --llama-cpp DIR, where DIR is the program's source tree or the folder "
                 "that it was installed into\n",
                 mismatch);
    return nullptr;
}

} // extern "C"
