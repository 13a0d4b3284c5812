#include "accelerator/device_worker.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <stdexcept>

namespace hybrimoe {

namespace {

constexpr size_t n_chunks      = 4;
constexpr size_t chunk_bytes   = size_t{2} << 20;
constexpr size_t max_in_flight = 2; // the next copy is issued while one runs, so that the link does not idle

} // namespace

device_worker::device_worker(device_port & port, const settings & config, const step_clock & clock)
    : port_(port), clock_(clock), throttle_bytes_per_us_(config.throttle_bytes_per_s * 1e-6), faults_(config.faults) {
    bool pinned = false;
    // A device in host memory reads from anywhere.
    staging_ = port.is_cpu() ? nullptr : port.allocate_host(n_chunks * chunk_bytes, pinned);
    for (size_t i = 0; staging_ != nullptr && i < n_chunks; i++) {
        staging_chunk chunk;
        chunk.data  = static_cast<char *>(ggml_backend_buffer_get_base(staging_.get())) + i * chunk_bytes;
        chunk.event = port.has_events() ? ggml_backend_event_new(port.device()) : nullptr;
        chunks_.push_back(chunk);
    }
    for (size_t i = 0; port.has_events() && i < max_in_flight; i++) {
        free_events_.push_back(ggml_backend_event_new(port.device()));
    }
    thread_ = std::thread([this] { run(); });
}

device_worker::~device_worker() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
        urgent_.clear();
        idle_.clear();
    }
    changed_.notify_all();
    thread_.join();
    for (const staging_chunk & chunk : chunks_) {
        if (chunk.event != nullptr) {
            ggml_backend_event_free(chunk.event);
        }
    }
    for (ggml_backend_event_t event : free_events_) {
        ggml_backend_event_free(event);
    }
}

void device_worker::copy(const copy_order & one, bool urgent) {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        (urgent ? urgent_ : idle_).push_back({one, nullptr, 0});
    }
    changed_.notify_all();
}

void device_worker::call(worker_call * what, int index) {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        urgent_.push_back({{}, what, index});
    }
    changed_.notify_all();
}

void device_worker::promote(int64_t id) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = std::find_if(idle_.begin(), idle_.end(), [id](const order & o) { return o.copy.id == id; });
    if (found != idle_.end()) {
        urgent_.push_back(*found);
        idle_.erase(found);
    }
}

bool device_worker::has_failed(int64_t id) const {
    std::lock_guard<std::mutex> lock(mutex_);
    return std::any_of(results_.begin(), results_.end(),
                       [id](const copy_result & result) { return result.id == id && !result.ok; });
}

void device_worker::collect(std::vector<copy_result> & out) {
    out.clear();
    std::lock_guard<std::mutex> lock(mutex_);
    out.swap(results_);
}

bool device_worker::wait_idle(double timeout_us) {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, std::chrono::duration<double, std::micro>(timeout_us),
                             [this] { return urgent_.empty() && idle_.empty() && !busy_; });
}

int64_t device_worker::n_bytes_copied() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return n_bytes_;
}

double device_worker::busy_us() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return busy_us_;
}

bool device_worker::take_failure(std::string & what) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!has_failed_) {
        return false;
    }
    what        = failure_;
    has_failed_ = false;
    return true;
}

void device_worker::keep_failure(const char * what) noexcept try {
    std::lock_guard<std::mutex> lock(mutex_);
    has_failed_ = true;
    failure_    = what;
} catch (const std::exception &) { // no memory for the text
}

// An exception that left the thread would end the process.
template <class body> bool device_worker::attempt(body one) noexcept {
    try {
        if (faults_.fail_worker > 0 && ++n_attempts_ == faults_.fail_worker) {
            throw std::runtime_error("a worker that fails on purpose");
        }
        one();
        return true;
    } catch (const std::exception & error) {
        keep_failure(error.what());
        return false;
    }
}

// A copy that could not begin.
void device_worker::drop(const copy_order & order) noexcept try {
    copy_result result;
    result.id     = order.id;
    result.end_us = clock_.now_us();
    std::lock_guard<std::mutex> lock(mutex_);
    results_.push_back(result);
} catch (const std::exception & error) {
    keep_failure(error.what());
}

