// The model's MoE layers, learnt from the graphs of the first pass: no file is read and no architecture is known by
// name. A layer is known again by the address of its experts.
#pragma once

#include "accelerator/expert_layout.h"
#include "describe.h"
#include "match.h"

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

namespace hybrimoe {

struct known_layer {
    int llama_layer = 0; // llama.cpp's index
    int cls         = 0; // layers of one class have experts of the same types and shapes
    int32_t top_k   = 0;
    expert_layout layout;
    kernels::moe_layer kernel_layer;
    const ggml_tensor * router = nullptr; // weight [n_embd, n_expert], or null when it runs elsewhere
};

class layer_book {
public:
    // The number of the block's layer, counted in the order of execution; -1 for experts that cannot be moved. A layer
    // that is met for the first time is entered, unless the book is closed; its top_k is the smallest that was asked
    // for.
    int find(const moe_block & block, const described_block & described);
    bool is_known(const described_block & described) const;
    const known_layer * find(const described_block & described) const;
    // Whether some layer has only been asked for all of its experts: by a warm-up, or the model is like that.
    bool may_be_warm_up() const;
    void close() { closed_ = true; }

    int n_layers() const { return static_cast<int>(layers_.size()); }
    int n_classes() const { return n_classes_; }
    const known_layer & layer(int index) const { return *layers_[static_cast<size_t>(index)]; }
    int32_t max_experts() const;
    int32_t max_top_k() const;
    // Any layer of the class.
    const known_layer & of_class(int cls) const;

private:
    std::vector<std::unique_ptr<known_layer>> layers_; // by pointer: copies under way refer to layouts
    std::unordered_map<const void *, int> by_experts_;
    int n_classes_ = 0;
    bool closed_   = false;
};

} // namespace hybrimoe
