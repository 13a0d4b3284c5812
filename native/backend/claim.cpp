#include "claim.h"

#include <algorithm>
#include <cstring>

namespace hybrimoe {

namespace {

// Where a tensor's value comes from, in rising order of rank: an operation takes the highest rank among its inputs.
enum class origin { foreign, weight, router, expert };

// Grouped routing visits the scores several times; real blocks need a few hundred visits.
constexpr int max_visits = 4096;

bool is_view(const ggml_tensor * t) {
    return t->op == GGML_OP_RESHAPE || t->op == GGML_OP_VIEW || t->op == GGML_OP_PERMUTE || t->op == GGML_OP_TRANSPOSE;
}

bool is_block_op(ggml_op op) {
    switch (op) {
    case GGML_OP_ADD:
    case GGML_OP_ADD_ID:
    case GGML_OP_ARGSORT:
    case GGML_OP_CLAMP:
    case GGML_OP_CONT:
    case GGML_OP_CPY:
    case GGML_OP_DIV:
    case GGML_OP_FILL:
    case GGML_OP_GET_ROWS:
    case GGML_OP_GLU:
    case GGML_OP_MUL:
    case GGML_OP_REPEAT:
    case GGML_OP_SCALE:
    case GGML_OP_SET_ROWS:
    case GGML_OP_SOFT_MAX:
    case GGML_OP_SQR:
    case GGML_OP_SQRT:
    case GGML_OP_SUM_ROWS:
    case GGML_OP_TOP_K:
    case GGML_OP_UNARY:
        return true;
    default:
        return false;
    }
}

class tracer {
public:
    explicit tracer(ggml_backend_buffer_type_t own_buffer_type) : own_(own_buffer_type) {}

    bool in_own_buffer(const ggml_tensor * t) const {
        return t->buffer != nullptr && ggml_backend_buffer_get_type(t->buffer) == own_;
    }

    bool is_router(const ggml_tensor * weight) const {
        // With the dot: "ffn_gate_inp_shexp" is the gate of the shared expert, which is dense.
        return in_own_buffer(weight) && std::strstr(weight->name, "ffn_gate_inp.") != nullptr;
    }

    origin trace(const ggml_tensor * t) {
        if (++n_visits_ > max_visits) {
            return origin::foreign;
        }
        if (is_view(t)) {
            return trace(t->src[0]);
        }
        if (t->op == GGML_OP_NONE) {
            return trace_leaf(t);
        }
        if (t->op == GGML_OP_MUL_MAT) {
            return is_router(t->src[0]) ? origin::router : origin::foreign;
        }
        if (t->op == GGML_OP_MUL_MAT_ID) {
            return in_own_buffer(t->src[0]) ? origin::expert : origin::foreign;
        }
        if (is_weighting(t) && trace(t->src[0]) == origin::expert) {
            return origin::expert;
        }
        return is_block_op(t->op) ? trace_inputs(t) : origin::foreign;
    }

private:
    // One factor per (token, expert) pair, [1, top_k, n_tokens]: a router weight, also when the router runs elsewhere.
    static bool is_weighting(const ggml_tensor * t) {
        const ggml_tensor * factor = t->src[1];
        return t->op == GGML_OP_MUL && factor->ne[0] == 1 && t->ne[0] > 1 && factor->ne[1] == t->ne[1] &&
               factor->ne[2] == t->ne[2];
    }

    static origin trace_leaf(const ggml_tensor * t) {
        const bool is_weight = t->buffer != nullptr && ggml_backend_buffer_is_host(t->buffer) &&
                               ggml_backend_buffer_get_usage(t->buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS;
        return is_weight ? origin::weight : origin::foreign;
    }

    origin trace_inputs(const ggml_tensor * t) {
        origin highest = origin::weight;
        for (const ggml_tensor * src : t->src) {
            if (src == nullptr) {
                continue;
            }
            const origin one = trace(src);
            if (one == origin::foreign) {
                return origin::foreign;
            }
            highest = std::max(highest, one);
        }
        return highest;
    }

    ggml_backend_buffer_type_t own_;
    int n_visits_ = 0;
};

// Per-expert scales repeated over tokens. Such a node is only ever assigned here when its neighbours are.
bool is_repeated_scale(const ggml_tensor * op, const tracer & trace) {
    const ggml_tensor * src  = op->src[0];
    const ggml_tensor * root = src->view_src != nullptr ? src->view_src : src;
    return root->op == GGML_OP_NONE && trace.in_own_buffer(root);
}

} // namespace

bool claims(const ggml_tensor * op, ggml_backend_buffer_type_t own_buffer_type, ggml_backend_dev_t cpu) {
    if (op->op == GGML_OP_NONE || is_view(op)) {
        return true;
    }
    if (!ggml_backend_dev_supports_op(cpu, op)) {
        return false;
    }
    tracer trace(own_buffer_type);
    switch (op->op) {
    case GGML_OP_MUL_MAT:
        return trace.is_router(op->src[0]);
    case GGML_OP_MUL_MAT_ID:
        // Without a buffer nothing is known yet (ggml's operator tests ask before they allocate).
        return op->src[0]->buffer == nullptr || trace.in_own_buffer(op->src[0]);
    case GGML_OP_REPEAT:
        return is_repeated_scale(op, trace) || trace.trace(op) >= origin::router;
    default:
        return is_block_op(op->op) && trace.trace(op) >= origin::router;
    }
}

} // namespace hybrimoe
