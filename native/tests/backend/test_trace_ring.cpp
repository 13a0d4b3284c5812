// The ring between the computing thread and the trace's writer: whole messages, in order, or none.
#include "check.h"
#include "trace_ring.h"

#include <atomic>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

using hybrimoe::trace_part;
using hybrimoe::trace_ring;

namespace {

struct head {
    uint64_t n_bytes; // of the message
    uint64_t number;
};

// Byte i of a message's content.
uint8_t content(uint64_t number, size_t i) {
    return static_cast<uint8_t>(number * 31 + i * 7 + 5);
}

bool push(trace_ring & ring, uint64_t number, size_t n_content, std::vector<uint8_t> & buffer) {
    buffer.resize(n_content);
    for (size_t i = 0; i < n_content; i++) {
        buffer[i] = content(number, i);
    }
    const head begin         = {sizeof(head) + n_content, number};
    const size_t half        = n_content / 2;
    const trace_part parts[] = {
        {&begin, sizeof(begin)}, {buffer.data(), half}, {nullptr, 0}, {buffer.data() + half, n_content - half}};
    return ring.push(parts, 4);
}

// The messages in data[0 .. n_bytes) must be whole, unspoilt, and have growing numbers from `next` on.
uint64_t check_messages(const uint8_t * data, size_t n_bytes, uint64_t & next) {
    uint64_t n_messages = 0;
    for (size_t at = 0; at < n_bytes;) {
        head begin{};
        CHECK(n_bytes - at >= sizeof(begin));
        std::memcpy(&begin, data + at, sizeof(begin));
        CHECK(begin.n_bytes >= sizeof(begin) && begin.n_bytes <= n_bytes - at && begin.number >= next);
        if (check::n_failed() > 0) {
            return n_messages;
        }
        for (size_t i = 0; i < begin.n_bytes - sizeof(begin); i++) {
            CHECK(data[at + sizeof(begin) + i] == content(begin.number, i));
        }
        next = begin.number + 1;
        at += begin.n_bytes;
        n_messages++;
    }
    return n_messages;
}

void test_room() {
    trace_ring ring(256);
    std::vector<uint8_t> buffer;
    std::vector<uint8_t> out(256);
    CHECK(ring.pop(out.data(), out.size()) == 0);
    CHECK(!push(ring, 0, 256 - sizeof(head) + 1, buffer)); // never fits
    CHECK(push(ring, 1, 256 - sizeof(head), buffer));      // fills it
    CHECK(!push(ring, 2, 0, buffer));
    CHECK(ring.pop(out.data(), 255) == -256); // the reader must bring more room
    uint64_t next = 1;
    CHECK(ring.pop(out.data(), 256) == 256 && check_messages(out.data(), 256, next) == 1);
    // Of several messages as many as fit, and the rest later.
    CHECK(push(ring, 3, 34, buffer) && push(ring, 4, 34, buffer) && push(ring, 5, 34, buffer));
    CHECK(ring.pop(out.data(), 149) == 100 && check_messages(out.data(), 100, next) == 2);
    CHECK(ring.pop(out.data(), 149) == 50 && check_messages(out.data(), 50, next) == 1 && next == 6);
    CHECK(ring.pop(out.data(), out.size()) == 0);
}

// A reader that is now slow, now quick: what is lost is lost whole, and the writer knows how much it was.
void test_two_threads() {
    constexpr uint64_t n_messages = 20000;
    trace_ring ring(5000);
    std::atomic<bool> ended{false};
    uint64_t n_lost = 0;
    std::thread writer([&] {
        std::mt19937 random(1);
        std::vector<uint8_t> buffer;
        for (uint64_t number = 0; number < n_messages; number++) {
            const size_t n_content = random() % 10 == 0 ? random() % 3000 : random() % 100;
            n_lost += push(ring, number, n_content, buffer) ? 0 : 1;
            if (random() % 8 == 0) {
                std::this_thread::yield();
            }
        }
        ended.store(true);
    });
    std::mt19937 random(2);
    std::vector<uint8_t> out(64);
    uint64_t next = 0;
    uint64_t n    = 0;
    while (true) {
        const bool is_last = ended.load();
        const int64_t got  = ring.pop(out.data(), out.size());
        if (got < 0) {
            out.resize(static_cast<size_t>(-got));
        } else if (got > 0) {
            n += check_messages(out.data(), static_cast<size_t>(got), next);
            out.resize(64 + random() % 2000);
        } else if (is_last) {
            break;
        }
        if (random() % 4 == 0) {
            std::this_thread::yield();
        }
    }
    writer.join();
    CHECK(n + n_lost == n_messages && n > 0);
}

} // namespace

int main() {
    test_room();
    test_two_threads();
    return check::report();
}
