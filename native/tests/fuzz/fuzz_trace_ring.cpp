// The recorder's ring against a queue: the input is a sequence of pushes and pops.
#include "fuzz.h"
#include "trace_ring.h"

#include <cstring>
#include <deque>

std::vector<std::string> fuzz_seeds() {
    return {std::string("\x20\x01\x05\x00\x01\x3f\x02\x10\x00\xff", 10),
            std::string("\x08\x01\x00\x00\x08\x01\x37\x00\x40", 9),
            std::string("\xff\x01\xf0\x00\x01\x01\xf0\x00\xff\x00\xff", 11)};
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (size < 1) {
        return 0;
    }
    hybrimoe::trace_ring ring(size_t{8} + data[0]);
    std::deque<std::vector<uint8_t>> expected;
    size_t n_held  = 0;
    uint8_t filler = 0;
    for (size_t at = 1; at + 1 < size; at += 2) {
        if (data[at] % 2 == 1) {
            const uint64_t n_bytes = sizeof(uint64_t) + data[at + 1];
            const std::vector<uint8_t> body(data[at + 1], filler++);
            const hybrimoe::trace_part parts[] = {{&n_bytes, sizeof(n_bytes)}, {body.data(), body.size()}};
            REQUIRE(ring.push(parts, 2) == (n_held + n_bytes <= ring.capacity()));
            if (n_held + n_bytes <= ring.capacity()) {
                std::vector<uint8_t> message(n_bytes);
                std::memcpy(message.data(), &n_bytes, sizeof(n_bytes));
                std::copy(body.begin(), body.end(), message.begin() + sizeof(n_bytes));
                expected.push_back(std::move(message));
                n_held += n_bytes;
            }
            continue;
        }
        // Exactly as large as said, so that a sanitizer sees what is written beyond.
        std::vector<uint8_t> out(size_t{8} + data[at + 1]);
        const int64_t n = ring.pop(out.data(), out.size());
        if (n <= 0) {
            REQUIRE(expected.empty() ? n == 0 : n == -static_cast<int64_t>(expected.front().size()));
            REQUIRE(expected.empty() || expected.front().size() > out.size());
            continue;
        }
        size_t read = 0;
        while (read < static_cast<size_t>(n)) {
            REQUIRE(!expected.empty() && read + expected.front().size() <= static_cast<size_t>(n));
            REQUIRE(std::memcmp(out.data() + read, expected.front().data(), expected.front().size()) == 0);
            read += expected.front().size();
            expected.pop_front();
        }
        n_held -= read;
    }
    return 0;
}
