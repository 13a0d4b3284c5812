#include "cpu_executor.h"

#include "running_ggml/loaded_library.h"
#include "running_ggml/tables.h"

#include <algorithm>
#include <atomic>
#include <dlfcn.h>
#include <stdexcept>

namespace hybrimoe {

namespace {

template <typename function> function find_function(ggml_backend_dev_t device, const char * name) {
    return reinterpret_cast<function>(ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), name));
}

} // namespace

// Looking it up asks every device before it for its type, and CUDA's answers by asking the driver for the card's
// properties, about a millisecond each; a graph build asks us about every operation.
ggml_backend_dev_t find_cpu_device() {
    static std::atomic<ggml_backend_dev_t> found{nullptr}; // ggml's devices live as long as the process
    ggml_backend_dev_t device = found.load(std::memory_order_relaxed);
    if (device == nullptr) {
        device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        found.store(device, std::memory_order_relaxed);
    }
    return device;
}

// The CPU backend may be a library that nobody linked (dynamically loaded backends): look into the one its device is
// from.
const ggml_type_traits_cpu * find_type_traits(ggml_type type) {
    using getter            = const ggml_type_traits_cpu * (*)(ggml_type);
    static const getter get = []() -> getter {
        ggml_backend_dev_t device = find_cpu_device();
        void * library =
            device == nullptr ? nullptr : library_of(reinterpret_cast<void *>(tables::of(device)->iface.get_name));
        return library == nullptr ? nullptr : reinterpret_cast<getter>(dlsym(library, "ggml_get_type_traits_cpu"));
    }();
    return get == nullptr ? nullptr : get(type);
}

cpu_executor::cpu_executor() {
    ggml_backend_dev_t device = find_cpu_device();
    if (device == nullptr) {
        throw std::runtime_error("ggml has no CPU backend");
    }
    set_n_threads_ = find_function<ggml_backend_set_n_threads_t>(device, "ggml_backend_set_n_threads");
    backend_       = set_n_threads_ == nullptr ? nullptr : ggml_backend_dev_init(device, nullptr);
    if (backend_ == nullptr) {
        throw std::runtime_error("ggml's CPU backend could not be started");
    }
}

cpu_executor::~cpu_executor() {
    ggml_free(graph_context_);
    ggml_backend_free(backend_);
}

void cpu_executor::reserve(int n_nodes) {
    if (n_nodes <= capacity_) {
        return;
    }
    const size_t capacity = static_cast<size_t>(std::max(n_nodes, 128));
    ggml_free(graph_context_);
    ggml_init_params params{};
    params.mem_size = ggml_graph_overhead_custom(capacity, false);
    params.no_alloc = true;
    graph_context_  = ggml_init(params);
    graph_          = ggml_new_graph_custom(graph_context_, capacity, false);
    capacity_       = static_cast<int>(capacity);
}

ggml_status cpu_executor::run(ggml_tensor ** nodes, int n_nodes, int n_threads) {
    if (n_nodes == 0) {
        return GGML_STATUS_SUCCESS;
    }
    reserve(n_nodes);
    ggml_graph_clear(graph_);
    for (int i = 0; i < n_nodes; i++) {
        ggml_graph_add_node(graph_, nodes[i]);
    }
    if (n_threads != n_threads_) {
        set_n_threads_(backend_, n_threads);
        n_threads_ = n_threads;
    }
    return ggml_backend_graph_compute(backend_, graph_);
}

void cpu_executor::set_abort_callback(ggml_abort_callback callback, void * data) {
    using setter   = void (*)(ggml_backend_t, ggml_abort_callback, void *);
    const auto set = find_function<setter>(ggml_backend_get_device(backend_), "ggml_backend_set_abort_callback");
    if (set != nullptr) {
        set(backend_, callback, data);
    }
}

} // namespace hybrimoe
