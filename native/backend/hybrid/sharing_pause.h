// After a step that failed, sharing pauses and is tried again: for a second at first, twice as long with each failure,
// a minute at most. Nothing that one step does switches it off for good. Times are arguments, microseconds of one
// clock.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

namespace hybrimoe {

class sharing_pause {
public:
    static constexpr double first_us = 1e6;
    static constexpr double most_us  = 60e6;

    sharing_pause() = default;
    explicit sharing_pause(double shortest_us) : shortest_us_(shortest_us), next_us_(shortest_us) {}

    // A step failed: sharing pauses from now on.
    void begin(const std::string & reason, double now_us) {
        since_us_ = now_us;
        until_us_ = now_us + next_us_;
        next_us_  = std::min(2.0 * next_us_, most_us);
        is_on_    = true;
        ++n_;
        reason_ = reason; // last: may be short of memory
    }
    // Whether steps are not shared now. The first call after the time has come ends the pause.
    bool is_on(double now_us) {
        is_on_ = is_on_ && now_us < until_us_;
        return is_on_;
    }
    // A step was shared. Once it has worked for as long as the last pause took, the next pause is a short one again.
    void on_success(double now_us) {
        if (n_ > 0 && now_us - until_us_ > until_us_ - since_us_) {
            next_us_ = shortest_us_;
        }
    }

    bool is_on() const { return is_on_; }
    const std::string & reason() const { return reason_; }
    double since_us() const { return since_us_; }
    double until_us() const { return until_us_; }
    int64_t n() const { return n_; }

private:
    std::string reason_;
    double shortest_us_ = first_us, next_us_ = first_us;
    double since_us_ = 0.0, until_us_ = 0.0;
    bool is_on_ = false;
    int64_t n_  = 0;
};

} // namespace hybrimoe
