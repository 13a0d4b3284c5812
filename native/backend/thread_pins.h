// Threads of ggml's team kept on processors of their own.
#pragma once

#include <utility>
#include <vector>

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#endif

namespace hybrimoe {

// Team threads live as long as the program: each is pinned once, when it first works here. The first one is left alone:
// it is the caller's own thread, and threads that it starts (copies, the host's) would inherit the pin.
class thread_pins {
public:
    // cpus[i]: the processor of the team's thread i (cpus[0] is not used). Empty: no thread is pinned.
    explicit thread_pins(std::vector<int> cpus) : cpus_(std::move(cpus)) {}

    // Called by the thread itself. A processor that the system refuses leaves the thread where it may be.
    void apply(int thread) const {
#ifdef __linux__
        static thread_local int pinned_to = -1;
        if (thread <= 0 || static_cast<size_t>(thread) >= cpus_.size()) {
            return;
        }
        const int cpu = cpus_[static_cast<size_t>(thread)];
        if (cpu == pinned_to || cpu < 0 || cpu >= CPU_SETSIZE) {
            return;
        }
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        pthread_setaffinity_np(pthread_self(), sizeof(one), &one);
        pinned_to = cpu; // also when refused: not asked again at every step
#else
        (void)thread;
#endif
    }

private:
    std::vector<int> cpus_;
};

} // namespace hybrimoe
