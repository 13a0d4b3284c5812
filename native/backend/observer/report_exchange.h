// How others learn what only the computing thread may look at without a lock: while it computes, it is asked and
// answers between two blocks, so that it never waits for whoever asks. While it is idle, the one who asks looks for
// itself.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <thread>

namespace hybrimoe {

template <class report> class report_exchange {
public:
    report_exchange() = default;
    ~report_exchange() { delete ready_.load(); }
    report_exchange(const report_exchange &)             = delete;
    report_exchange & operator=(const report_exchange &) = delete;

    // Computing thread: a pass is under way, or is over.
    void begin_work() {
        worker_.store(std::this_thread::get_id(), std::memory_order_relaxed);
        is_working_.store(true);
    }
    void end_work() { is_working_.store(false); }
    // Computing thread, between two blocks: answers if it is asked. make(parts) gives a report.
    template <class maker> void answer(const maker & make) noexcept {
        if (wanted_.load(std::memory_order_relaxed) == 0) {
            return;
        }
        const unsigned parts = wanted_.exchange(0);
        try {
            delete ready_.exchange(new report(make(parts)));
        } catch (const std::exception &) { // no memory: whoever asks gives up waiting
        }
    }

    // Any thread. `make` may take locks that the computing thread takes too: it is called here only while that is idle,
    // or does not answer for `patience` (a large step between two blocks).
    template <class maker> report ask(unsigned parts, const maker & make) const {
        if (!is_working_.load() || worker_.load(std::memory_order_relaxed) == std::this_thread::get_id()) {
            return make(parts);
        }
        std::lock_guard<std::mutex> one_at_a_time(askers_);
        delete ready_.exchange(nullptr); // of somebody who did not wait
        wanted_.store(parts);
        const auto until = std::chrono::steady_clock::now() + patience;
        while (is_working_.load() && std::chrono::steady_clock::now() < until) {
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
            if (const std::unique_ptr<report> answer{ready_.exchange(nullptr)}) {
                return std::move(*answer);
            }
        }
        wanted_.store(0);
        return make(parts);
    }

private:
    static constexpr std::chrono::milliseconds patience{100};

    std::atomic<bool> is_working_{false};
    std::atomic<std::thread::id> worker_{};
    mutable std::mutex askers_;
    mutable std::atomic<unsigned> wanted_{0};
    mutable std::atomic<report *> ready_{nullptr};
};

} // namespace hybrimoe
