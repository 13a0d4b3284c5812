// For benchmarks only: expert ids from a file in place of the router's, because routers with random weights have no
// locality. Format: int32 magic 0x52544d48 ("HMTR"), version 1, n_steps, n_layers, top_k; then int32 ids
// [n_steps, n_layers, top_k]. The file is used again from the start when it ends.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace hybrimoe {

class route_trace {
public:
    // Throws std::runtime_error when the file is missing, damaged or too short.
    void load(const std::string & path);
    bool is_active() const { return !ids_.empty(); }

    // Replaces ids [top_k, n_tokens] of the layer with those of the next n_tokens steps.
    void replace(int layer, int32_t * ids, int64_t n_tokens, int32_t top_k, int32_t n_expert);
    void next_pass(int64_t n_tokens) { step_ = (step_ + n_tokens) % n_steps_; }

private:
    std::vector<int32_t> ids_;
    int64_t n_steps_ = 1, n_layers_ = 0, top_k_ = 0;
    int64_t step_ = 0;
};

} // namespace hybrimoe
