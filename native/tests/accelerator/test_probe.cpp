// What the probe says of a real ggml, and of one that would differ in a single fact.
#include "../backend/check.h"
#include "running_ggml/probe.h"

#include <string>
#include <utility>

namespace {

using hybrimoe::compiled_facts;
using hybrimoe::ggml_facts;
using hybrimoe::why_ggml_does_not_fit;

bool contains(const std::string & text, const char * part) {
    return text.find(part) != std::string::npos;
}

void test_the_ggml_of_the_headers_fits() {
    CHECK(why_ggml_does_not_fit(compiled_facts()).empty());
    CHECK(hybrimoe::running_api_version() >= 2);
}

// As when an operation was removed: all later ones have other numbers.
void test_shifted_operations() {
    ggml_facts facts = compiled_facts();
    for (auto & op : facts.ops) {
        op.number += op.number > 40 ? 2 : 0;
    }
    const std::string reason = why_ggml_does_not_fit(facts);
    CHECK(contains(reason, "operation"));
    CHECK(contains(reason, "\"SET_ROWS\""));
}

void test_each_operation_counts() {
    for (auto member : {&ggml_facts::ops, &ggml_facts::unary_ops, &ggml_facts::glu_ops}) {
        for (size_t i = 0; i + 1 < (compiled_facts().*member).size(); i++) {
            ggml_facts facts = compiled_facts();
            std::swap((facts.*member)[i].name, (facts.*member)[i + 1].name);
            CHECK(contains(why_ggml_does_not_fit(facts), "operation"));
        }
    }
}

void test_each_type_counts() {
    CHECK(compiled_facts().types.size() >= 12);
    for (size_t i = 0; i < compiled_facts().types.size(); i++) {
        ggml_facts facts = compiled_facts();
        facts.types[i].block_bytes++;
        CHECK(contains(why_ggml_does_not_fit(facts), facts.types[i].name));
        facts = compiled_facts();
        facts.types[i].block_values++;
        CHECK(contains(why_ggml_does_not_fit(facts), facts.types[i].name));
        facts               = compiled_facts();
        facts.types[i].name = "other";
        CHECK(contains(why_ggml_does_not_fit(facts), "other"));
    }
}

void test_each_member_of_a_tensor_counts() {
    using hybrimoe::tensor_layout;
    for (auto member :
         {&tensor_layout::type, &tensor_layout::ne, &tensor_layout::nb, &tensor_layout::op, &tensor_layout::op_params,
          &tensor_layout::src, &tensor_layout::view_src, &tensor_layout::view_offs, &tensor_layout::name}) {
        ggml_facts facts = compiled_facts();
        facts.tensor.*member += 4;
        CHECK(contains(why_ggml_does_not_fit(facts), "tensors"));
    }
    ggml_facts facts = compiled_facts();
    facts.tensor.size += 64;
    CHECK(contains(why_ggml_does_not_fit(facts), "tensors"));
    facts.tensor.size = 64;
    CHECK(contains(why_ggml_does_not_fit(facts), "tensors"));
}

} // namespace

int main() {
    test_the_ggml_of_the_headers_fits();
    test_shifted_operations();
    test_each_operation_counts();
    test_each_type_counts();
    test_each_member_of_a_tensor_counts();
    return check::report();
}
