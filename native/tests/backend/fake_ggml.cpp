#include "fake_ggml.h"

#include "cpu_executor.h"
#include "ggml-release.h"

#include "ggml-backend-impl.h"

namespace fake_ggml {

answers & current() {
    static answers the_answers;
    return the_answers;
}

} // namespace fake_ggml

namespace hybrimoe {

ggml_backend_dev_t find_cpu_device() {
    static ggml_backend_device device{};
    return fake_ggml::current().has_cpu ? &device : nullptr;
}

} // namespace hybrimoe

extern "C" {

const char * ggml_version(void) {
    const char * version = fake_ggml::current().version;
    return version == nullptr ? HYBRIMOE_GGML_VERSION : version;
}

ggml_backend_reg_t ggml_backend_dev_backend_reg(ggml_backend_dev_t) {
    static ggml_backend_reg registry{};
    registry.api_version = GGML_BACKEND_API_VERSION + fake_ggml::current().api_version_delta;
    return &registry;
}

// The layout check allocates one tensor and looks at the sizes: no memory is needed to answer it.
size_t ggml_tensor_overhead(void) {
    return sizeof(ggml_tensor) + (fake_ggml::current().other_layout ? 256 : 32);
}

ggml_context * ggml_init(ggml_init_params) {
    static char context;
    return reinterpret_cast<ggml_context *>(&context);
}

void ggml_free(ggml_context *) {}

ggml_tensor * ggml_new_tensor_1d(ggml_context *, ggml_type, int64_t) {
    static ggml_tensor tensor{};
    return &tensor;
}

size_t ggml_used_mem(const ggml_context *) {
    return ggml_tensor_overhead();
}

// ---- what describe.cpp asks about single tensors

ggml_unary_op ggml_get_unary_op(const ggml_tensor * t) {
    return static_cast<ggml_unary_op>(t->op_params[0]);
}

ggml_glu_op ggml_get_glu_op(const ggml_tensor * t) {
    return static_cast<ggml_glu_op>(t->op_params[0]);
}

int64_t ggml_nelements(const ggml_tensor * t) {
    return t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3];
}

// Of tensors whose strides are in rising order.
bool ggml_is_contiguous(const ggml_tensor * t) {
    return t->nb[3] * static_cast<size_t>(t->ne[3]) == static_cast<size_t>(ggml_nelements(t)) * t->nb[0];
}

const char * ggml_op_name(ggml_op op) {
    return op == GGML_OP_GLU ? "GLU" : "?";
}

} // extern "C"
