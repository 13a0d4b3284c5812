// Times copies and expert batches on any ggml device, as the dispatcher drives it: one instance computes, one copies,
// slot tensors stay where they are, MUL_MAT_ID takes slot numbers.
#pragma once

#include "hybrimoe_probe.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <cstdint>
#include <memory>
#include <vector>

namespace hybrimoe::probe {

class device_probe {
public:
    // Throws std::invalid_argument, std::runtime_error (the device cannot be started or lacks an operation).
    device_probe(int device, const hybrimoe_ffn_shape & shape);
    ~device_probe();
    device_probe(const device_probe &)             = delete;
    device_probe & operator=(const device_probe &) = delete;

    bool has(int kind) const;
    void copy(int kind, size_t n_bytes, int n_runs, double * us);
    void sync(int n_runs, double * us);
    void run(int n_active, int n_tokens, int n_runs, double * us);
    // Returns bytes read per microsecond; `copied` is bytes copied per microsecond.
    double together(int n_threads, size_t n_bytes, double seconds, double * copied);

private:
    struct graph;

    ggml_tensor * slot_tensor(ggml_type type, int64_t n_in, int64_t n_out);
    void fill(ggml_tensor * tensor);
    std::unique_ptr<graph> make_graph(int n_active, int n_tokens);

    hybrimoe_ffn_shape shape_;
    ggml_backend_dev_t device_;
    ggml_backend_t compute_ = nullptr, copies_ = nullptr;
    ggml_context * context_       = nullptr;
    ggml_backend_buffer_t slots_  = nullptr;
    ggml_backend_buffer_t pinned_ = nullptr;
    ggml_tensor *gate_ = nullptr, *up_ = nullptr, *down_ = nullptr;
    std::vector<uint8_t> pageable_;
    size_t n_copy_bytes_ = 0;
    int next_slot_       = 0;
};

} // namespace hybrimoe::probe
