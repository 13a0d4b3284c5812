// The only reader of a recording's ring: counts routing, and hands every pass on to those who read along. Its mutex is
// for readers alone; the computing thread takes none of this.
#pragma once

#include "observer/routing_heat.h"

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace hybrimoe {

class trace_feed {
public:
    // See trace_ring::pop.
    using source = std::function<int64_t(uint8_t *, size_t)>;

    static constexpr int host               = 0;                // the reader behind hybrimoe_read_trace
    static constexpr size_t most_kept_bytes = size_t{64} << 20; // for one reader who is slow

    // `for_host`: the host reads along from the start.
    trace_feed(source ring, bool for_host);

    // Moves what the ring holds to the readers.
    void drain();
    // One who reads along from now on; never `host`.
    int add_reader();
    void remove_reader(int reader);
    // Moves as many whole passes to `out` as fit, as trace_ring::pop does. -1 for a reader that there is not.
    int64_t read(int reader, uint8_t * out, size_t size);
    // Passes that a reader lost because it was slow; in what it reads, they are counted with the next pass.
    int64_t n_lost(int reader) const;

    std::vector<std::vector<double>> heat();

private:
    using message = std::shared_ptr<const std::vector<uint8_t>>;
    struct queue {
        std::deque<message> messages;
        size_t n_bytes     = 0;
        uint64_t n_missing = 0; // since the last message
        int64_t n_lost     = 0;
    };

    void drain_locked();
    static void hand_on(queue & to, const message & one);

    mutable std::mutex mutex_;
    source ring_;
    std::vector<uint8_t> buffer_;
    std::map<int, queue> readers_;
    int next_reader_ = host + 1;
    routing_heat heat_;
};

} // namespace hybrimoe
