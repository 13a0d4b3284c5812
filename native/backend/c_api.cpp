#include "counters.h"
#include "ggml-release.h"
#include "hybrimoe.h"
#include "last_words.h"
#include "observer/host.h"
#include "observer/observer.h"
#include "observer/snapshot.h"
#include "observer/socket_folder.h"
#include "observer/trace_feed.h"
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

// Writes at most `size` bytes with the terminating 0. Returns the length that the whole text has.
int64_t give(const std::string & text, char * out, size_t size) {
    if (out != nullptr && size > 0) {
        std::snprintf(out, size, "%s", text.c_str());
    }
    return static_cast<int64_t>(text.size());
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

int64_t hybrimoe_snapshot(const char * request, char * out, size_t size) {
    try {
        return give(hybrimoe::make_snapshot(request == nullptr ? "" : request), out, size);
    } catch (const std::exception &) { // no memory
        return -1;
    }
}

int hybrimoe_set_host_facts(const char * json, char * error, size_t error_size) {
    try {
        hybrimoe::set_host_facts(json == nullptr ? "{}" : json);
        hybrimoe::start_observer();
        return 0;
    } catch (const std::exception & problem) {
        give(problem.what(), error, error_size);
        return -1;
    }
}

int64_t hybrimoe_runtime_folder(char * out, size_t size) {
    return give(hybrimoe::runtime_folder(), out, size);
}

int64_t hybrimoe_read_trace(uint64_t instance, void * out, int64_t size) {
    int64_t n_bytes = -1;
    if (out != nullptr && size >= 0) {
        hybrimoe::ask_instance(instance, [&](const hybrimoe::instance_view & view) {
            if (view.feed() != nullptr) {
                n_bytes = view.feed()->read(hybrimoe::trace_feed::host, static_cast<uint8_t *>(out),
                                            static_cast<size_t>(size));
            }
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
