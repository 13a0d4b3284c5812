#include "memory.h"

#include "counts.h"

#include <cstdlib>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <sys/mman.h>

namespace test_device {

namespace {

constexpr size_t granularity = 256;  // as cudaMalloc's
constexpr size_t gap         = 4096; // between allocations, so that an address beyond one is nobody's

size_t round_up(size_t n, size_t step) {
    return (n + step - 1) / step * step;
}

} // namespace

void region_map::add(region_ptr one) {
    std::lock_guard<std::mutex> lock(mutex_);
    regions_[one->begin] = std::move(one);
}

region_ptr region_map::remove(const void * begin) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = regions_.find(static_cast<const char *>(begin));
    if (found == regions_.end()) {
        return nullptr;
    }
    region_ptr one = found->second;
    regions_.erase(found);
    return one;
}

region_ptr region_map::find(const void * begin, size_t size) const {
    const char * at = static_cast<const char *>(begin);
    std::lock_guard<std::mutex> lock(mutex_);
    const auto after = regions_.upper_bound(at);
    if (after == regions_.begin()) {
        return nullptr;
    }
    const region_ptr & one = std::prev(after)->second;
    return at + size <= one->begin + one->size ? one : nullptr;
}

bool region_map::overlaps(const void * begin, size_t size) const {
    const char * at = static_cast<const char *>(begin);
    std::lock_guard<std::mutex> lock(mutex_);
    const auto next = regions_.lower_bound(at + size);
    return next != regions_.begin() && std::prev(next)->second->begin + std::prev(next)->second->size > at;
}

device_memory::device_memory(size_t n_bytes, bool reuse) : n_bytes_(n_bytes), reuse_(reuse) {
    reserved_   = (reuse ? 2 : 16) * n_bytes + (size_t{64} << 20);
    void * made = mmap(nullptr, reserved_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED) {
        throw std::runtime_error("addresses for the device's memory cannot be reserved");
    }
    base_ = static_cast<char *>(made);
}

// The offset of a free place. The caller holds the lock.
size_t device_memory::place_of(size_t size) {
    size_t at = reuse_ ? 0 : next_;
    if (reuse_) {
        for (const auto & one : used_) {
            if (one.first >= at + size + gap) {
                break;
            }
            at = one.first + one.second + gap;
        }
    } else {
        next_ += size + gap;
    }
    if (at + size > reserved_) {
        complain("no address is left; HYBRIMOE_TEST_DEVICE_ADDRESSES=reuse needs fewer");
    }
    return at;
}

region_ptr device_memory::allocate(size_t size) {
    const size_t rounded = round_up(size, granularity);
    std::lock_guard<std::mutex> lock(mutex_);
    if (rounded < size || rounded > n_bytes_ - n_used_) {
        return nullptr;
    }
    auto one  = std::make_shared<region>();
    one->real = static_cast<char *>(std::aligned_alloc(granularity, rounded));
    if (one->real == nullptr) {
        return nullptr;
    }
    std::memset(one->real, poison, rounded);
    const size_t at = place_of(rounded);
    used_[at]       = rounded;
    n_used_ += rounded;
    one->begin = base_ + at;
    one->size  = size;
    regions_.add(one);
    return one;
}

void device_memory::free(const void * begin) {
    const region_ptr one = regions_.remove(begin);
    if (one == nullptr) {
        complain("%p is freed, where no allocation begins", begin);
    }
    if (one->n_queued > 0) {
        complain("an allocation of %zu bytes is freed while queued work uses it", one->size);
    }
    std::memset(one->real, poison, one->size);
    std::free(one->real);
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = used_.find(static_cast<size_t>(one->begin - base_));
    n_used_ -= found->second;
    used_.erase(found);
}

size_t device_memory::n_free() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return n_bytes_ - n_used_;
}

region_map & pinned_memory() {
    static auto & all = *new region_map; // never destroyed: threads of the process may outlive static objects
    return all;
}

} // namespace test_device
