// The common part of the three Belady oracles.
#pragma once

#include "future_index.h"

#include <limits>

namespace hybrimoe {

class belady_oracle final : public eviction_policy {
public:
    belady_oracle(const model_shape & shape, bool bypass, int64_t window_tokens)
        : future_(shape), n_layers_(shape.n_layers), bypass_(bypass), window_(window_tokens) {}

    status set_future(const future_trace & trace) override { return future_.set(trace); }
    void on_step(const router_step & step) override { future_.advance(step.layer); }
    bool may_bypass() const override { return bypass_; }

    double keep_value(int key) const override {
        const int64_t next = future_.next_use(key);
        if (next == future_index::never ||
            (window_ != future_index::never && (next - future_.now() + n_layers_ - 1) / n_layers_ > window_)) {
            return -std::numeric_limits<double>::infinity();
        }
        return -static_cast<double>(next);
    }

private:
    future_index future_;
    int n_layers_;
    bool bypass_;
    int64_t window_;
};

} // namespace hybrimoe
