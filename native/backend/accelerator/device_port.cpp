#include "accelerator/device_port.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>

namespace hybrimoe {

namespace {

ggml_backend_t start(ggml_backend_dev_t device) {
    ggml_backend_t made = ggml_backend_dev_init(device, nullptr);
    if (made == nullptr) {
        throw std::runtime_error(std::string(ggml_backend_dev_name(device)) + " could not be started");
    }
    return made;
}

template <typename function> function find_function(ggml_backend_dev_t device, const char * name) {
    return reinterpret_cast<function>(ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), name));
}

} // namespace

device_port::device_port(ggml_backend_dev_t device, int index, const settings & config)
    : device_(device), index_(index), name_(ggml_backend_dev_name(device)),
      is_cpu_(ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU), faults_(config.faults),
      compute_(start(device)), copies_(start(device)) {
    struct {
        ggml_backend_dev_props known;
        char more[256]; // a newer ggml may have further members
    } props{};
    ggml_backend_dev_get_props(device, &props.known);
    has_events_ = props.known.caps.events;
    alignment_  = ggml_backend_buft_get_alignment(ggml_backend_dev_buffer_type(device));
    if (is_cpu_) {
        // A CPU that stands in for an accelerator must not start a team of threads beside the one that computes.
        const auto set_n_threads = find_function<ggml_backend_set_n_threads_t>(device, "ggml_backend_set_n_threads");
        if (set_n_threads != nullptr) {
            set_n_threads(compute_.get(), 1);
        }
    }
}

size_t device_port::free_bytes() const {
    if (faults_.free_bytes >= 0) {
        return static_cast<size_t>(faults_.free_bytes);
    }
    size_t free  = 0;
    size_t total = 0;
    ggml_backend_dev_memory(device_, &free, &total);
    return free;
}

size_t device_port::total_bytes() const {
    size_t free  = 0;
    size_t total = 0;
    ggml_backend_dev_memory(device_, &free, &total);
    return total;
}

buffer_ptr device_port::allocate(size_t n_bytes) {
    n_allocations_++;
    const bool fails = faults_.fail_alloc_from > 0 && n_allocations_ >= faults_.fail_alloc_from &&
                       (faults_.fail_alloc_until == 0 || n_allocations_ <= faults_.fail_alloc_until);
    return buffer_ptr(fails ? nullptr : ggml_backend_buft_alloc_buffer(ggml_backend_dev_buffer_type(device_), n_bytes));
}

size_t device_port::alloc_size(const ggml_tensor * tensor) const {
    const size_t n = ggml_backend_buft_get_alloc_size(ggml_backend_dev_buffer_type(device_), tensor);
    return (n + alignment_ - 1) / alignment_ * alignment_;
}

buffer_ptr device_port::allocate_host(size_t n_bytes, bool & pinned) {
    ggml_backend_buffer_type_t type = ggml_backend_dev_host_buffer_type(device_);
    if (type != nullptr) {
        buffer_ptr buffer(ggml_backend_buft_alloc_buffer(type, n_bytes));
        if (buffer != nullptr) {
            // Where pinning fails, backends hand out plain memory of the CPU's type.
            pinned = ggml_backend_buffer_get_type(buffer.get()) == type;
            return buffer;
        }
    }
    pinned = false;
    return buffer_ptr(ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), n_bytes));
}

bool device_port::register_host(void * data, size_t n_bytes) {
    using register_function = bool (*)(void *, size_t);
    const auto call         = find_function<register_function>(device_, "ggml_backend_register_host_buffer");
    if (call == nullptr || !call(data, n_bytes)) {
        return false;
    }
    registered_[static_cast<char *>(data)] = n_bytes;
    return true;
}

device_port::~device_port() {
    using unregister_function = void (*)(void *);
    const auto call           = find_function<unregister_function>(device_, "ggml_backend_unregister_host_buffer");
    for (const auto & range : registered_) {
        if (call != nullptr) {
            call(range.first);
        }
    }
}

bool device_port::is_registered(const void * data, size_t n_bytes) const {
    const char * begin = static_cast<const char *>(data);
    const auto after   = registered_.upper_bound(const_cast<char *>(begin));
    if (after == registered_.begin()) {
        return false;
    }
    const auto range = std::prev(after);
    return begin + n_bytes <= range->first + range->second;
}

std::vector<ggml_backend_dev_t> choose_devices(const settings & config) {
    std::vector<ggml_backend_dev_t> chosen;
    if (config.all_devices) {
        std::vector<std::string> ids;
        for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
            ggml_backend_dev_t device = ggml_backend_dev_get(i);
            const char * registry     = ggml_backend_reg_name(ggml_backend_dev_backend_reg(device));
            if (std::strcmp(registry, plugin_registry_name) == 0 || std::strcmp(registry, "RPC") == 0 ||
                ggml_backend_dev_type(device) != GGML_BACKEND_DEVICE_TYPE_GPU) {
                continue;
            }
            // Room for members that a newer ggml may have.
            struct {
                ggml_backend_dev_props known;
                char more[256];
            } given{};
            ggml_backend_dev_get_props(device, &given.known);
            const std::string id = given.known.device_id == nullptr ? "" : given.known.device_id;
            if (!id.empty() && std::find(ids.begin(), ids.end(), id) != ids.end()) {
                continue;
            }
            ids.push_back(id);
            chosen.push_back(device);
        }
        return chosen;
    }
    for (const std::string & name : config.devices) {
        ggml_backend_dev_t device = ggml_backend_dev_by_name(name.c_str());
        if (device == nullptr) {
            throw std::invalid_argument("ggml has no device \"" + name + "\"");
        }
        chosen.push_back(device);
    }
    return chosen;
}

} // namespace hybrimoe
