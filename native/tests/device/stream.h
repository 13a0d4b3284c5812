// A queue of operations and the thread that runs them, as late as their order allows or earlier.
#pragma once

#include "memory.h"

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

namespace test_device {

enum class run_mode { lazy, eager, random };

class stream;

// A place in a stream's queue: everything that was queued before it. Without a stream, nothing.
struct point {
    std::shared_ptr<stream> on;
    uint64_t number = 0;
    uint64_t work   = 0; // the last operation before it that is more than waiting
};

struct operation {
    std::function<void()> run;
    std::vector<region_ptr> uses; // must stay until it has run
    point after;                  // of another stream; runs after that
};

class stream : public std::enable_shared_from_this<stream> {
public:
    // Each operation takes `work_us` microseconds more.
    static std::shared_ptr<stream> start(int device, run_mode mode, size_t work_us);
    ~stream();
    stream(const stream &)             = delete;
    stream & operator=(const stream &) = delete;

    int device() const { return device_; }
    int number() const { return number_; }

    void push(operation one);
    // What is queued from here on runs after that point of any stream.
    void wait_for(const point & other);
    point here();
    // Runs what is left, then ends the thread. Once, and the last call.
    void finish();

    // Makes the caller wait until that point has passed. Returns whether work was before it that nobody had waited for.
    static bool wait(const point & until);

private:
    stream(int device, run_mode mode, size_t work_us);
    void run();
    void enqueue(operation && one, bool is_work);
    void demand(uint64_t number);
    void learn(uint64_t number);

    struct queued {
        operation what;
        uint64_t number;
    };

    const int device_;
    const int number_;
    const run_mode mode_;
    const std::chrono::microseconds work_time_;
    std::mt19937 rng_;
    // All of these are guarded by the one lock of all streams.
    std::deque<queued> queue_;
    uint64_t n_queued_ = 0; // operations so far
    uint64_t n_done_   = 0;
    uint64_t demanded_ = 0; // up to here somebody waits
    uint64_t work_     = 0;
    uint64_t known_    = 0;                        // up to here somebody has waited
    std::deque<std::pair<uint64_t, point>> waits_; // its waits for others, from `known_` on
    bool stop_ = false;
    std::condition_variable wake_;
    std::condition_variable passed_;
    std::thread thread_;
};

} // namespace test_device
