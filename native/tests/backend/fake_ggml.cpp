#include "fake_ggml.h"

#include "running_ggml/binding.h"
#include "running_ggml/probe.h"

#include "ggml.h"

namespace fake_ggml {

answers & current() {
    static answers the_answers;
    return the_answers;
}

} // namespace fake_ggml

namespace hybrimoe {

const char * bind_ggml(void *) {
    return fake_ggml::current().missing_function;
}

bool is_ggml_bound() {
    return true;
}

const ggml_facts & compiled_facts() {
    static const ggml_facts facts{};
    return facts;
}

std::string describe(const ggml_facts &) {
    return "{}";
}

std::string why_ggml_does_not_fit(const ggml_facts &) {
    return fake_ggml::current().reason;
}

} // namespace hybrimoe

extern "C" {

const char * ggml_version(void) {
    return "9.9.9";
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
