// A few MoE layers with random weights, as graphs like those that llama.cpp hands over, one for each layer and pass.
#pragma once

#include "accelerator/device_port.h"

#include "ggml.h"

#include <cstdint>
#include <random>
#include <string>
#include <vector>

namespace small_model {

struct shape {
    ggml_type type  = GGML_TYPE_F32; // of the experts' matrices
    bool is_merged  = false;         // gate and up in one tensor
    bool has_biases = false;
    int n_layers    = 3;
    int n_expert    = 8;
    int top_k       = 2;
    int n_embd      = 64;
    int n_ff        = 96;
};

class model {
public:
    model(const shape & of, uint64_t seed);

    const shape & of() const { return shape_; }
    // y [n_embd, n_tokens] of the layer for x of the same shape, by whoever computes graphs: `compute` is called with
    // the graph, whose tensors lie in host memory.
    template <class computer>
    std::vector<float> forward(int layer, const std::vector<float> & x, const computer & compute) const {
        pass one = build(layer, x);
        compute(one.graph);
        const auto * y = static_cast<const float *>(one.y->data);
        return std::vector<float>(y, y + x.size());
    }

private:
    struct layer_weights {
        ggml_tensor *router = nullptr, *gate = nullptr, *up = nullptr, *down = nullptr;
        ggml_tensor *gate_bias = nullptr, *up_bias = nullptr, *down_bias = nullptr;
    };
    struct pass {
        hybrimoe::context_ptr context;
        ggml_cgraph * graph = nullptr;
        ggml_tensor * y     = nullptr;
    };

    ggml_tensor * random_tensor(ggml_type type, int layer, const char * part, int64_t ne0, int64_t ne1, int64_t ne2);
    pass build(int layer, const std::vector<float> & x) const;

    shape shape_;
    std::mt19937_64 rng_;
    hybrimoe::context_ptr context_;
    std::vector<layer_weights> layers_;
};

// Settings that force the work onto a CPU device that stands in for an accelerator, but for what `more` says
// (`"key": value, ...`).
std::string settings_json(const std::string & more);

} // namespace small_model
