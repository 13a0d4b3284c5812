#include "trace_ring.h"

#include <algorithm>
#include <cstring>

namespace hybrimoe {

trace_ring::trace_ring(size_t capacity_bytes) : capacity_(capacity_bytes), bytes_(new uint8_t[capacity_bytes]) {}

void trace_ring::copy_in(uint64_t at, const trace_part & part) {
    const size_t begin = static_cast<size_t>(at % capacity_);
    const size_t first = std::min(part.n_bytes, capacity_ - begin);
    const auto * from  = static_cast<const uint8_t *>(part.data);
    std::copy(from, from + first, bytes_.get() + begin);
    std::copy(from + first, from + part.n_bytes, bytes_.get());
}

void trace_ring::copy_out(uint64_t at, uint8_t * out, size_t n_bytes) const {
    const size_t begin = static_cast<size_t>(at % capacity_);
    const size_t first = std::min(n_bytes, capacity_ - begin);
    std::copy(bytes_.get() + begin, bytes_.get() + begin + first, out);
    std::copy(bytes_.get(), bytes_.get() + (n_bytes - first), out + first);
}

bool trace_ring::push(const trace_part * parts, size_t n_parts) {
    uint64_t n_bytes = 0;
    for (size_t i = 0; i < n_parts; i++) {
        n_bytes += parts[i].n_bytes;
    }
    uint64_t at = written_.load(std::memory_order_relaxed);
    if (n_bytes > capacity_ - (at - read_.load(std::memory_order_acquire))) {
        return false;
    }
    for (size_t i = 0; i < n_parts; i++) {
        if (parts[i].n_bytes > 0) {
            copy_in(at, parts[i]);
            at += parts[i].n_bytes;
        }
    }
    written_.store(at, std::memory_order_release);
    return true;
}

int64_t trace_ring::pop(uint8_t * out, size_t size) {
    const uint64_t begin = read_.load(std::memory_order_relaxed);
    const uint64_t end   = written_.load(std::memory_order_acquire);
    uint64_t at          = begin;
    uint64_t n_bytes     = 0; // of the next message
    while (at < end) {
        copy_out(at, reinterpret_cast<uint8_t *>(&n_bytes), sizeof(n_bytes));
        if (at + n_bytes - begin > size) {
            break;
        }
        copy_out(at, out + (at - begin), static_cast<size_t>(n_bytes));
        at += n_bytes;
    }
    if (at == begin) {
        return begin == end ? 0 : -static_cast<int64_t>(n_bytes);
    }
    read_.store(at, std::memory_order_release);
    return static_cast<int64_t>(at - begin);
}

} // namespace hybrimoe
