#include "observer/host.h"

#include "json_text.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <mutex>
#include <sstream>
#include <stdexcept>

#ifdef __unix__
#include <unistd.h>
#endif

namespace hybrimoe {

namespace {

constexpr size_t max_facts_bytes = size_t{64} << 10;

struct process_facts {
    std::mutex mutex;
    std::string told = "null";
    std::string model_file;
    const std::chrono::steady_clock::time_point begin = std::chrono::steady_clock::now();
};

process_facts & facts() {
    static process_facts the_facts;
    return the_facts;
}

std::atomic<bool> has_buffers{false}, is_warned{false};

std::string own_program() {
    std::string name, argument;
    std::ifstream file("/proc/self/comm");
    std::getline(file, name);
    std::vector<std::string> arguments;
    std::ifstream words("/proc/self/cmdline");
    while (std::getline(words, argument, '\0')) {
        arguments.push_back(argument);
    }
    return program_name(name, arguments);
}

// The file that is mapped at an address; empty for memory that is no file.
std::string file_at(const void * data) {
    const auto address = reinterpret_cast<uintptr_t>(data);
    std::ifstream maps("/proc/self/maps");
    std::string line;
    while (std::getline(maps, line)) {
        unsigned long long begin = 0, end = 0;
        int path_at = 0;
        if (std::sscanf(line.c_str(), "%llx-%llx %*s %*s %*s %*s %n", &begin, &end, &path_at) < 2) {
            continue;
        }
        if (address >= begin && address < end) {
            const bool is_file = path_at > 0 && static_cast<size_t>(path_at) < line.size() && line[path_at] == '/';
            return is_file ? line.substr(static_cast<size_t>(path_at)) : std::string();
        }
    }
    return {};
}

} // namespace

std::string program_name(const std::string & name, const std::vector<std::string> & arguments) {
    if (name.rfind("ld-linux", 0) != 0) {
        return name;
    }
    // Options of the dynamic linker that have a value.
    const char * const with_value[] = {"--library-path",     "--inhibit-rpath", "--audit",
                                       "--preload",          "--argv0",         "--glibc-hwcaps-prepend",
                                       "--glibc-hwcaps-mask"};
    for (size_t i = 1; i < arguments.size(); i++) {
        const std::string & one = arguments[i];
        if (one.rfind("--", 0) != 0) {
            return one.substr(one.rfind('/') + 1);
        }
        i += std::find(std::begin(with_value), std::end(with_value), one) != std::end(with_value) ? 1 : 0;
    }
    return name;
}

nlohmann::json describe_process() {
    process_facts & all = facts();
    std::lock_guard<std::mutex> lock(all.mutex);
    const double uptime_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - all.begin).count();
    return {{"version", HYBRIMOE_VERSION},
#ifdef __unix__
            {"pid", static_cast<int64_t>(::getpid())},
#endif
            {"program", own_program()},
            {"uptime_s", uptime_s},
            {"model_file", all.model_file.empty() ? nlohmann::json(nullptr) : nlohmann::json(all.model_file)}};
}

std::string host_facts() {
    process_facts & all = facts();
    std::lock_guard<std::mutex> lock(all.mutex);
    return all.told;
}

void set_host_facts(const std::string & json) {
    if (json.size() > max_facts_bytes) {
        throw std::invalid_argument("more than 64 KiB");
    }
    const nlohmann::json parsed = parse_json(json);
    if (!parsed.is_object()) {
        throw std::invalid_argument("not one JSON object");
    }
    std::string text    = parsed.dump(); // on one line
    process_facts & all = facts();
    std::lock_guard<std::mutex> lock(all.mutex);
    all.told = std::move(text);
}

void note_buffer(const void * data, size_t size) {
    if (data == nullptr || size == 0) { // the loader asks for an empty one, to see whether there can be any
        return;
    }
    has_buffers         = true;
    process_facts & all = facts();
    std::lock_guard<std::mutex> lock(all.mutex);
    if (all.model_file.empty()) {
        all.model_file = file_at(data);
    }
}

void idleness::on_graph_announced(bool may_speak) {
    if (is_ours_ || ++n_announced_ != 2 || has_buffers || !may_speak || is_warned.exchange(true)) {
        return;
    }
    std::fprintf(stderr, "warning: HybriMoE is loaded, but this model gives it no tensors: it does not take part\n"
                         "hint: a model with experts and -ot \"ffn_(gate_inp\\.|.*_exps)=HybriMoE\" (or hybrimoe exec) "
                         "give it work\n");
}

} // namespace hybrimoe
