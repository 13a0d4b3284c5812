// Never slower than plain llama.cpp: compares what tokens take with what the best plain placement would, and gives up
// one liberty after the other while it loses. Steps back up on trial, after a pause that doubles with every failure.
//
// It has no clock and knows no devices: microseconds per token come in, a level comes out. Windows are judged by the
// median of their tokens' ratios, each token against its own floor: one token that another program delayed decides
// nothing, and routing that costs plain llama.cpp more as well is not a loss.
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

constexpr int n_guard_levels = 5;

const char * guard_level_name(guard_level level);

struct guard_options {
    int window        = 16;   // tokens that decide
    double tolerance  = 0.03; // slower than the floor by more than this share is a loss
    double gain       = 0.02; // a level is better than another if it is faster by more than this share
    double slower     = 0.06; // a trial fails if it is slower by more than this share, though still no loss
    int pause_tokens  = 16;   // before the first trial
    int max_pause     = 256;
    int early_tokens  = 4;     // a trial ends after so many tokens ...
    double early_loss = 1.25;  // ... if it is so much slower than what it left
    double share      = 0.008; // of the time that refilling slots for a trial may take
    bool has_prefetch = true;  // else the level without it is left out
};

// One decoded token. All in microseconds, over the same span (governor.h).
struct guard_token {
    double token_us    = 0.0; // what its MoE layers took
    double floor_us    = 0.0; // what the best plain placement with the same memory would take
    double overhead_us = 0.0; // of token_us, what no level gives up: it is not held against a level
    double price_us    = 0.0; // of token_us, what trials took: they are paid on purpose
};

struct guard_change {
    guard_level from = guard_level::full;
    guard_level to   = guard_level::full;
    double token_us  = 0.0; // medians of the window that decided
    double floor_us  = 0.0;
    bool is_trial    = false;
};

class guard {
public:
    guard() = default;
    explicit guard(const guard_options & options) : options_(options), pause_(options.pause_tokens) {}

    // True when the level changed; `out` says how.
    bool on_token(const guard_token & token, guard_change & out);
    // Filling slots anew for a change of level took so long. It is the price of the trials that need it.
    void on_refill(double us) { refill_us_ = us; }
    // A cost has jumped: what a trial found before may not hold any more, so the next one comes soon.
    void on_costs_changed();

    guard_level level() const { return level_; }
    bool is_on_trial() const { return on_trial_; }
    int64_t n_changes() const { return n_changes_; }
    double floor_us() const { return last_floor_us_; }
    double token_us() const { return last_token_us_; }

private:
    static constexpr int max_window = 64;

    guard_level next(int by) const;
    bool change(guard_level to, bool is_trial, guard_change & out);
    bool end_window(double ratio, guard_change & out);
    bool end_trial(double ratio, bool is_full, guard_change & out);
    double pause_tokens() const;

    guard_options options_;
    guard_level level_ = guard_level::full;
    double ratios_[max_window]{}, tokens_us_[max_window]{}, floors_us_[max_window]{};
    int n_             = 0;
    int pause_         = guard_options().pause_tokens;
    int64_t quiet_     = 0; // tokens since the last change
    bool on_trial_     = false;
    bool has_resigned_ = false;         // no level helped: stays where it lost least until the pause is over
    double before_     = 0.0;           // ratio at the level that the trial left
    double measured_[n_guard_levels]{}; // ratio at each level of this descent; 0: not measured
    double refill_us_     = 0.0;
    double last_floor_us_ = 0.0, last_token_us_ = 0.0;
    int64_t n_changes_ = 0;
};

} // namespace hybrimoe
