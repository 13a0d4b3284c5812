#include "running_ggml/probe.h"

#include "cpu_executor.h"
#include "running_ggml/tables.h"

#include <cstdint>
#include <cstring>
#include <dlfcn.h>
#include <memory>

namespace hybrimoe {

namespace {

std::string quoted(const char * text) {
    return text == nullptr ? std::string("nothing") : "\"" + std::string(text) + "\"";
}

std::string differs(const char * what, int number, const char * here, const char * there) {
    return std::string(what) + " " + std::to_string(number) + " is " + quoted(there) + " there, " + quoted(here) +
           " in the headers that the plug-in was compiled with";
}

// In rising order, so that the first difference is found before a number beyond the end of ggml's list is asked for.
template <typename name_of>
std::string compare(const char * what, const std::vector<named_number> & wanted, const name_of & name) {
    for (const named_number & one : wanted) {
        const char * there = name(one.number);
        if (there == nullptr || std::strcmp(there, one.name) != 0) {
            return differs(what, one.number, one.name, there);
        }
    }
    return {};
}

std::string compare_types(const std::vector<named_type> & wanted) {
    for (const named_type & one : wanted) {
        const auto type    = static_cast<ggml_type>(one.number);
        const char * there = ggml_type_name(type);
        if (there == nullptr || std::strcmp(there, one.name) != 0) {
            return differs("type", one.number, one.name, there);
        }
        if (static_cast<size_t>(ggml_blck_size(type)) != one.block_values || ggml_type_size(type) != one.block_bytes) {
            return "blocks of type " + std::string(one.name) + " have another size there";
        }
    }
    return {};
}

template <typename value> value read_at(const void * base, size_t offset) {
    value found;
    std::memcpy(&found, static_cast<const char *>(base) + offset, sizeof(found));
    return found;
}

using context_ptr = std::unique_ptr<ggml_context, decltype(&ggml_free)>;

// Makes a few tensors and finds in them what ggml was told.
std::string compare_tensors(const tensor_layout & at) {
    const std::string other = "tensors have another layout there";
    // A tensor lies behind ggml's head of an object, which has a few pointers.
    if (ggml_tensor_overhead() <= at.size || ggml_tensor_overhead() - at.size >= 128) {
        return other;
    }
    ggml_init_params params{};
    params.mem_size = 8 * (ggml_tensor_overhead() + at.size);
    params.no_alloc = true;
    const context_ptr context(ggml_init(params), ggml_free);
    if (context == nullptr) {
        return "no tensor can be made";
    }
    const int64_t ne[]  = {32, 3, 5, 7};
    const void * tensor = ggml_new_tensor_4d(context.get(), GGML_TYPE_F16, ne[0], ne[1], ne[2], ne[3]);
    if (ggml_used_mem(context.get()) != ggml_tensor_overhead()) {
        return other;
    }
    bool same = read_at<int32_t>(tensor, at.type) == GGML_TYPE_F16 && read_at<int32_t>(tensor, at.op) == GGML_OP_NONE &&
                read_at<void *>(tensor, at.buffer) == nullptr && read_at<void *>(tensor, at.data) == nullptr &&
                read_at<void *>(tensor, at.src) == nullptr;
    size_t stride = sizeof(uint16_t);
    for (size_t i = 0; i < 4; i++) {
        same = same && read_at<int64_t>(tensor, at.ne + i * sizeof(int64_t)) == ne[i] &&
               read_at<size_t>(tensor, at.nb + i * sizeof(size_t)) == stride;
        stride *= static_cast<size_t>(ne[i]);
    }
    auto * source       = static_cast<ggml_tensor *>(const_cast<void *>(tensor));
    const void * scaled = ggml_scale(context.get(), source, 0.25f);
    same = same && read_at<int32_t>(scaled, at.op) == GGML_OP_SCALE &&
           read_at<const void *>(scaled, at.src) == tensor && read_at<float>(scaled, at.op_params) == 0.25f;
    const void * view = ggml_view_1d(context.get(), source, 4, 6);
    same = same && read_at<const void *>(view, at.view_src) == tensor && read_at<size_t>(view, at.view_offs) == 6;
    ggml_set_name(source, "probe");
    same = same && std::memcmp(static_cast<const char *>(tensor) + at.name, "probe", sizeof("probe")) == 0;
    return same ? std::string() : other;
}

const void * library_base(const void * function) {
    Dl_info where{};
    return function == nullptr || dladdr(function, &where) == 0 ? nullptr : where.dli_fbase;
}

// The members that the CPU's table must have are functions of the library that its first one is from: only then is one
// called.
template <typename functions> bool is_buffer_type_table(ggml_backend_buffer_type_t type) {
    const auto * table = reinterpret_cast<const tables::buffer_type<functions> *>(type);
    const void * home  = library_base(reinterpret_cast<const void *>(table->iface.get_name));
    for (const void * one : {reinterpret_cast<const void *>(table->iface.alloc_buffer),
                             reinterpret_cast<const void *>(table->iface.get_alignment),
                             reinterpret_cast<const void *>(table->iface.is_host)}) {
        if (home == nullptr || library_base(one) != home) {
            return false;
        }
    }
    return table->device == ggml_backend_buft_get_device(type) &&
           table->iface.get_alignment(type) == ggml_backend_buft_get_alignment(type) &&
           table->iface.is_host(type) == ggml_backend_buft_is_host(type);
}

bool is_buffer_table() {
    alignas(64) static char memory[256];
    using buffer_ptr = std::unique_ptr<ggml_backend_buffer, decltype(&ggml_backend_buffer_free)>;
    const buffer_ptr buffer(ggml_backend_cpu_buffer_from_ptr(memory, sizeof(memory)), ggml_backend_buffer_free);
    if (buffer == nullptr) {
        return false;
    }
    const tables::buffer * table = tables::of(buffer.get());
    return table->buft == ggml_backend_buffer_get_type(buffer.get()) && table->size == sizeof(memory) &&
           table->usage == ggml_backend_buffer_get_usage(buffer.get());
}

bool is_backend_table(ggml_backend_dev_t cpu) {
    using backend_ptr = std::unique_ptr<struct ggml_backend, decltype(&ggml_backend_free)>;
    const backend_ptr backend(ggml_backend_dev_init(cpu, nullptr), ggml_backend_free);
    return backend != nullptr && tables::of(backend.get())->device == ggml_backend_get_device(backend.get());
}

// A device fills this for ggml; room for members that we do not know.
bool are_device_properties(ggml_backend_dev_t cpu) {
    struct {
        ggml_backend_dev_props known;
        char more[256];
    } given{};
    ggml_backend_dev_get_props(cpu, &given.known);
    return given.known.type == GGML_BACKEND_DEVICE_TYPE_CPU && given.known.caps.buffer_from_host_ptr &&
           given.known.caps.mmap_support && !given.known.caps.async && !given.known.caps.host_buffer &&
           !given.known.caps.events && given.known.name != nullptr &&
           std::strcmp(given.known.name, ggml_backend_dev_name(cpu)) == 0;
}

std::string compare_tables() {
    ggml_backend_dev_t cpu = find_cpu_device();
    if (cpu == nullptr) {
        return "it has no CPU backend, which must be loaded before the plug-in";
    }
    const int api = running_api_version();
    if (api < tables::oldest_api || api > tables::newest_api) {
        return "it has backend API " + std::to_string(api) + ", the plug-in knows " +
               std::to_string(tables::oldest_api) + " to " + std::to_string(tables::newest_api);
    }
    ggml_backend_buffer_type_t type = ggml_backend_cpu_buffer_type();
    const bool is_type              = api == 2 ? is_buffer_type_table<tables::buffer_type_functions_2>(type)
                                               : is_buffer_type_table<tables::buffer_type_functions_3>(type);
    const char * const other        = !is_type                                                    ? "buffer types"
                                      : tables::of(cpu)->reg != ggml_backend_dev_backend_reg(cpu) ? "devices"
                                      : !is_buffer_table()                                        ? "buffers"
                                      : !is_backend_table(cpu)                                    ? "backends"
                                      : !are_device_properties(cpu)                               ? "device properties"
                                                                                                  : nullptr;
    return other == nullptr ? std::string() : std::string("the tables of ") + other + " have another layout there";
}

} // namespace

int running_api_version() {
    ggml_backend_dev_t cpu = find_cpu_device();
    return cpu == nullptr ? 0 : tables::of(ggml_backend_dev_backend_reg(cpu))->api_version;
}

std::string why_ggml_does_not_fit(const ggml_facts & facts) {
    std::string reason = compare("operation", facts.ops, [](int n) { return ggml_op_name(static_cast<ggml_op>(n)); });
    if (reason.empty()) {
        reason = compare("unary operation", facts.unary_ops,
                         [](int n) { return ggml_unary_op_name(static_cast<ggml_unary_op>(n)); });
    }
    if (reason.empty()) {
        reason = compare("gated operation", facts.glu_ops,
                         [](int n) { return ggml_glu_op_name(static_cast<ggml_glu_op>(n)); });
    }
    if (reason.empty()) {
        reason = compare_types(facts.types);
    }
    if (reason.empty()) {
        reason = compare_tensors(facts.tensor);
    }
    return reason.empty() ? compare_tables() : reason;
}

} // namespace hybrimoe
