// Expert activation matrices (MoE-Infinity, arXiv 2401.14361): uses per layer and expert of one request, and a library
// of past ones. Shared by the eviction policy and the prefetcher of that name.
#pragma once

#include "types.h"

#include <cstddef>
#include <vector>

namespace hybrimoe {

class eam_library {
public:
    eam_library(const model_shape & shape, int capacity, int n_nearest);

    void reset();
    // Files the finished request's matrix; a full library gives up the matrix most like it.
    void on_prompt();
    void observe(const router_step & step);

    // Share of the layer's uses that the nearest past requests gave this expert; of the current request's own uses as
    // long as there is no past one.
    double predicted(int key) const;

private:
    struct matrix {
        std::vector<float> uses;
        std::vector<float> row_sum; // per layer
        double norm2 = 0.0;
        double dot   = 0.0; // with the current request
    };

    void clear_current();
    void find_nearest();

    model_shape shape_;
    size_t capacity_;
    size_t n_nearest_;
    matrix current_;
    std::vector<matrix> past_;
    std::vector<size_t> nearest_;
    int last_layer_ = -1;
};

} // namespace hybrimoe
