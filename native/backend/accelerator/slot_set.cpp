#include "accelerator/slot_set.h"

#include <stdexcept>

namespace hybrimoe {

namespace {

context_ptr make_tensors(const expert_layout & layout, int n_slots,
                         std::array<ggml_tensor *, max_expert_parts> & tensors) {
    if (layout.parts.size() > max_expert_parts) {
        throw std::logic_error("an expert has more parts than slots can hold");
    }
    ggml_init_params params{};
    params.mem_size = ggml_tensor_overhead() * layout.parts.size();
    params.no_alloc = true;
    context_ptr context(ggml_init(params));
    if (context == nullptr) {
        throw std::bad_alloc();
    }
    for (size_t i = 0; i < layout.parts.size(); i++) {
        const expert_part & part = layout.parts[i];
        tensors[i] = part.is_matrix() ? ggml_new_tensor_3d(context.get(), part.type, part.n_in, part.n_out, n_slots)
                                      : ggml_new_tensor_2d(context.get(), part.type, part.n_in, n_slots);
    }
    return context;
}

} // namespace

size_t slot_set::needed_bytes(const device_port & port, const expert_layout & layout, int n_slots) {
    std::array<ggml_tensor *, max_expert_parts> tensors{};
    const context_ptr context = make_tensors(layout, n_slots, tensors);
    size_t sum                = 0;
    for (size_t i = 0; i < layout.parts.size(); i++) {
        sum += port.alloc_size(tensors[i]);
    }
    return sum;
}

bool slot_set::allocate(device_port & port, const expert_layout & layout, int n_slots, bool with_zero) {
    release();
    if (n_slots == 0) {
        return true;
    }
    context_ptr context = make_tensors(layout, n_slots + (with_zero ? 1 : 0), tensors_);
    size_t sum          = 0;
    for (size_t i = 0; i < layout.parts.size(); i++) {
        sum += port.alloc_size(tensors_[i]);
    }
    buffer_ptr buffer = port.allocate(sum);
    if (buffer == nullptr) {
        return false;
    }
    // Kernels may read the padding behind quantised rows: it must hold zeros, not what was there.
    ggml_backend_buffer_clear(buffer.get(), 0);
    ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    auto * at = static_cast<char *>(ggml_backend_buffer_get_base(buffer.get()));
    for (size_t i = 0; i < layout.parts.size(); i++) {
        if (ggml_backend_tensor_alloc(buffer.get(), tensors_[i], at) != GGML_STATUS_SUCCESS) {
            return false;
        }
        at += port.alloc_size(tensors_[i]);
    }
    context_ = std::move(context);
    buffer_  = std::move(buffer);
    n_slots_ = n_slots;
    return true;
}

void slot_set::release() {
    buffer_.reset();
    context_.reset();
    tensors_ = {};
    n_slots_ = 0;
    generation_++;
}

} // namespace hybrimoe
