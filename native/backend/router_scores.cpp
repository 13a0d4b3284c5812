#include "router_scores.h"

#include <algorithm>
#include <cmath>

namespace hybrimoe {

router_scores find_scores(ggml_tensor ** nodes, const moe_block & block) {
    router_scores found;
    for (int i = block.begin; i < block.experts; i++) {
        const ggml_tensor * t = nodes[i];
        const bool one_each = t->type == GGML_TYPE_F32 && t->ne[0] == block.n_expert && t->ne[1] == block.n_tokens() &&
                              ggml_is_contiguous(t);
        if (!one_each) {
            continue;
        }
        if (t->op == GGML_OP_SOFT_MAX || (t->op == GGML_OP_UNARY && ggml_get_unary_op(t) == GGML_UNARY_OP_SIGMOID)) {
            return {t, i, false};
        }
        if (t->op == GGML_OP_MUL_MAT) {
            found = {t, i, true};
        }
    }
    return found;
}

void take_scores(const router_scores & scores, std::vector<float> & out) {
    take_scores(scores, static_cast<const float *>(scores.tensor->data), out);
}

void take_scores(const router_scores & scores, const float * values, std::vector<float> & out) {
    const ggml_tensor * t = scores.tensor;
    out.assign(values, values + ggml_nelements(t));
    for (int64_t row = 0; scores.is_logits && row < t->ne[1]; row++) {
        float * p        = out.data() + row * t->ne[0];
        const float most = *std::max_element(p, p + t->ne[0]);
        float sum        = 0.0f;
        for (int64_t i = 0; i < t->ne[0]; i++) {
            p[i] = std::exp(p[i] - most);
            sum += p[i];
        }
        for (int64_t i = 0; i < t->ne[0]; i++) {
            p[i] /= sum;
        }
    }
}

} // namespace hybrimoe
