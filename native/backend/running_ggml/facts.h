// What the plug-in takes for granted about ggml: numbers, types and structures of the headers that it was compiled
// with.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace hybrimoe {

struct named_number {
    int number;
    const char * name; // as ggml prints it
};

struct named_type {
    int number;
    const char * name;
    size_t block_values;
    size_t block_bytes;
};

// Bytes from the start of a ggml_tensor.
struct tensor_layout {
    size_t size, type, buffer, ne, nb, op, op_params, src, view_src, view_offs, data, name;
};

struct ggml_facts {
    std::vector<named_number> ops, unary_ops, glu_ops; // those that we use, in rising order
    std::vector<named_type> types;
    tensor_layout tensor;
};

// What this plug-in was compiled with.
const ggml_facts & compiled_facts();

// `facts` and the backend APIs that the plug-in speaks, as JSON: equal texts mean that two plug-ins fit the same ggml.
std::string describe(const ggml_facts & facts);

} // namespace hybrimoe
