// Rows of single (token, expert) pairs through ggml's CPU kernels: for blocks whose other pairs an accelerator
// computes, where the result must equal plain llama.cpp's.
#pragma once

#include "accelerator/device_port.h"
#include "accelerator/expert_layout.h"
#include "cpu_executor.h"
#include "hybrid/device_step.h"

#include <vector>

namespace hybrimoe {

class host_rows {
public:
    // Computes the pairs for which `wanted` is non-zero ([top_k, n_tokens]; null: all) and forgets earlier rows unless
    // `keep`.
    ggml_status run(cpu_executor & cpu, const expert_layout & layout, const routed_pairs & pairs,
                    const uint8_t * wanted, int n_threads, bool keep);
    // [n_embd]; null when the pair was not computed.
    const float * row(size_t pair) const {
        return row_of_[pair] < 0 ? nullptr : rows_.data() + row_of_[pair] * n_embd_;
    }

private:
    int64_t n_embd_ = 0;
    std::vector<int64_t> row_of_; // per pair; -1: none
    std::vector<float> rows_, x_, scales_[3];
    std::vector<int32_t> ids_;
    std::vector<std::vector<float>> work_;
};

} // namespace hybrimoe
