// A ring of whole messages between one producer and one consumer, without locks: the computing thread never waits for
// the thread that writes the recording to disk.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace hybrimoe {

struct trace_part {
    const void * data = nullptr;
    size_t n_bytes    = 0;
};

class trace_ring {
public:
    explicit trace_ring(size_t capacity_bytes);

    // Producer: puts the parts in as one message, or, where there is no room for it, nothing at all (false).
    bool push(const trace_part * parts, size_t n_parts);
    // Consumer: moves as many whole messages to `out` as fit. Returns their bytes, 0 when there is none, or -n when the
    // next message has n bytes and does not fit. A message begins with its own size, a uint64_t.
    int64_t pop(uint8_t * out, size_t size);

    size_t capacity() const { return capacity_; }

private:
    void copy_in(uint64_t at, const trace_part & part);
    void copy_out(uint64_t at, uint8_t * out, size_t n_bytes) const;

    const size_t capacity_;
    // Not initialised: pages that no recording reaches are never touched.
    const std::unique_ptr<uint8_t[]> bytes_;
    // Bytes ever written and read; apart, so that the threads do not share a cache line.
    alignas(64) std::atomic<uint64_t> written_{0};
    alignas(64) std::atomic<uint64_t> read_{0};
};

} // namespace hybrimoe
