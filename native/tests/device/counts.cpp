#include "counts.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <stdexcept>

namespace test_device {

namespace {

const char * const names[] = {
#define HM_COUNT(name) #name,
#include "counts.def"
#undef HM_COUNT
};
constexpr size_t n_counts = sizeof(names) / sizeof(names[0]);

std::atomic<int64_t> total[n_counts];
std::atomic<int64_t> before_window[n_counts];
std::mutex trace_mutex;
FILE * trace_file = nullptr;

std::string quoted(const char * text) {
    std::string out = "\"";
    for (; *text != 0; text++) {
        const auto c = static_cast<unsigned char>(*text);
        if (c == '"' || c == '\\') {
            out += '\\';
        }
        out += c < 0x20 ? '?' : *text;
    }
    return out + "\"";
}

void append(std::string & line, const char * key, const std::string & value) {
    line += line.empty() ? "{" : ", ";
    line += "\"" + std::string(key) + "\": " + value;
}

} // namespace

void add(count what, int64_t n) {
    total[static_cast<size_t>(what)] += n;
}

void open_trace(const char * path) {
    trace_file = std::fopen(path, "a");
    if (trace_file == nullptr) {
        throw std::runtime_error(std::string("the trace cannot be written to ") + path);
    }
}

void trace(const call & one) {
    if (trace_file == nullptr) {
        return;
    }
    std::string line;
    append(line, "kind", quoted(one.kind));
    const auto number = [&](const char * key, int64_t value) {
        if (value >= 0) {
            append(line, key, std::to_string(value));
        }
    };
    const auto text = [&](const char * key, const char * value) {
        if (value != nullptr) {
            append(line, key, quoted(value));
        }
    };
    number("device", one.device);
    number("stream", one.stream);
    number("bytes", one.n_bytes);
    number("nodes", one.n_nodes);
    text("first", one.first);
    text("last", one.last);
    text("host", one.host);
    const auto truth = [&](const char * key, int value) {
        if (value >= 0) {
            append(line, key, value != 0 ? "true" : "false");
        }
    };
    truth("waited", one.waited);
    truth("changed", one.changed);
    std::lock_guard<std::mutex> lock(trace_mutex);
    std::fprintf(trace_file, "%s}\n", line.c_str());
    std::fflush(trace_file); // the process may be about to abort
}

std::string counts_json() {
    std::string all, window;
    for (size_t i = 0; i < n_counts; i++) {
        const int64_t now = total[i];
        append(all, names[i], std::to_string(now));
        append(window, names[i], std::to_string(now - before_window[i]));
    }
    return "{\"total\": " + all + "}, \"window\": " + window + "}}";
}

void reset_counts() {
    for (size_t i = 0; i < n_counts; i++) {
        before_window[i] = total[i].load();
    }
}

void complain(const char * format, ...) {
    std::fprintf(stderr, "test device: ");
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fprintf(stderr, "\n");
    std::fflush(stderr);
    std::abort();
}

} // namespace test_device
