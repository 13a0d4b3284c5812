#include "stream.h"

#include "counts.h"

#include <algorithm>
#include <chrono>
#include <mutex>

namespace test_device {

namespace {

// Waiting goes from stream to stream, so that all share one lock. Never destroyed: a program may end with streams left.
std::mutex & mutex() {
    static auto & one = *new std::mutex;
    return one;
}

std::atomic<int> n_streams{0};

} // namespace

stream::stream(int device, run_mode mode, size_t work_us)
    : device_(device), number_(++n_streams), mode_(mode), work_time_(work_us), rng_(static_cast<unsigned>(number_)) {}

std::shared_ptr<stream> stream::start(int device, run_mode mode, size_t work_us) {
    std::shared_ptr<stream> made(new stream(device, mode, work_us));
    made->thread_ = std::thread([raw = made.get()] { raw->run(); });
    return made;
}

stream::~stream() {
    if (thread_.joinable()) { // else it has been finished, and the lock may be held here
        finish();
    }
}

void stream::enqueue(operation && one, bool is_work) {
    for (const region_ptr & used : one.uses) {
        used->n_queued++;
    }
    n_queued_++;
    if (is_work) {
        work_ = n_queued_;
    }
    queue_.push_back({std::move(one), n_queued_});
    if (mode_ == run_mode::random) {
        wake_.notify_all();
    }
}

void stream::push(operation one) {
    std::unique_lock<std::mutex> lock(mutex());
    enqueue(std::move(one), true);
    if (mode_ == run_mode::eager) {
        const uint64_t until = n_queued_;
        demand(until);
        passed_.wait(lock, [&] { return n_done_ >= until; });
    }
}

void stream::wait_for(const point & other) {
    std::lock_guard<std::mutex> lock(mutex());
    if (other.on == nullptr || other.on.get() == this) {
        return; // never recorded; or in order anyway
    }
    operation one;
    one.after = other;
    enqueue(std::move(one), other.work > other.on->known_);
    waits_.emplace_back(n_queued_, other);
}

point stream::here() {
    std::lock_guard<std::mutex> lock(mutex());
    return {shared_from_this(), n_queued_, work_};
}

// The caller holds the lock.
void stream::demand(uint64_t number) {
    if (number > demanded_) {
        demanded_ = number;
        wake_.notify_all();
    }
}

// Somebody has waited for all up to `number`, and so for what that waited for. The caller holds the lock.
void stream::learn(uint64_t number) {
    known_ = std::max(known_, number);
    while (!waits_.empty() && waits_.front().first <= known_) {
        const point other = waits_.front().second;
        waits_.pop_front();
        other.on->learn(other.number);
    }
}

bool stream::wait(const point & until) {
    std::unique_lock<std::mutex> lock(mutex());
    if (until.on == nullptr) {
        return false;
    }
    stream & on         = *until.on;
    const bool had_work = until.work > on.known_;
    on.demand(until.number);
    on.passed_.wait(lock, [&] { return on.n_done_ >= until.number; });
    on.learn(until.number);
    return had_work;
}

void stream::finish() {
    {
        std::lock_guard<std::mutex> lock(mutex());
        stop_ = true;
        demand(n_queued_);
        wake_.notify_all();
    }
    thread_.join();
    std::lock_guard<std::mutex> lock(mutex());
    learn(n_queued_); // and keeps no other stream alive
}

void stream::run() {
    std::unique_lock<std::mutex> lock(mutex());
    while (true) {
        const auto may_run = [this] { return stop_ || n_done_ < demanded_; };
        if (mode_ == run_mode::random && !queue_.empty() && !may_run()) {
            // Now and then it begins by itself.
            wake_.wait_for(lock, std::chrono::microseconds(rng_() % 300), may_run);
        } else {
            wake_.wait(lock, [&] { return may_run() || (mode_ == run_mode::random && !queue_.empty()); });
            if (!may_run()) {
                continue;
            }
        }
        if (queue_.empty()) {
            if (stop_) {
                return;
            }
            continue;
        }
        const queued next = std::move(queue_.front());
        queue_.pop_front();
        if (next.what.after.on != nullptr) {
            stream & other = *next.what.after.on;
            other.demand(next.what.after.number);
            other.passed_.wait(lock, [&] { return other.n_done_ >= next.what.after.number; });
        }
        if (next.what.run) {
            lock.unlock();
            if (work_time_.count() > 0) {
                std::this_thread::sleep_for(work_time_);
            }
            next.what.run();
            lock.lock();
        }
        for (const region_ptr & used : next.what.uses) {
            used->n_queued--;
        }
        n_done_ = next.number;
        passed_.notify_all();
    }
}

} // namespace test_device
