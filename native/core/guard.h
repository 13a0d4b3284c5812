// Never slower than plain llama.cpp: compares what tokens take with what the best plain placement would, and gives up
// one liberty after the other while it loses. Steps back up on trial, after a pause that doubles with every failure.
//
// It has no clock and knows no devices: microseconds per token come in, a level comes out.
#pragma once

#include <cstdint>

namespace hybrimoe {

// From free to bound. Each level gives up what the ones before it gave up too.
enum class guard_level : int {
    full          = 0,
    no_prefetch   = 1,
    no_demand     = 2, // no copy that a layer waits for
    frozen        = 3, // no copies at all: the cache stays as it is
    static_layers = 4, // whole layers on the accelerator, the others on the CPU
};

const char * guard_level_name(guard_level level);

struct guard_options {
    int window       = 16;   // tokens that decide
    double tolerance = 0.03; // slower than the floor by more than this share is a loss
    double gain      = 0.02; // a trial must be faster than what it left by more than this share
    int pause_tokens = 256;  // before the first trial
    int max_pause    = 16384;
};

struct guard_change {
    guard_level from = guard_level::full;
    guard_level to   = guard_level::full;
    double token_us  = 0.0; // median of the window that decided
    double floor_us  = 0.0; // what plain llama.cpp would have taken, mean of the same tokens
    bool is_trial    = false;
};

class guard {
public:
    guard() = default;
    explicit guard(const guard_options & options) : options_(options), pause_(options.pause_tokens) {}

    // One decoded token: what its MoE layers took, and the estimate for the best plain placement with the same memory.
    // True when the level changed; `out` says how.
    bool on_token(double token_us, double floor_us, guard_change & out);

    guard_level level() const { return level_; }
    int64_t n_changes() const { return n_changes_; }
    double floor_us() const { return last_floor_us_; }
    double token_us() const { return last_token_us_; }

private:
    static constexpr int max_window = 64;

    bool change(guard_level to, bool is_trial, double token_us, double floor_us, guard_change & out);

    guard_options options_;
    guard_level level_ = guard_level::full;
    double tokens_us_[max_window]{};
    double floor_sum_us_  = 0.0;
    int n_                = 0;
    int pause_            = guard_options().pause_tokens;
    int64_t quiet_        = 0; // tokens since the last change
    bool on_trial_        = false;
    double before_us_     = 0.0; // median at the level that the trial left
    double last_floor_us_ = 0.0, last_token_us_ = 0.0;
    int64_t n_changes_ = 0;
};

} // namespace hybrimoe
