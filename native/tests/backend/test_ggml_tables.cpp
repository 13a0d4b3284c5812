// Our declaration of ggml's tables beside that of the pinned release, which speaks API 2: same members, same places.
#include "check.h"
#include "running_ggml/tables.h"

#include "ggml-backend-impl.h"

#include <cstddef>

namespace {

namespace tables = hybrimoe::tables;

#define SAME(ours, theirs, member) static_assert(offsetof(ours, member) == offsetof(theirs, member), #member)

static_assert(GGML_BACKEND_API_VERSION == 2, "compare the tables of the pin's API");

using buffer_type = tables::buffer_type<tables::buffer_type_functions_2>;
static_assert(sizeof(buffer_type) == sizeof(ggml_backend_buffer_type));
SAME(buffer_type, ggml_backend_buffer_type, device);
SAME(buffer_type, ggml_backend_buffer_type, context);
SAME(tables::buffer_type_functions_2, ggml_backend_buffer_type_i, get_name);
SAME(tables::buffer_type_functions_2, ggml_backend_buffer_type_i, alloc_buffer);
SAME(tables::buffer_type_functions_2, ggml_backend_buffer_type_i, get_alignment);
SAME(tables::buffer_type_functions_2, ggml_backend_buffer_type_i, is_host);

// API 3: one member after alloc_buffer, one after get_alloc_size.
using functions_3 = tables::buffer_type_functions_3;
static_assert(offsetof(functions_3, get_alignment) == offsetof(ggml_backend_buffer_type_i, get_alignment) + 8);
static_assert(offsetof(functions_3, get_alloc_size) == offsetof(ggml_backend_buffer_type_i, get_alloc_size) + 8);
static_assert(offsetof(functions_3, is_host) == offsetof(ggml_backend_buffer_type_i, is_host) + 16);

static_assert(sizeof(tables::buffer) == sizeof(ggml_backend_buffer));
SAME(tables::buffer, ggml_backend_buffer, buft);
SAME(tables::buffer, ggml_backend_buffer, context);
SAME(tables::buffer, ggml_backend_buffer, size);
SAME(tables::buffer, ggml_backend_buffer, usage);

static_assert(sizeof(tables::backend) == sizeof(ggml_backend));
SAME(tables::backend, ggml_backend, guid);
SAME(tables::backend, ggml_backend, device);
SAME(tables::backend, ggml_backend, context);
static_assert(sizeof(tables::backend_functions) == sizeof(ggml_backend_i));
SAME(tables::backend_functions, ggml_backend_i, get_name);
SAME(tables::backend_functions, ggml_backend_i, free);
SAME(tables::backend_functions, ggml_backend_i, cpy_tensor_async);
SAME(tables::backend_functions, ggml_backend_i, synchronize);
SAME(tables::backend_functions, ggml_backend_i, graph_compute);

static_assert(sizeof(tables::device) == sizeof(ggml_backend_device));
SAME(tables::device, ggml_backend_device, reg);
SAME(tables::device, ggml_backend_device, context);
static_assert(sizeof(tables::device_functions) == sizeof(ggml_backend_device_i));
SAME(tables::device_functions, ggml_backend_device_i, get_name);
SAME(tables::device_functions, ggml_backend_device_i, get_description);
SAME(tables::device_functions, ggml_backend_device_i, get_memory);
SAME(tables::device_functions, ggml_backend_device_i, get_type);
SAME(tables::device_functions, ggml_backend_device_i, get_props);
SAME(tables::device_functions, ggml_backend_device_i, init_backend);
SAME(tables::device_functions, ggml_backend_device_i, get_buffer_type);
SAME(tables::device_functions, ggml_backend_device_i, buffer_from_host_ptr);
SAME(tables::device_functions, ggml_backend_device_i, supports_op);
SAME(tables::device_functions, ggml_backend_device_i, supports_buft);

static_assert(sizeof(tables::registry) == sizeof(ggml_backend_reg));
SAME(tables::registry, ggml_backend_reg, api_version);
SAME(tables::registry, ggml_backend_reg, context);
SAME(tables::registry_functions, ggml_backend_reg_i, get_name);
SAME(tables::registry_functions, ggml_backend_reg_i, get_device_count);
SAME(tables::registry_functions, ggml_backend_reg_i, get_device);
SAME(tables::registry_functions, ggml_backend_reg_i, get_proc_address);

} // namespace

// All of it is checked by the compiler.
int main() {
    CHECK(tables::oldest_api == GGML_BACKEND_API_VERSION);
    return check::report();
}
