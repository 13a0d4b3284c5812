// When each expert is used next, for the offline oracles.
#pragma once

#include "eviction_policy.h"

#include <vector>

namespace hybrimoe {

class future_index {
public:
    static constexpr int64_t never = INT64_MAX;

    explicit future_index(const model_shape & shape) : shape_(shape) {}

    status set(const future_trace & trace);
    // The layer's next step begins: the uses it names are now past.
    void advance(int layer);

    // Position of the next use, in layers run since the start; never: not again.
    int64_t next_use(int key) const { return next_[static_cast<size_t>(key)]; }
    int64_t now() const { return now_; }

private:
    struct use {
        int32_t key;
        int64_t next; // position of the use after this one
    };

    model_shape shape_;
    std::vector<int64_t> next_;
    std::vector<std::vector<use>> uses_;      // per layer, top_k per step
    std::vector<std::vector<int64_t>> steps_; // per layer, position of each step
    std::vector<size_t> cursor_;              // per layer
    int64_t now_ = 0;
};

} // namespace hybrimoe
