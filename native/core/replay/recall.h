// How well a prefetcher's scores foresee a coming layer.
#pragma once

#include "../prefetch/prefetcher.h"
#include "cache_replay.h"

namespace hybrimoe {

// recall[i]: share of the experts that layer l + distance used among the n_best[i] best predicted at layer l.
status replay_recall(const replay_trace & trace, prefetcher & policy, int distance, int64_t n_warm_tokens,
                     const int32_t * n_best, int n, double * recall);

} // namespace hybrimoe