void device_worker::run() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
        if (urgent_.empty() && idle_.empty()) {
            if (!flights_.empty()) {
                lock.unlock();
                attempt([this] { finish_copy(); });
                lock.lock();
                continue;
            }
            busy_ = false;
            if (stop_) {
                return;
            }
            changed_.notify_all();
            changed_.wait(lock, [this] { return stop_ || !urgent_.empty() || !idle_.empty(); });
            continue;
        }
        busy_                     = true;
        std::deque<order> & queue = urgent_.empty() ? idle_ : urgent_;
        const order next          = queue.front();
        if (next.what == nullptr && flights_.size() < max_in_flight) {
            queue.pop_front();
            lock.unlock();
            if (!attempt([&] { start_copy(next.copy); })) {
                drop(next.copy);
            }
        } else if (!flights_.empty()) {
            lock.unlock();
            attempt([this] { finish_copy(); });
        } else {
            queue.pop_front();
            lock.unlock();
            if (!attempt([&] { next.what->run(next.index); })) {
                next.what->on_failure();
            }
        }
        lock.lock();
    }
}

// The next free piece of staging memory; waits until what it held has left.
char * device_worker::next_chunk() {
    staging_chunk & chunk = chunks_[at_chunk_];
    if (chunk.in_use) {
        if (chunk.event != nullptr) {
            ggml_backend_event_synchronize(chunk.event);
        } else {
            ggml_backend_synchronize(port_.copies());
        }
        chunk.in_use = false;
    }
    return chunk.data;
}

void device_worker::copy_part(ggml_tensor * to, size_t offset, const char * from, size_t n_bytes) {
    if (chunks_.empty() || port_.is_registered(from, n_bytes)) {
        ggml_backend_tensor_set_async(port_.copies(), to, from, offset, n_bytes);
        return;
    }
    while (n_bytes > 0) {
        const size_t now = std::min(n_bytes, chunk_bytes);
        char * staged    = next_chunk();
        std::memcpy(staged, from, now);
        ggml_backend_tensor_set_async(port_.copies(), to, staged, offset, now);
        staging_chunk & chunk = chunks_[at_chunk_];
        chunk.in_use          = true;
        if (chunk.event != nullptr) {
            ggml_backend_event_record(chunk.event, port_.copies());
        }
        at_chunk_ = (at_chunk_ + 1) % chunks_.size();
        from += now;
        offset += now;
        n_bytes -= now;
    }
}

void device_worker::start_copy(const copy_order & one) {
    n_copies_++;
    if (one.slot_in_use) {
        if (one.after != nullptr) {
            ggml_backend_event_synchronize(one.after);
        } else {
            ggml_backend_synchronize(port_.compute());
        }
    }
    flight begun;
    begun.copy     = one;
    begun.begin_us = clock_.now_us();
    if (faults_.stick_copy == n_copies_) {
        std::this_thread::sleep_for(std::chrono::microseconds(faults_.stick_us));
    }
    begun.ok = faults_.fail_copy_every == 0 || n_copies_ % faults_.fail_copy_every != 0;
    for (size_t i = 0; begun.ok && i < one.layout->parts.size(); i++) {
        const expert_part & part = one.layout->parts[i];
        copy_part(one.slots->part(i), static_cast<size_t>(one.slot) * part.n_bytes,
                  part.host + static_cast<size_t>(one.expert) * part.stride_bytes, part.n_bytes);
        begun.bytes += static_cast<double>(part.n_bytes);
    }
    if (!free_events_.empty()) {
        begun.event = free_events_.back();
        free_events_.pop_back();
        ggml_backend_event_record(begun.event, port_.copies());
    }
    flights_.push_back(begun);
}

// Copies that a test or benchmark wants to be slow take until then.
void device_worker::pace(const flight & done) const {
    double us = static_cast<double>(faults_.delay_copy_us);
    if (throttle_bytes_per_us_ > 0.0) {
        const double least = done.bytes / throttle_bytes_per_us_;
        us += std::max(0.0, std::max(done.begin_us, link_free_us_) + least - clock_.now_us());
    }
    if (us > 0.0) {
        std::this_thread::sleep_for(std::chrono::duration<double, std::micro>(us));
    }
}

void device_worker::finish_copy() {
    const flight done = flights_.front();
    flights_.pop_front();
    if (done.event != nullptr) {
        ggml_backend_event_synchronize(done.event);
        free_events_.push_back(done.event);
    } else {
        ggml_backend_synchronize(port_.copies());
    }
    pace(done);
    const double end = clock_.now_us();
    copy_result result;
    result.id     = done.copy.id;
    result.ok     = done.ok;
    result.bytes  = done.bytes;
    result.us     = end - std::max(done.begin_us, link_free_us_);
    result.end_us = end;
    link_free_us_ = end;
    std::lock_guard<std::mutex> lock(mutex_);
    results_.push_back(result);
    n_bytes_ += done.ok ? static_cast<int64_t>(done.bytes) : 0;
    busy_us_ += result.us;
}

} // namespace hybrimoe
