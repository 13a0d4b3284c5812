// Expert ids from a file in place of the router's.
#include "hybrid/route_trace.h"
#include "memory_file.h"

#include <algorithm>
#include <set>
#include <stdexcept>

std::vector<std::string> fuzz_seeds() {
    const std::vector<int32_t> good = {0x52544d48, 1, 3, 2, 2, 0, 1, 2, 3, 4, 5, 6, 7, 1, 0, 3, 2};
    const std::vector<int32_t> wide = {0x52544d48, 1, 1, 1, 1, INT32_MIN};
    const auto bytes                = [](const std::vector<int32_t> & from) {
        return std::string(reinterpret_cast<const char *>(from.data()), from.size() * sizeof(int32_t));
    };
    return {bytes(good), bytes(wide)};
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    const memory_file file(data, size);
    hybrimoe::route_trace trace;
    try {
        trace.load(file.path());
    } catch (const std::runtime_error &) {
        return 0;
    }
    constexpr int32_t n_expert = 7, top_k = 3, n_tokens = 5;
    for (int layer = 0; layer < 3; layer++) {
        int32_t ids[top_k * n_tokens]{};
        trace.replace(layer, ids, n_tokens, top_k, n_expert);
        for (int t = 0; t < n_tokens; t++) {
            const std::set<int32_t> different(ids + t * top_k, ids + (t + 1) * top_k);
            REQUIRE(different.size() == top_k && *different.begin() >= 0 && *different.rbegin() < n_expert);
        }
        trace.next_pass(n_tokens);
    }
    return 0;
}
