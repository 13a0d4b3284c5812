#include "small_model.h"

#include <cmath>
#include <cstring>
#include <new>

namespace small_model {

namespace {

hybrimoe::context_ptr make_context(size_t n_bytes) {
    ggml_init_params params{};
    params.mem_size = n_bytes;
    hybrimoe::context_ptr context(ggml_init(params));
    if (context == nullptr) {
        throw std::bad_alloc();
    }
    return context;
}

} // namespace

model::model(const shape & of, uint64_t seed) : shape_(of), rng_(seed) {
    const auto numbers =
        static_cast<size_t>(of.n_layers) * static_cast<size_t>(of.n_expert * (3 * of.n_embd * of.n_ff + 4 * of.n_ff));
    context_ = make_context(numbers * sizeof(float) + (1 << 20));
    for (int il = 0; il < of.n_layers; il++) {
        layer_weights w;
        w.router = random_tensor(GGML_TYPE_F32, il, "gate_inp", of.n_embd, of.n_expert, 1);
        if (of.is_merged) {
            w.gate = random_tensor(of.type, il, "gate_up_exps", of.n_embd, 2 * of.n_ff, of.n_expert);
        } else {
            w.gate = random_tensor(of.type, il, "gate_exps", of.n_embd, of.n_ff, of.n_expert);
            w.up   = random_tensor(of.type, il, "up_exps", of.n_embd, of.n_ff, of.n_expert);
        }
        w.down = random_tensor(of.type, il, "down_exps", of.n_ff, of.n_embd, of.n_expert);
        if (of.has_biases) {
            w.gate_bias = random_tensor(GGML_TYPE_F32, il, "gate_exps.bias", of.n_ff, of.n_expert, 1);
            w.up_bias   = random_tensor(GGML_TYPE_F32, il, "up_exps.bias", of.n_ff, of.n_expert, 1);
            w.down_bias = random_tensor(GGML_TYPE_F32, il, "down_exps.bias", of.n_embd, of.n_expert, 1);
        }
        layers_.push_back(w);
    }
}

ggml_tensor * model::random_tensor(ggml_type type, int layer, const char * part, int64_t ne0, int64_t ne1,
                                   int64_t ne2) {
    ggml_tensor * t = ggml_new_tensor_3d(context_.get(), type, ne0, ne1, ne2);
    ggml_set_name(t, ("blk." + std::to_string(layer) + ".ffn_" + part + ".weight").c_str());
    std::normal_distribution<float> normal(0.0f, 1.0f / std::sqrt(static_cast<float>(ne0)));
    std::vector<float> values(static_cast<size_t>(ggml_nelements(t)));
    for (float & v : values) {
        v = normal(rng_);
    }
    ggml_quantize_chunk(type, values.data(), t->data, 0, ne1 * ne2, ne0, nullptr);
    return t;
}

model::pass model::build(int layer, const std::vector<float> & x) const {
    const layer_weights & w = layers_[static_cast<size_t>(layer)];
    const int64_t n_tokens  = static_cast<int64_t>(x.size()) / shape_.n_embd;
    const int64_t top_k     = shape_.top_k;
    const auto wide         = static_cast<size_t>(n_tokens * top_k * (2 * shape_.n_ff + shape_.n_embd));
    pass out;
    out.context            = make_context((1 << 20) + 8 * wide * sizeof(float));
    ggml_context * context = out.context.get();
    ggml_tensor * input    = ggml_new_tensor_2d(context, GGML_TYPE_F32, shape_.n_embd, n_tokens);
    std::memcpy(input->data, x.data(), x.size() * sizeof(float));

    ggml_tensor * probs   = ggml_soft_max(context, ggml_mul_mat(context, w.router, input));
    ggml_tensor * order   = ggml_argsort(context, probs, GGML_SORT_ORDER_DESC);
    ggml_tensor * ids     = ggml_view_2d(context, order, top_k, n_tokens, order->nb[1], 0);
    ggml_tensor * weights = ggml_get_rows(context, ggml_reshape_3d(context, probs, 1, shape_.n_expert, n_tokens), ids);
    ggml_tensor * pairs   = ggml_reshape_3d(context, input, shape_.n_embd, 1, n_tokens);
    const auto linear     = [&](ggml_tensor * weight, ggml_tensor * bias, ggml_tensor * from) {
        ggml_tensor * rows = ggml_mul_mat_id(context, weight, from, ids);
        return bias == nullptr ? rows : ggml_add_id(context, rows, bias, ids);
    };
    ggml_tensor * hidden = nullptr;
    if (shape_.is_merged) {
        ggml_tensor * both = linear(w.gate, nullptr, pairs);
        const auto half    = [&](size_t offset) {
            return ggml_view_3d(context, both, shape_.n_ff, top_k, n_tokens, both->nb[1], both->nb[2], offset);
        };
        hidden = ggml_swiglu_split(context, half(0), half(static_cast<size_t>(shape_.n_ff) * sizeof(float)));
    } else {
        ggml_tensor * up   = linear(w.up, w.up_bias, pairs);
        ggml_tensor * gate = linear(w.gate, w.gate_bias, pairs);
        hidden             = ggml_swiglu_split(context, gate, up);
    }
    ggml_tensor * rows = ggml_mul(context, linear(w.down, w.down_bias, hidden), weights);
    out.graph          = ggml_new_graph_custom(context, 256, false);
    // In llama.cpp's order: the router with its weights, the experts, views of their rows, the sum.
    std::vector<ggml_tensor *> of_k;
    ggml_build_forward_expand(out.graph, weights);
    ggml_build_forward_expand(out.graph, rows);
    for (int64_t k = 0; k < top_k; k++) {
        of_k.push_back(
            ggml_view_2d(context, rows, shape_.n_embd, n_tokens, rows->nb[2], static_cast<size_t>(k) * rows->nb[1]));
        ggml_build_forward_expand(out.graph, of_k.back());
    }
    out.y = of_k[0];
    for (size_t k = 1; k < of_k.size(); k++) {
        out.y = ggml_add(context, out.y, of_k[k]);
        ggml_build_forward_expand(out.graph, out.y);
    }
    return out;
}

std::string settings_json(const std::string & more) {
    const std::string base =
        "{\"cpu_kernels\": \"ggml\", \"devices\": [\"CPU\"], \"expert_cache\": 3, \"guard\": false,"
        " \"live_costs\": false, \"log_to_stderr\": false, \"admission\": \"always\","
        " \"costs\": {\"cpu_us\": 1000, \"gpu_us\": 1, \"copy_us\": 10}";
    // A key that comes twice: the last one counts.
    return base + (more.empty() ? "" : ", " + more) + "}";
}

} // namespace small_model
