#include "hybrid/layer_book.h"

#include <algorithm>

namespace hybrimoe {

bool layer_book::is_known(const described_block & described) const {
    return by_experts_.count(described.layer.down.data) != 0;
}

const known_layer * layer_book::find(const described_block & described) const {
    const auto found = by_experts_.find(described.layer.down.data);
    return found == by_experts_.end() || found->second < 0 ? nullptr : &layer(found->second);
}

int layer_book::find(const moe_block & block, const described_block & described) {
    const void * identity = described.layer.down.data;
    const auto found      = by_experts_.find(identity);
    if (found != by_experts_.end()) {
        if (found->second >= 0) {
            int32_t & top_k = layers_[static_cast<size_t>(found->second)]->top_k;
            top_k           = std::min(top_k, static_cast<int32_t>(block.top_k()));
        }
        return found->second;
    }
    if (closed_) {
        return -1;
    }
    std::optional<expert_layout> layout = make_layout(described.layer);
    if (!layout) {
        by_experts_.emplace(identity, -1);
        return -1;
    }
    auto made          = std::make_unique<known_layer>();
    made->llama_layer  = block.layer;
    made->top_k        = static_cast<int32_t>(block.top_k());
    made->layout       = std::move(*layout);
    made->kernel_layer = described.layer;
    made->router       = block.router;
    made->cls          = n_classes_;
    for (const auto & other : layers_) {
        if (other->layout.same_class(made->layout)) {
            made->cls = other->cls;
            break;
        }
    }
    n_classes_      = std::max(n_classes_, made->cls + 1);
    const int index = n_layers();
    by_experts_.emplace(identity, index);
    layers_.push_back(std::move(made));
    return index;
}

bool layer_book::may_be_warm_up() const {
    return std::any_of(layers_.begin(), layers_.end(),
                       [](const auto & one) { return one->top_k >= one->layout.n_expert; });
}

int32_t layer_book::max_experts() const {
    int32_t n = 0;
    for (const auto & one : layers_) {
        n = std::max(n, one->layout.n_expert);
    }
    return n;
}

int32_t layer_book::max_top_k() const {
    int32_t n = 0;
    for (const auto & one : layers_) {
        n = std::max(n, one->top_k);
    }
    return n;
}

const known_layer & layer_book::of_class(int cls) const {
    return **std::find_if(layers_.begin(), layers_.end(), [cls](const auto & one) { return one->cls == cls; });
}

} // namespace hybrimoe
