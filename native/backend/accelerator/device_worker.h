// One thread per accelerator: copies experts into slots, demanded ones first, and runs what must come after a copy.
// The computing thread hands over orders and collects results; it never waits for a copy that nobody needs yet.
#pragma once

#include "accelerator/device_port.h"
#include "accelerator/expert_layout.h"
#include "accelerator/slot_set.h"

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace hybrimoe {

// The clock of one instance: microseconds since it was made.
class step_clock {
public:
    double now_us() const { return of_us(std::chrono::steady_clock::now()); }
    double of_us(std::chrono::steady_clock::time_point then) const {
        return std::chrono::duration<double, std::micro>(then - start_).count();
    }
    // Of a moment in nanoseconds of std::chrono::steady_clock.
    double of_ns(uint64_t steady_ns) const {
        return of_us(std::chrono::steady_clock::time_point(std::chrono::nanoseconds(steady_ns)));
    }

private:
    std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

struct copy_order {
    int64_t id                   = 0;
    const expert_layout * layout = nullptr;
    const slot_set * slots       = nullptr;
    int expert                   = 0;
    int slot                     = 0;
    // Work that was queued earlier on the computing instance may still read the slot.
    bool slot_in_use           = false;
    ggml_backend_event_t after = nullptr; // that work's event; null: wait for the whole instance
};

struct copy_result {
    int64_t id    = 0;
    bool ok       = false;
    double bytes  = 0.0;
    double us     = 0.0; // on the link, without waiting for earlier copies
    double end_us = 0.0;
};

// Something to be run on the worker once all copies ordered before it are done.
class worker_call {
public:
    virtual ~worker_call()      = default;
    virtual void run(int index) = 0;
    // run() threw.
    virtual void on_failure() noexcept {}
};

class device_worker {
public:
    device_worker(device_port & port, const settings & config, const step_clock & clock);
    ~device_worker(); // what has not begun is dropped

    // Urgent orders run first, in order of arrival; others when there is nothing urgent.
    void copy(const copy_order & order, bool urgent);
    void call(worker_call * what, int index);
    // Makes an order that has not begun urgent.
    void promote(int64_t id);

    // Whether the copy has ended in failure; forgotten when its result is collected.
    bool has_failed(int64_t id) const;

    // Results since the last call, oldest first, into `out` (cleared).
    void collect(std::vector<copy_result> & out);
    // Whether an order failed with an exception since the last call, and what it said. A failed copy is a result, too.
    bool take_failure(std::string & what);
    // Waits until every order is done. False when that takes longer than timeout_us.
    bool wait_idle(double timeout_us);

    int64_t n_bytes_copied() const;
    double busy_us() const;

private:
    struct order {
        copy_order copy;
        worker_call * what = nullptr; // null: a copy
        int index          = 0;
    };
    struct flight {
        copy_order copy;
        double begin_us            = 0.0;
        double bytes               = 0.0;
        bool ok                    = true;
        ggml_backend_event_t event = nullptr;
    };
    struct staging_chunk {
        char * data                = nullptr;
        ggml_backend_event_t event = nullptr;
        bool in_use                = false;
    };

    void run();
    template <class body> bool attempt(body one) noexcept;
    void keep_failure(const char * what) noexcept;
    void drop(const copy_order & order) noexcept;
    void start_copy(const copy_order & order);
    void finish_copy();
    void copy_part(ggml_tensor * to, size_t offset, const char * from, size_t n_bytes);
    char * next_chunk();
    void pace(const flight & done) const;

    device_port & port_;
    const step_clock & clock_;
    double throttle_bytes_per_us_;
    fault_plan faults_;
    int64_t n_copies_ = 0, n_attempts_ = 0;

    buffer_ptr staging_;
    std::vector<staging_chunk> chunks_;
    size_t at_chunk_ = 0;
    std::deque<flight> flights_;
    std::vector<ggml_backend_event_t> free_events_;
    double link_free_us_ = 0.0;

    mutable std::mutex mutex_;
    std::condition_variable changed_; // orders, or none left
    std::deque<order> urgent_, idle_;
    std::vector<copy_result> results_;
    bool has_failed_ = false;
    std::string failure_; // what the last one said
    bool busy_       = false;
    bool stop_       = false;
    int64_t n_bytes_ = 0;
    double busy_us_  = 0.0;
    std::thread thread_; // last: runs with everything above made
};

} // namespace hybrimoe
