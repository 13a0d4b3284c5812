// One accelerator through ggml's public interface: a backend instance that computes, a second one that copies, memory
// for slots and work, and pinned host memory for what goes to and fro. No CUDA or Vulkan code of our own.
#pragma once

#include "settings.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace hybrimoe {

struct buffer_deleter {
    void operator()(ggml_backend_buffer * buffer) const { ggml_backend_buffer_free(buffer); }
};
using buffer_ptr = std::unique_ptr<ggml_backend_buffer, buffer_deleter>;

struct backend_deleter {
    void operator()(ggml_backend * backend) const { ggml_backend_free(backend); }
};
using backend_ptr = std::unique_ptr<ggml_backend, backend_deleter>;

struct context_deleter {
    void operator()(ggml_context * context) const { ggml_free(context); }
};
using context_ptr = std::unique_ptr<ggml_context, context_deleter>;

struct event_deleter {
    void operator()(ggml_backend_event * event) const { ggml_backend_event_free(event); }
};
using event_ptr = std::unique_ptr<ggml_backend_event, event_deleter>;

class device_port {
public:
    // Throws std::runtime_error when the device cannot be started.
    device_port(ggml_backend_dev_t device, int index, const settings & config);
    ~device_port();
    device_port(const device_port &)             = delete;
    device_port & operator=(const device_port &) = delete;

    int index() const { return index_; }
    const std::string & name() const { return name_; }
    std::string description() const { return ggml_backend_dev_description(device_); }
    bool is_cpu() const { return is_cpu_; }
    ggml_backend_dev_t device() const { return device_; }
    ggml_backend_t compute() const { return compute_.get(); }
    ggml_backend_t copies() const { return copies_.get(); }
    bool has_events() const { return has_events_; }
    size_t alignment() const { return alignment_; }
    bool supports(const ggml_tensor * op) const { return ggml_backend_dev_supports_op(device_, op); }

    size_t free_bytes() const;
    size_t total_bytes() const;
    // Device memory; null when there is not enough.
    buffer_ptr allocate(size_t n_bytes);
    size_t alloc_size(const ggml_tensor * tensor) const;
    // Host memory from which copies can run without staging, pinned where the device has such memory; null when there
    // is none at all.
    buffer_ptr allocate_host(size_t n_bytes, bool & pinned);
    // Makes existing host memory fit for copies without staging, as long as the port lives; false where the backend
    // cannot.
    bool register_host(void * data, size_t n_bytes);
    // Whether the range lies in host memory from which this device copies without staging.
    bool is_registered(const void * data, size_t n_bytes) const;

private:
    ggml_backend_dev_t device_;
    int index_;
    std::string name_;
    bool is_cpu_      = false;
    bool has_events_  = false;
    size_t alignment_ = 0;
    fault_plan faults_;
    int64_t n_allocations_ = 0;
    std::map<char *, size_t> registered_; // begin, size
    backend_ptr compute_;
    backend_ptr copies_;
};

// ggml's name of the plug-in's registry and of its first device.
constexpr const char * plugin_registry_name = "HybriMoE";

// The accelerators that the settings name; by default every GPU with memory of its own: no integrated one (its slots
// would be copies in the same memory), none behind the network, no wrapper of ours, and no card twice where two
// backends have it. Throws std::invalid_argument for a name that ggml does not have.
std::vector<ggml_backend_dev_t> choose_devices(const settings & config);

} // namespace hybrimoe
