// A device's memory: addresses that the host cannot read or write, and what lies behind them elsewhere; and which host
// memory is pinned.
#pragma once

#include <atomic>
#include <cstddef>
#include <map>
#include <memory>
#include <mutex>

namespace test_device {

// What an allocation is filled with until somebody writes to it: NaN as F32, F16 and BF16, and -1 as an index.
constexpr int poison = 0xff;

// One allocation, or one range of pinned host memory.
struct region {
    char * begin = nullptr; // as tensors know it
    size_t size  = 0;
    char * real  = nullptr;       // where its bytes are; of host memory the same
    std::atomic<int> n_queued{0}; // operations that have not run yet and will use it
    char * real_of(const void * address) const { return real + (static_cast<const char *>(address) - begin); }
};
using region_ptr = std::shared_ptr<region>;

// By address. Safe for several threads.
class region_map {
public:
    void add(region_ptr one);
    region_ptr remove(const void * begin);                  // nullptr: nothing begins there
    region_ptr find(const void * begin, size_t size) const; // the one that holds all of it, or nullptr
    bool overlaps(const void * begin, size_t size) const;

private:
    mutable std::mutex mutex_;
    std::map<const char *, region_ptr> regions_;
};

class device_memory {
public:
    // `n_bytes` in all. `reuse`: a freed address is given out again as soon as something fits there. Throws
    // std::runtime_error when the addresses cannot be reserved.
    device_memory(size_t n_bytes, bool reuse);

    // Poisoned memory of that size; nullptr when so much is not free.
    region_ptr allocate(size_t size);
    // Complains when queued work uses it.
    void free(const void * begin);
    region_ptr find(const void * begin, size_t size) const { return regions_.find(begin, size); }
    // Whether that is one of its addresses, allocated or not.
    bool holds(const void * address) const { return address >= base_ && address < base_ + reserved_; }
    size_t n_bytes() const { return n_bytes_; }
    size_t n_free() const;

private:
    size_t place_of(size_t size);

    const size_t n_bytes_;
    const bool reuse_;
    char * base_     = nullptr;
    size_t reserved_ = 0;
    mutable std::mutex mutex_;
    std::map<size_t, size_t> used_; // offset: size
    size_t n_used_ = 0;
    size_t next_   = 0; // without reuse
    region_map regions_;
};

// Pinned host memory of all devices.
region_map & pinned_memory();

} // namespace test_device
