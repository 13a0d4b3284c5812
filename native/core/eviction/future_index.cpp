#include "future_index.h"

namespace hybrimoe {

status future_index::set(const future_trace & trace) {
    const auto n_layers = static_cast<size_t>(shape_.n_layers);
    const auto top_k    = static_cast<size_t>(shape_.top_k);
    next_.assign(static_cast<size_t>(shape_.n_keys()), never);
    uses_.assign(n_layers, {});
    steps_.assign(n_layers, {});
    cursor_.assign(n_layers, 0);
    now_ = 0;
    for (int64_t token = 0; token < trace.n_tokens; ++token) {
        for (size_t layer = 0; layer < n_layers; ++layer) {
            const int32_t * ids = trace.experts + (static_cast<size_t>(token) * n_layers + layer) * top_k;
            if (ids[0] < 0) {
                continue;
            }
            steps_[layer].push_back(token * shape_.n_layers + static_cast<int64_t>(layer));
            for (size_t k = 0; k < top_k; ++k) {
                uses_[layer].push_back({shape_.key(static_cast<int>(layer), ids[k]), never});
            }
        }
    }
    // Backwards: after the loop next_ holds every expert's first use.
    for (size_t layer = 0; layer < n_layers; ++layer) {
        for (size_t step = steps_[layer].size(); step-- > 0;) {
            for (size_t k = 0; k < top_k; ++k) {
                use & u = uses_[layer][step * top_k + k];
                u.next  = next_[static_cast<size_t>(u.key)];
            }
            for (size_t k = 0; k < top_k; ++k) {
                next_[static_cast<size_t>(uses_[layer][step * top_k + k].key)] = steps_[layer][step];
            }
        }
    }
    return {};
}

void future_index::advance(int layer) {
    const auto l      = static_cast<size_t>(layer);
    const size_t step = cursor_[l];
    if (l >= steps_.size() || step >= steps_[l].size()) {
        return; // past the known future nothing is used again
    }
    ++cursor_[l];
    now_             = steps_[l][step];
    const auto top_k = static_cast<size_t>(shape_.top_k);
    for (size_t k = 0; k < top_k; ++k) {
        const use & u                     = uses_[l][step * top_k + k];
        next_[static_cast<size_t>(u.key)] = u.next;
    }
}

} // namespace hybrimoe
