// The tables through which ggml and a backend know each other, for backend API 2 and 3: what ggml keeps in a header of
// its own that no installation of it has. Written from the interface of ggml 0.25 (API 2) and 0.26 (API 3); the probe
// (probe.h) checks them against the running ggml before one of them is used. Members that we neither fill nor read are
// untyped. Tables are always made zero and filled by name, so that a member that we do not know is null.
//
// Differences: API 3 has two more members in the table of a buffer type (alloc_buffer_n, get_alloc_size_n).
#pragma once

#include "ggml-backend.h"
#include "ggml.h"

namespace hybrimoe::tables {

constexpr int oldest_api = 2;
constexpr int newest_api = 3;

struct buffer_type_functions_2 {
    const char * (*get_name)(ggml_backend_buffer_type_t);
    ggml_backend_buffer_t (*alloc_buffer)(ggml_backend_buffer_type_t, size_t size);
    size_t (*get_alignment)(ggml_backend_buffer_type_t);
    size_t (*get_max_size)(ggml_backend_buffer_type_t);
    size_t (*get_alloc_size)(ggml_backend_buffer_type_t, const ggml_tensor *);
    bool (*is_host)(ggml_backend_buffer_type_t);
};

struct buffer_type_functions_3 {
    const char * (*get_name)(ggml_backend_buffer_type_t);
    ggml_backend_buffer_t (*alloc_buffer)(ggml_backend_buffer_type_t, size_t size);
    void * alloc_buffer_n;
    size_t (*get_alignment)(ggml_backend_buffer_type_t);
    size_t (*get_max_size)(ggml_backend_buffer_type_t);
    size_t (*get_alloc_size)(ggml_backend_buffer_type_t, const ggml_tensor *);
    void * get_alloc_size_n;
    bool (*is_host)(ggml_backend_buffer_type_t);
};

template <typename functions> struct buffer_type {
    functions iface;
    ggml_backend_dev_t device;
    void * context;
};

struct buffer {
    void * functions[11];
    ggml_backend_buffer_type_t buft;
    void * context;
    size_t size;
    enum ggml_backend_buffer_usage usage;
};

struct backend_functions {
    const char * (*get_name)(ggml_backend_t);
    void (*free)(ggml_backend_t);
    void (*set_tensor_async)(ggml_backend_t, ggml_tensor *, const void * data, size_t offset, size_t size);
    void (*get_tensor_async)(ggml_backend_t, const ggml_tensor *, void * data, size_t offset, size_t size);
    void * set_tensor_2d_async;
    void * get_tensor_2d_async;
    bool (*cpy_tensor_async)(ggml_backend_t source, ggml_backend_t target, const ggml_tensor * from, ggml_tensor * to);
    void (*synchronize)(ggml_backend_t);
    void * graph_plan_create;
    void * graph_plan_free;
    void * graph_plan_update;
    void * graph_plan_compute;
    ggml_status (*graph_compute)(ggml_backend_t, ggml_cgraph *);
    void (*event_record)(ggml_backend_t, ggml_backend_event_t);
    void (*event_wait)(ggml_backend_t, ggml_backend_event_t);
    void (*graph_optimize)(ggml_backend_t, ggml_cgraph *, void * params);
};

struct backend {
    ggml_guid_t guid;
    backend_functions iface;
    ggml_backend_dev_t device;
    void * context;
};

struct device_functions {
    const char * (*get_name)(ggml_backend_dev_t);
    const char * (*get_description)(ggml_backend_dev_t);
    void (*get_memory)(ggml_backend_dev_t, size_t * free, size_t * total);
    enum ggml_backend_dev_type (*get_type)(ggml_backend_dev_t);
    void (*get_props)(ggml_backend_dev_t, ggml_backend_dev_props *);
    ggml_backend_t (*init_backend)(ggml_backend_dev_t, const char * params);
    ggml_backend_buffer_type_t (*get_buffer_type)(ggml_backend_dev_t);
    ggml_backend_buffer_type_t (*get_host_buffer_type)(ggml_backend_dev_t);
    ggml_backend_buffer_t (*buffer_from_host_ptr)(ggml_backend_dev_t, void * data, size_t size, size_t max_tensor_size);
    bool (*supports_op)(ggml_backend_dev_t, const ggml_tensor *);
    bool (*supports_buft)(ggml_backend_dev_t, ggml_backend_buffer_type_t);
    bool (*offload_op)(ggml_backend_dev_t, const ggml_tensor *);
    ggml_backend_event_t (*event_new)(ggml_backend_dev_t);
    void (*event_free)(ggml_backend_dev_t, ggml_backend_event_t);
    void (*event_synchronize)(ggml_backend_dev_t, ggml_backend_event_t);
};

struct device {
    device_functions iface;
    ggml_backend_reg_t reg;
    void * context;
};

struct registry_functions {
    const char * (*get_name)(ggml_backend_reg_t);
    size_t (*get_device_count)(ggml_backend_reg_t);
    ggml_backend_dev_t (*get_device)(ggml_backend_reg_t, size_t index);
    void * (*get_proc_address)(ggml_backend_reg_t, const char * name);
};

struct registry {
    int api_version;
    registry_functions iface;
    void * context;
};

inline buffer * of(ggml_backend_buffer_t one) {
    return reinterpret_cast<buffer *>(one);
}
inline backend * of(ggml_backend_t one) {
    return reinterpret_cast<backend *>(one);
}
inline device * of(ggml_backend_dev_t one) {
    return reinterpret_cast<device *>(one);
}
inline registry * of(ggml_backend_reg_t one) {
    return reinterpret_cast<registry *>(one);
}

} // namespace hybrimoe::tables
