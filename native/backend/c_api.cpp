#include "counters.h"
#include "ggml-release.h"
#include "hybrimoe.h"
#include "last_words.h"
#include "running_ggml/binding.h"
#include "running_ggml/probe.h"
#include "settings.h"

#include "ggml.h"

#include <cstdio>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// What is wrong with the ggml in `library`; it stays as it was found first, since ggml stays for the process's life.
const std::string & mismatch_of(void * library) {
    static const std::string mismatch = [library]() -> std::string {
        if (const char * missing = hybrimoe::bind_ggml(library)) {
            return std::string("it has no ") + missing + "()";
        }
        const std::string reason = hybrimoe::why_ggml_does_not_fit(hybrimoe::compiled_facts());
        return reason.empty() ? reason : std::string("ggml ") + ggml_version() + " does not fit: " + reason;
    }();
    return mismatch;
}

int64_t describe(uint64_t instance, std::string (hybrimoe::instance_view::*what)() const, char * out, size_t size) {
    int64_t length = -1;
    hybrimoe::ask_instance(instance, [&](const hybrimoe::instance_view & view) {
        const std::string text = (view.*what)();
        length                 = static_cast<int64_t>(text.size());
        if (out != nullptr && size > 0) {
            std::snprintf(out, size, "%s", text.c_str());
        }
        return true;
    });
    return length;
}

} // namespace

extern "C" {

int hybrimoe_abi_version(void) {
    return HYBRIMOE_ABI_VERSION;
}

const char * hybrimoe_version(void) {
    return HYBRIMOE_VERSION;
}

const char * hybrimoe_ggml_version(void) {
    return HYBRIMOE_GGML_VERSION;
}

const char * hybrimoe_ggml_interface(void) {
    static const std::string text = hybrimoe::describe(hybrimoe::compiled_facts());
    return text.c_str();
}

const char * hybrimoe_check_ggml(void * library) {
    const std::string & mismatch = mismatch_of(library);
    return mismatch.empty() ? nullptr : mismatch.c_str();
}

int hybrimoe_configure(const char * json, char * error, size_t error_size) {
    try {
        if (json == nullptr) {
            throw std::invalid_argument("no settings were given");
        }
        hybrimoe::set_current_settings(hybrimoe::parse_settings(json, hybrimoe::current_settings()));
        return 0;
    } catch (const std::exception & problem) {
        if (error != nullptr && error_size > 0) {
            std::snprintf(error, error_size, "%s", problem.what());
        }
        return -1;
    }
}

uint64_t hybrimoe_last_instance(void) {
    return hybrimoe::last_instance_of_thread();
}

int32_t hybrimoe_n_layers(uint64_t instance) {
    const auto data = hybrimoe::find_instance(instance);
    return data == nullptr ? 0 : data->n_layers();
}

int hybrimoe_get_layer_counters(uint64_t instance, int32_t layer, struct hybrimoe_layer_counters * out) {
    const auto data = hybrimoe::find_instance(instance);
    if (data == nullptr || out == nullptr || layer < 0 || layer >= data->n_layers()) {
        return -1;
    }
    *out = data->read(layer);
    return 0;
}

uint64_t hybrimoe_n_nodes_delegated(uint64_t instance) {
    const auto data = hybrimoe::find_instance(instance);
    return data == nullptr ? 0 : data->n_nodes_delegated.load(std::memory_order_relaxed);
}

int hybrimoe_reset_counters(uint64_t instance) {
    const auto data = hybrimoe::find_instance(instance);
    if (data == nullptr) {
        return -1;
    }
    data->reset();
    return 0;
}

int64_t hybrimoe_describe_state(uint64_t instance, char * out, size_t size) {
    return describe(instance, &hybrimoe::instance_view::describe_state, out, size);
}

int64_t hybrimoe_describe_trace(uint64_t instance, char * out, size_t size) {
    return describe(instance, &hybrimoe::instance_view::describe_trace, out, size);
}

int64_t hybrimoe_read_trace(uint64_t instance, void * out, int64_t size) {
    int64_t n_bytes = -1;
    if (out != nullptr && size >= 0) {
        hybrimoe::ask_instance(instance, [&](const hybrimoe::instance_view & view) {
            n_bytes = view.read_trace(static_cast<uint8_t *>(out), static_cast<size_t>(size));
            return true;
        });
    }
    return n_bytes;
}

int hybrimoe_stop_trace(uint64_t instance) {
    const bool stopped =
        hybrimoe::ask_instance(instance, [](const hybrimoe::instance_view & view) { return view.stop_trace(); });
    return stopped ? 0 : -1;
}

int32_t hybrimoe_residency(uint64_t instance, int32_t layer, int32_t * device, int32_t capacity) {
    int32_t n = -1;
    hybrimoe::ask_instance(instance, [&](const hybrimoe::instance_view & view) {
        std::vector<int32_t> where;
        if (!view.residency(layer, where)) {
            return false;
        }
        n = static_cast<int32_t>(where.size());
        for (int32_t i = 0; device != nullptr && i < n && i < capacity; i++) {
            device[i] = where[static_cast<size_t>(i)];
        }
        return true;
    });
    return n;
}

uint64_t hybrimoe_next_event(uint64_t instance, uint64_t after, char * line, size_t size) {
    uint64_t number = 0;
    std::string text;
    const bool found = hybrimoe::ask_instance(
        instance, [&](const hybrimoe::instance_view & view) { return view.next_event(after, number, text); });
    if (found && line != nullptr && size > 0) {
        std::snprintf(line, size, "%s", text.c_str());
    }
    return found ? number : 0;
}

int hybrimoe_set_last_words(int ending, const char * text, int exit_code) {
    switch (ending) {
    case HYBRIMOE_FILE_IS_GONE:
        return hybrimoe::set_last_words(hybrimoe::ending::file_is_gone, text, exit_code) ? 0 : -1;
    case HYBRIMOE_ILLEGAL_INSTRUCTION:
        return hybrimoe::set_last_words(hybrimoe::ending::illegal_instruction, text, exit_code) ? 0 : -1;
    default:
        return -1;
    }
}

} // extern "C"
