// Graphs made node by node, without ggml: what the matcher and the reader of blocks look at.
#pragma once

#include "ggml.h"

#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace graph_by_hand {

constexpr int64_t n_embd   = 64;
constexpr int64_t n_ff     = 32;
constexpr int64_t n_expert = 8;
constexpr int64_t top_k    = 2;

// Nodes in the order in which they are made; inputs are kept too but are no nodes.
class graph {
public:
    ggml_tensor * input(const std::string & name, int64_t a, int64_t b = 1, int64_t c = 1) {
        return make(GGML_OP_NONE, name, {a, b, c}, {});
    }

    ggml_tensor * node(ggml_op op, std::vector<int64_t> ne, std::vector<ggml_tensor *> src) {
        nodes.push_back(make(op, "", std::move(ne), src));
        return nodes.back();
    }

    ggml_tensor * ids(ggml_tensor * scores, int64_t n_tokens) {
        ggml_tensor * sorted = node(GGML_OP_ARGSORT, {n_expert, n_tokens}, {scores});
        sorted->type         = GGML_TYPE_I32;
        ggml_tensor * top    = node(GGML_OP_VIEW, {top_k, n_tokens}, {sorted});
        top->type            = GGML_TYPE_I32;
        top->view_src        = sorted;
        return top;
    }

    ggml_tensor * experts(int layer, const char * part, int64_t n_in, int64_t n_out, ggml_tensor * x,
                          ggml_tensor * ids) {
        char name[64];
        std::snprintf(name, sizeof(name), "blk.%d.ffn_%s_exps.weight", layer, part);
        return node(GGML_OP_MUL_MAT_ID, {n_out, ids->ne[0], ids->ne[1]}, {input(name, n_in, n_out, n_expert), x, ids});
    }

    std::vector<ggml_tensor *> nodes;

private:
    ggml_tensor * make(ggml_op op, const std::string & name, std::vector<int64_t> ne,
                       const std::vector<ggml_tensor *> & src) {
        auto made  = std::make_unique<ggml_tensor>();
        *made      = {};
        made->type = GGML_TYPE_F32;
        made->op   = op;
        ne.resize(GGML_MAX_DIMS, 1);
        size_t stride = sizeof(float);
        for (int i = 0; i < GGML_MAX_DIMS; i++) {
            made->ne[i] = ne[static_cast<size_t>(i)];
            made->nb[i] = stride;
            stride *= static_cast<size_t>(made->ne[i]);
        }
        for (size_t i = 0; i < src.size(); i++) {
            made->src[i] = src[i];
        }
        std::snprintf(made->name, sizeof(made->name), "%s", name.c_str());
        all_.push_back(std::move(made));
        return all_.back().get();
    }

    std::vector<std::unique_ptr<ggml_tensor>> all_;
};

} // namespace graph_by_hand
