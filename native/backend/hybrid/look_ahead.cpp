#include "hybrid/look_ahead.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace hybrimoe {

namespace {

uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return static_cast<uint16_t>((bits >> 16) | 64u); // a NaN stays one
    }
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

float read_value(const ggml_tensor * w, const char * data, int64_t row, int64_t column) {
    const char * at = data + static_cast<size_t>(row) * w->nb[1];
    switch (w->type) {
    case GGML_TYPE_F32:
        return reinterpret_cast<const float *>(at)[column];
    case GGML_TYPE_F16:
        return ggml_fp16_to_fp32(reinterpret_cast<const ggml_fp16_t *>(at)[column]);
    default:
        return ggml_bf16_to_fp32(reinterpret_cast<const ggml_bf16_t *>(at)[column]);
    }
}

} // namespace

void look_ahead_routers::load(const layer_book & book) {
    routers_.assign(static_cast<size_t>(book.n_layers()), {});
    guesses_.assign(static_cast<size_t>(book.n_layers()) * max_lookahead, {});
    for (int layer = 0; layer < book.n_layers(); layer++) {
        const known_layer & known = book.layer(layer);
        const ggml_tensor * w     = known.router;
        const bool readable =
            w != nullptr && (w->type == GGML_TYPE_F32 || w->type == GGML_TYPE_F16 || w->type == GGML_TYPE_BF16);
        if (!readable || w->ne[1] != known.layout.n_expert || w->ne[0] != known.layout.n_embd) {
            continue;
        }
        const bool is_here = w->buffer == nullptr || ggml_backend_buffer_is_host(w->buffer);
        std::vector<char> copy(is_here ? 0 : ggml_nbytes(w));
        if (!is_here) {
            ggml_backend_tensor_get(w, copy.data(), 0, copy.size());
        }
        const char * data = is_here ? static_cast<const char *>(w->data) : copy.data();
        router & out      = routers_[static_cast<size_t>(layer)];
        out.n_embd        = w->ne[0];
        out.n_expert      = w->ne[1];
        out.rows.resize(static_cast<size_t>(out.n_embd * out.n_expert));
        for (int64_t row = 0; row < out.n_expert; row++) {
            for (int64_t i = 0; i < out.n_embd; i++) {
                out.rows[static_cast<size_t>(row * out.n_embd + i)] = to_bf16(read_value(w, data, row, i));
            }
        }
    }
}

void look_ahead_routers::begin(int layer, int distance, const float * x, size_t x_token_bytes, int64_t n_tokens) {
    layer_         = layer;
    n_distances_   = std::min({distance, max_lookahead, static_cast<int>(routers_.size()) - 1 - layer});
    x_             = x;
    x_token_bytes_ = x_token_bytes;
    n_tokens_      = n_tokens;
    for (int d = 1; d <= n_distances_; d++) {
        const router & next = routers_[static_cast<size_t>(layer + d)];
        logits_[d].resize(static_cast<size_t>(next.n_expert * n_tokens));
    }
}

void look_ahead_routers::compute(const kernels::kernel_set * set, int thread, int n_threads) {
    for (int d = 1; d <= n_distances_; d++) {
        const router & next = routers_[static_cast<size_t>(layer_ + d)];
        const int64_t begin = next.n_expert * thread / n_threads;
        const int64_t end   = next.n_expert * (thread + 1) / n_threads;
        for (int64_t t = 0; t < n_tokens_ && begin < end; t++) {
            const auto * x = reinterpret_cast<const float *>(reinterpret_cast<const char *>(x_) +
                                                             static_cast<size_t>(t) * x_token_bytes_);
            kernels::router_rows(set, kernels::type_bf16, next.rows.data(),
                                 static_cast<size_t>(next.n_embd) * sizeof(uint16_t), next.n_embd, x,
                                 logits_[d].data() + t * next.n_expert, begin, end);
        }
    }
}

const float * look_ahead_routers::scores(int distance) {
    if (distance < 1 || distance > n_distances_) {
        return nullptr;
    }
    const router & next = routers_[static_cast<size_t>(layer_ + distance)];
    if (next.rows.empty()) {
        return nullptr;
    }
    const auto n                = static_cast<size_t>(next.n_expert);
    std::vector<float> & scores = scores_[distance];
    scores.assign(n, 0.0f);
    for (int64_t t = 0; t < n_tokens_; t++) {
        float * p        = logits_[distance].data() + static_cast<size_t>(t) * n;
        const float most = *std::max_element(p, p + n);
        float sum        = 0.0f;
        for (size_t e = 0; e < n; e++) {
            p[e] = std::exp(p[e] - most);
            sum += p[e];
        }
        for (size_t e = 0; e < n; e++) {
            scores[e] += p[e] / sum;
        }
    }
    // What a perfect prefetcher would have taken from these scores; compared when the layer's own router has spoken.
    const auto at = static_cast<size_t>((layer_ + distance) * max_lookahead + distance - 1);
    order_.resize(n);
    std::iota(order_.begin(), order_.end(), 0);
    const size_t keep = std::min<size_t>(n, 32);
    std::partial_sort(
        order_.begin(), order_.begin() + static_cast<std::ptrdiff_t>(keep), order_.end(),
        [&](int32_t a, int32_t b) { return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)]; });
    guesses_[at].assign(order_.begin(), order_.begin() + static_cast<std::ptrdiff_t>(keep));
    return scores.data();
}

void look_ahead_routers::check(int layer, const int32_t * active, size_t n_active, int top_k) {
    for (int d = 1; d <= max_lookahead; d++) {
        std::vector<int32_t> & guess = guesses_[static_cast<size_t>(layer * max_lookahead + d - 1)];
        if (guess.empty()) {
            continue;
        }
        const size_t n = std::min(guess.size(), std::max(n_active, static_cast<size_t>(top_k)));
        n_predicted_[d] += static_cast<int64_t>(n_active);
        n_right_[d] += std::count_if(active, active + n_active, [&](int32_t e) {
            return std::find(guess.begin(), guess.begin() + static_cast<std::ptrdiff_t>(n), e) !=
                   guess.begin() + static_cast<std::ptrdiff_t>(n);
        });
        guess.clear();
    }
}

} // namespace hybrimoe
