// Times expert batches on the CPU by the path that the dispatcher takes: a GGML_OP_CUSTOM node on ggml's own team.
#pragma once

#include "backend/cpu_executor.h"
#include "backend/kernel_executor.h"
#include "hybrimoe_probe.h"
#include "kernels/moe_kernels.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace hybrimoe::probe {

double now_us();

class cpu_probe {
public:
    // Throws std::invalid_argument for a shape that the kernels cannot run, std::bad_alloc.
    explicit cpu_probe(const hybrimoe_ffn_shape & shape);
    ~cpu_probe();
    cpu_probe(const cpu_probe &)             = delete;
    cpu_probe & operator=(const cpu_probe &) = delete;

    void run(int n_active, int n_tokens, int n_threads, int n_runs, double * us);
    void run_dense(int n_experts, int n_threads, int n_runs, double * us);
    void run_nodes(int n_nodes, int n_threads, int n_runs, double * us);

private:
    static void callback(ggml_tensor *, int thread, int n_threads, void * self);
    void work(int thread, int n_threads);

    std::vector<uint8_t> gate_, up_, down_;
    kernels::moe_layer layer_;
    cpu_executor cpu_;
    ggml_context * context_ = nullptr;
    ggml_tensor * node_     = nullptr;
    spin_barrier barrier_;

    kernels::moe_plan plan_;
    kernels::moe_batch batch_;
    std::vector<uint8_t> scratch_;
    std::vector<float> x_, y_, weights_;
    std::vector<int32_t> ids_;
    int next_expert_ = 0;
};

// Threads that read main memory until they are stopped.
class reader_team {
public:
    reader_team(int n_threads, size_t n_bytes);
    ~reader_team();
    reader_team(const reader_team &)             = delete;
    reader_team & operator=(const reader_team &) = delete;

    // Lets all threads read for about `seconds` and calls `meanwhile` on this one. Returns bytes per microsecond.
    template <class body> double run(double seconds, body meanwhile) {
        const double start = begin();
        while (now_us() - start < seconds * 1e6) {
            meanwhile();
        }
        return end(start);
    }

private:
    struct threads;

    double begin();
    double end(double start_us);

    int n_threads_;
    std::vector<uint64_t> memory_;
    std::unique_ptr<threads> threads_;
};

} // namespace hybrimoe::probe
