// What all contexts of one model share on one device: the caches, the plans, and the CPU's kernels. It lives as long as
// one of the contexts, so nothing of it outlives the model's weights.
#pragma once

#include "counters.h"
#include "describe.h"
#include "dispatch.h"

#include "ggml-backend.h"

#include <memory>
#include <mutex>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace hybrimoe {

// Biases and scales that lie on a device, copied to the host when they are met.
class host_copies : public small_weights {
public:
    const float * of(const ggml_tensor * weight) override;

private:
    std::unordered_map<const ggml_tensor *, std::vector<float>> copies_;
};

struct expert_core {
    expert_core(instance_ticket ticket, ggml_backend_dev_t inner);
    ~expert_core();
    expert_core(const expert_core &)             = delete;
    expert_core & operator=(const expert_core &) = delete;

    // The core that has met these experts (the data of a layer's weights) on the device before, or a new one.
    static std::shared_ptr<expert_core> find(ggml_backend_dev_t inner, const void * experts);

    const ggml_backend_dev_t inner;
    const uint64_t id;
    std::mutex mutex; // one graph at a time; guards what follows
    std::unordered_set<const void *> experts;
    host_copies copies;
    dispatcher dispatch;
    ggml_backend_t last = nullptr; // whose graph may still be running; of the last one's caller
};

} // namespace hybrimoe
