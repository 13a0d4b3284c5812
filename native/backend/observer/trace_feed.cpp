#include "observer/trace_feed.h"

#include <algorithm>
#include <cstring>

namespace hybrimoe {

namespace {

constexpr size_t first_buffer_bytes = size_t{1} << 20;

uint64_t size_at(const uint8_t * message) {
    uint64_t n_bytes = 0;
    std::memcpy(&n_bytes, message, sizeof(n_bytes));
    return n_bytes;
}

} // namespace

trace_feed::trace_feed(source ring, bool for_host) : ring_(std::move(ring)) {
    if (for_host) {
        readers_[host];
    }
}

void trace_feed::hand_on(queue & to, const message & one) {
    if (to.n_bytes + one->size() > most_kept_bytes) {
        hybrimoe_trace_pass head;
        std::memcpy(&head, one->data(), sizeof(head));
        to.n_missing += 1 + head.n_dropped;
        to.n_lost++;
        return;
    }
    message kept = one;
    if (to.n_missing > 0) {
        auto changed = std::make_shared<std::vector<uint8_t>>(*one);
        hybrimoe_trace_pass head;
        std::memcpy(&head, changed->data(), sizeof(head));
        head.n_dropped += to.n_missing;
        std::memcpy(changed->data(), &head, sizeof(head));
        kept         = std::move(changed);
        to.n_missing = 0;
    }
    to.n_bytes += kept->size();
    to.messages.push_back(std::move(kept));
}

void trace_feed::drain_locked() {
    if (buffer_.empty()) {
        buffer_.resize(first_buffer_bytes);
    }
    for (;;) {
        const int64_t n = ring_(buffer_.data(), buffer_.size());
        if (n < -1) {
            buffer_.resize(static_cast<size_t>(-n));
            continue;
        }
        if (n <= 0) {
            break;
        }
        for (size_t at = 0; at < static_cast<size_t>(n);) {
            const auto n_bytes = static_cast<size_t>(size_at(buffer_.data() + at));
            const auto one =
                std::make_shared<const std::vector<uint8_t>>(buffer_.data() + at, buffer_.data() + at + n_bytes);
            if (n_bytes >= sizeof(hybrimoe_trace_pass)) {
                heat_.add(*reinterpret_cast<const hybrimoe_trace_pass *>(one->data()));
                for (auto & [id, reader] : readers_) {
                    hand_on(reader, one);
                }
            }
            at += n_bytes;
        }
    }
    if (buffer_.size() > 4 * first_buffer_bytes) { // a prompt is over: its size is not needed all the time
        buffer_ = std::vector<uint8_t>();
    }
}

void trace_feed::drain() {
    std::lock_guard<std::mutex> lock(mutex_);
    drain_locked();
}

int trace_feed::add_reader() {
    std::lock_guard<std::mutex> lock(mutex_);
    drain_locked(); // what was before is not the new one's
    readers_[next_reader_];
    return next_reader_++;
}

void trace_feed::remove_reader(int reader) {
    std::lock_guard<std::mutex> lock(mutex_);
    readers_.erase(reader);
}

int64_t trace_feed::read(int reader, uint8_t * out, size_t size) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = readers_.find(reader);
    if (found == readers_.end()) {
        return -1;
    }
    drain_locked();
    queue & from = found->second;
    if (!from.messages.empty() && from.messages.front()->size() > size) {
        return -static_cast<int64_t>(from.messages.front()->size());
    }
    size_t n = 0;
    while (!from.messages.empty() && n + from.messages.front()->size() <= size) {
        const std::vector<uint8_t> & one = *from.messages.front();
        std::copy(one.begin(), one.end(), out + n);
        n += one.size();
        from.n_bytes -= one.size();
        from.messages.pop_front();
    }
    return static_cast<int64_t>(n);
}

int64_t trace_feed::n_lost(int reader) const {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = readers_.find(reader);
    return found == readers_.end() ? 0 : found->second.n_lost;
}

std::vector<std::vector<double>> trace_feed::heat() {
    std::lock_guard<std::mutex> lock(mutex_);
    drain_locked();
    return heat_.shares();
}

} // namespace hybrimoe
