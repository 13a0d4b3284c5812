// What was called, how often, and a trace of it.
#pragma once

#include <cstdint>
#include <string>

namespace test_device {

enum class count {
#define HM_COUNT(name) name,
#include "counts.def"
#undef HM_COUNT
};

// One call as it stands in the trace. Members without a value are left out there.
struct call {
    const char * kind  = "";
    int device         = -1;
    int stream         = -1; // 0: the device's own, of blocking calls
    int64_t n_bytes    = -1;
    int n_nodes        = -1;
    const char * first = nullptr; // names: of a graph's first and last node, of a tensor
    const char * last  = nullptr;
    const char * host  = nullptr; // pinned or pageable
    int waited         = -1;
    int changed        = -1;
};

void add(count what, int64_t n = 1);
void trace(const call & one);
void open_trace(const char * path); // throws std::runtime_error
std::string counts_json();
void reset_counts();

// Ends the process with a message: what a real device answers with garbage or a crash.
[[noreturn]] __attribute__((format(printf, 1, 2))) void complain(const char * format, ...);

} // namespace test_device
