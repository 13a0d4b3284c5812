// How the rows of one dot call are walked: as one stream of memory, or as several at once. Included by the vector
// kernels; internal linkage, as everything there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "kernel_set.h"

namespace hybrimoe::kernels {

namespace {

// f(integral_constant 0) ... f(integral_constant n - 1): unrolled whatever the compiler thinks of the body's size
template <class fn, int... i> inline void each_of(fn && f, std::integer_sequence<int, i...>) {
    (f(std::integral_constant<int, i>{}), ...);
}
template <int n, class fn> inline void each(fn && f) {
    each_of(f, std::make_integer_sequence<int, n>{});
}

// Row r of each of n parts of equal length, with what is to be prefetched while that row is worked on: the same stream
// ahead_bytes further on, and at its end the same stream of `args.next`, whose parts are taken to be as long.
template <int n, int ahead_bytes> struct row_streams {
    const uint8_t * row[n];
    const uint8_t * fetch[n];
    int64_t index[n];

    row_streams(const dot_args & args, int64_t first, int64_t part_rows, int64_t r) {
        const auto part_bytes = static_cast<size_t>(part_rows) * args.row_bytes;
        for (int i = 0; i < n; ++i) {
            index[i]              = first + i * part_rows + r;
            row[i]                = args.rows + static_cast<size_t>(index[i]) * args.row_bytes;
            const uint8_t * part  = args.rows + static_cast<size_t>(first + i * part_rows) * args.row_bytes;
            const uint8_t * end   = part + part_bytes;
            const uint8_t * ahead = row[i] + ahead_bytes;
            fetch[i] = ahead < end            ? ahead
                       : args.next != nullptr ? args.next + static_cast<size_t>(i) * part_bytes + (ahead - end)
                                              : row[i];
        }
    }
};

// All rows of a call. kernel::streams: the most rows whose accumulators fit the registers; kernel::add<n>(args, rows).
// A row's arithmetic is the same in either walk.
template <class kernel> void walk_rows(const dot_args & args) {
    constexpr int n        = kernel::streams;
    const int64_t n_rounds = args.n_streams > 1 ? args.n_rows / n : 0;
    for (int64_t r = 0; r < n_rounds; ++r) {
        kernel::template add<n>(args, row_streams<n, 2048>(args, 0, n_rounds, r));
    }
    const int64_t first = n_rounds * n;
    for (int64_t r = 0; r < args.n_rows - first; ++r) {
        kernel::template add<1>(args, row_streams<1, 3072>(args, first, args.n_rows - first, r));
    }
}

} // namespace

} // namespace hybrimoe::kernels
