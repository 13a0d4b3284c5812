#include "running_ggml/facts.h"

#include "json_text.h"
#include "kernels/moe_kernels.h"
#include "running_ggml/tables.h"

namespace hybrimoe {

const ggml_facts & compiled_facts() {
    static const ggml_facts facts = [] {
        ggml_facts made;
#define HM_OP(name) {GGML_OP_##name, #name}
        made.ops = {HM_OP(NONE),       HM_OP(ADD),     HM_OP(ADD_ID),    HM_OP(MUL),      HM_OP(DIV),
                    HM_OP(SQR),        HM_OP(SQRT),    HM_OP(SUM_ROWS),  HM_OP(REPEAT),   HM_OP(MUL_MAT),
                    HM_OP(MUL_MAT_ID), HM_OP(SCALE),   HM_OP(CPY),       HM_OP(CONT),     HM_OP(RESHAPE),
                    HM_OP(VIEW),       HM_OP(PERMUTE), HM_OP(TRANSPOSE), HM_OP(GET_ROWS), HM_OP(SET_ROWS),
                    HM_OP(SOFT_MAX),   HM_OP(CLAMP),   HM_OP(ARGSORT),   HM_OP(TOP_K),    HM_OP(FILL),
                    HM_OP(UNARY),      HM_OP(CUSTOM),  HM_OP(GLU)};
#undef HM_OP
#define HM_OP(name) {GGML_UNARY_OP_##name, #name}
        made.unary_ops = {HM_OP(TANH),       HM_OP(RELU), HM_OP(SIGMOID), HM_OP(GELU),
                          HM_OP(GELU_QUICK), HM_OP(SILU), HM_OP(GELU_ERF)};
#undef HM_OP
#define HM_OP(name) {GGML_GLU_OP_##name, #name}
        made.glu_ops = {HM_OP(REGLU),     HM_OP(GEGLU),       HM_OP(SWIGLU),      HM_OP(SWIGLU_OAI),
                        HM_OP(GEGLU_ERF), HM_OP(GEGLU_QUICK), HM_OP(SWIGLU_CLAMP)};
#undef HM_OP
        for (int number = 0; number < GGML_TYPE_COUNT; number++) {
            if (const kernels::type_info * type = kernels::find_type(number)) {
                made.types.push_back({number, type->name, static_cast<size_t>(type->block_values),
                                      static_cast<size_t>(type->block_bytes)});
            }
        }
        made.types.push_back({GGML_TYPE_I8, "i8", 1, 1});
        made.types.push_back({GGML_TYPE_I32, "i32", 1, 4});
        made.tensor = {sizeof(ggml_tensor),
                       offsetof(ggml_tensor, type),
                       offsetof(ggml_tensor, buffer),
                       offsetof(ggml_tensor, ne),
                       offsetof(ggml_tensor, nb),
                       offsetof(ggml_tensor, op),
                       offsetof(ggml_tensor, op_params),
                       offsetof(ggml_tensor, src),
                       offsetof(ggml_tensor, view_src),
                       offsetof(ggml_tensor, view_offs),
                       offsetof(ggml_tensor, data),
                       offsetof(ggml_tensor, name)};
        return made;
    }();
    return facts;
}

std::string describe(const ggml_facts & facts) {
    const auto numbers = [](const std::vector<named_number> & some) {
        nlohmann::ordered_json made;
        for (const named_number & one : some) {
            made[one.name] = one.number;
        }
        return made;
    };
    const tensor_layout & at = facts.tensor;
    nlohmann::ordered_json types;
    for (const named_type & one : facts.types) {
        types[one.name] = {one.number, one.block_values, one.block_bytes};
    }
    const nlohmann::ordered_json text = {
        {"backend_api", {tables::oldest_api, tables::newest_api}},
        {"ops", numbers(facts.ops)},
        {"unary_ops", numbers(facts.unary_ops)},
        {"glu_ops", numbers(facts.glu_ops)},
        {"types", types},
        {"tensor",
         {at.size, at.type, at.buffer, at.ne, at.nb, at.op, at.op_params, at.src, at.view_src, at.view_offs, at.data,
          at.name}},
    };
    return text.dump();
}

} // namespace hybrimoe
