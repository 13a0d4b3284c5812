// Applies the routers of the next layers to this layer's gate input (HybriMoE sec. IV-C): compact bf16 copies of the
// router weights, read by all threads of the team.
#pragma once

#include "core/types.h"
#include "hybrid/layer_book.h"
#include "kernels/moe_kernels.h"

#include <cstdint>
#include <vector>

namespace hybrimoe {

class look_ahead_routers {
public:
    // Copies the routers; layers without one of a float type have no prediction.
    void load(const layer_book & book);

    // Before the team runs: layers layer + 1 .. layer + distance will be predicted for x [n_embd, n_tokens].
    void begin(int layer, int distance, const float * x, size_t x_token_bytes, int64_t n_tokens);
    void none() { n_distances_ = 0; }
    // Every thread of the team, its share of the rows.
    void compute(const kernels::kernel_set * set, int thread, int n_threads);
    // Probabilities of the experts of layer + distance, summed over tokens, [n_expert]; null where there are none.
    const float * scores(int distance);

    // The recall of earlier predictions, when the layer's experts are known.
    void check(int layer, const int32_t * active, size_t n_active, int top_k);
    int64_t n_predicted(int distance) const { return n_predicted_[distance]; }
    int64_t n_right(int distance) const { return n_right_[distance]; }

private:
    struct router {
        std::vector<uint16_t> rows; // bf16 [n_expert, n_embd]
        int64_t n_embd   = 0;
        int64_t n_expert = 0;
    };

    std::vector<router> routers_; // per layer
    int layer_ = 0, n_distances_ = 0;
    const float * x_      = nullptr;
    size_t x_token_bytes_ = 0;
    int64_t n_tokens_     = 0;
    std::vector<float> logits_[max_lookahead + 1]; // [n_tokens, n_expert]
    std::vector<float> scores_[max_lookahead + 1];
    // guesses_[layer * max_lookahead + distance - 1]: the best experts predicted for that layer
    std::vector<std::vector<int32_t>> guesses_;
    std::vector<int32_t> order_;
    int64_t n_predicted_[max_lookahead + 1] = {};
    int64_t n_right_[max_lookahead + 1]     = {};
};

} // namespace hybrimoe
