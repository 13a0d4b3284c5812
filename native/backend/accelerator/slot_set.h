// Slots on a device for experts of one layer class: one tensor per part, [.., n_slots], in one buffer.
#pragma once

#include "accelerator/device_port.h"
#include "accelerator/expert_layout.h"

#include <array>
#include <vector>

namespace hybrimoe {

constexpr size_t max_expert_parts = 6;

class slot_set {
public:
    // Device bytes that n_slots slots need.
    static size_t needed_bytes(const device_port & port, const expert_layout & layout, int n_slots);

    // Replaces what there was. False when the device has not enough memory: then there are no slots. `with_zero`: one
    // more slot, all of it zero for ever, for pairs that somebody else computes.
    bool allocate(device_port & port, const expert_layout & layout, int n_slots, bool with_zero = false);
    void release();

    int n_slots() const { return n_slots_; }
    int zero_slot() const { return n_slots_; } // where there is one
    size_t n_bytes() const { return buffer_ == nullptr ? 0 : ggml_backend_buffer_get_size(buffer_.get()); }
    // The tensor of layout.parts[i].
    ggml_tensor * part(size_t i) const { return tensors_[i]; }
    // Raised whenever the tensors are others than before: graphs that hold the old ones are void.
    uint64_t generation() const { return generation_; }

private:
    context_ptr context_;
    buffer_ptr buffer_;
    std::array<ggml_tensor *, max_expert_parts> tensors_{};
    int n_slots_         = 0;
    uint64_t generation_ = 0;
};

} // namespace hybrimoe
