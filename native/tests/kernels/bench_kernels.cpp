// Speed of the expert kernels: decode bandwidth against a measured stream read, and multiply-adds of prefill.
//
//   bench_kernels [threads] [set] [type ...]
//
// Each figure is a median of short repetitions; experts rotate through more memory than the caches hold.
#include <omp.h>
#include <time.h>

#include <algorithm>
#include <chrono>
#include <string>

#include "moe_fixture.h"

using namespace fixture;

namespace {

// With one thread, its CPU time: other programs on the machine then disturb less.
bool use_cpu_time = false;

double seconds() {
    if (use_cpu_time) {
        timespec now = {};
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
        return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
    }
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v[v.size() / 2];
}

double load_average() {
    double load = -1.0;
    if (FILE * f = fopen("/proc/loadavg", "r")) {
        if (fscanf(f, "%lf", &load) != 1) {
            load = -1.0;
        }
        fclose(f);
    }
    return load;
}

struct omp_barrier {
    explicit omp_barrier(int n) : count(n) {}
    int count;
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int> round{0};
    static void call(void * p) {
        auto * self    = static_cast<omp_barrier *>(p);
        const int turn = self->round.load(std::memory_order_acquire);
        if (self->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == self->count) {
            self->arrived.store(0, std::memory_order_relaxed);
            self->round.store(turn + 1, std::memory_order_release);
            return;
        }
        while (self->round.load(std::memory_order_acquire) == turn) {
            __builtin_ia32_pause();
        }
    }
};

double stream_bytes_per_s(const std::vector<uint8_t> & memory, int n_threads) {
    std::vector<double> rates;
    const size_t part = memory.size() / 8;
    for (int i = 0; i < 24; ++i) {
        const uint8_t * from = memory.data() + static_cast<size_t>(i % 8) * part;
        std::vector<uint64_t> sink(static_cast<size_t>(n_threads) * 8);
        const double start = seconds();
#pragma omp parallel num_threads(n_threads)
        {
            const auto t       = static_cast<size_t>(omp_get_thread_num());
            const size_t bytes = part / static_cast<size_t>(n_threads) / 64 * 64;
            uint64_t sum[8]    = {};
            for (size_t at = t * bytes; at + 64 <= (t + 1) * bytes; at += 64) {
                __builtin_prefetch(from + at + 3072);
                uint64_t v[8];
                memcpy(v, from + at, 64);
                for (int j = 0; j < 8; ++j) {
                    sum[j] += v[j];
                }
            }
            for (uint64_t s : sum) {
                sink[t * 8] += s;
            }
        }
        rates.push_back(static_cast<double>(part) / (seconds() - start));
        if (sink[0] == 42) {
            printf(" ");
        }
    }
    return median(rates);
}

void run(const moe_plan & plan, const moe_layer & layer, const moe_batch & batch, void * scratch, int n_threads) {
    omp_barrier barrier(n_threads);
#pragma omp parallel num_threads(n_threads)
    {
        const team t = {omp_get_thread_num(), n_threads, omp_barrier::call, &barrier};
        moe_forward(plan, layer, batch, scratch, t);
    }
}

// One expert again and again, small enough for the second-level cache: what the dot products could read
double cached_bytes_per_s(const kernel_set * ks, int32_t type, int n_threads) {
    model mod;
    mod.make(type, type, type, 1024, 512, 1, ffn_op::swiglu, 1, 0, false);
    input in;
    in.make(1, 1, 1024, 2);
    std::vector<float> y(1024);
    const moe_plan plan = make_plan(ks, mod.layer, 1, 1, n_threads);
    scratch_buffer scratch(plan.scratch_bytes);
    std::vector<double> times;
    for (int i = 0; i < 200; ++i) {
        const double start = seconds();
        run(plan, mod.layer, in.batch(y.data()), scratch.p, n_threads);
        times.push_back(seconds() - start);
    }
    return static_cast<double>(mod.gate.m.expert_bytes * 2 + mod.down.m.expert_bytes) / median(times);
}

void bench_type(const kernel_set * ks, int32_t type, int n_threads, double stream) {
    const int n_expert = 128;
    const int top_k    = 8;
    model mod;
    mod.make(type, type, type, 2048, 768, n_expert, ffn_op::swiglu, 1, 0, false);
    const double layer_bytes =
        static_cast<double>(mod.gate.m.row_bytes * 768 * 2 + mod.down.m.row_bytes * 2048) * top_k;

    input in;
    in.make(1, top_k, 2048, 2);
    std::vector<float> y(2048);
    const moe_plan plan = make_plan(ks, mod.layer, 1, top_k, n_threads);
    scratch_buffer scratch(plan.scratch_bytes);
    std::vector<double> times;
    for (int i = 0; i < 160; ++i) {
        for (int k = 0; k < top_k; ++k) {
            in.ids[static_cast<size_t>(k)] = (i * top_k + k) % n_expert;
        }
        const double start = seconds();
        run(plan, mod.layer, in.batch(y.data()), scratch.p, n_threads);
        times.push_back(seconds() - start);
    }
    const double decode = median(times);
    printf("%-7s %-7s decode %7.1f us  %5.1f GB/s (%3.0f %% of stream)", kernel_set_name(ks), find_type(type)->name,
           decode * 1e6, layer_bytes / decode * 1e-9, layer_bytes / decode / stream * 100.0);

    printf("  cached %5.1f GB/s ", cached_bytes_per_s(ks, type, n_threads) * 1e-9);
    // 8 experts get n tokens each
    for (const int n : {4, 6, 8, 16, 32, 256}) {
        input many;
        many.make(n * 8, 1, 2048, 3);
        std::vector<float> ym(many.x.size());
        const moe_plan p = make_plan(ks, mod.layer, n * 8, 1, n_threads, size_t{1} << 30);
        scratch_buffer s(p.scratch_bytes);
        std::vector<double> t;
        for (int i = 0; i < (n >= 64 ? 5 : 9); ++i) {
            for (size_t j = 0; j < many.ids.size(); ++j) {
                many.ids[j] = (i * 8 + static_cast<int>(j) % 8) % n_expert;
            }
            const double start = seconds();
            run(p, mod.layer, many.batch(ym.data()), s.p, n_threads);
            t.push_back(seconds() - start);
        }
        const double macs = 3.0 * 2048.0 * 768.0 * 8.0 * n;
        printf("  %d: %5.1f", n, macs / median(t) * 1e-9 / n_threads);
    }
    printf(" GMAC/s a thread\n");
    fflush(stdout);
}

// A layer with next to no work: what the phases and barriers cost
void bench_fixed(const kernel_set * ks, int n_threads) {
    model mod;
    mod.make(type_q4_0, type_q4_0, type_q4_0, 64, 64, 8, ffn_op::swiglu, 1, 0, false);
    input in;
    in.make(1, 8, 64, 2);
    for (int k = 0; k < 8; ++k) {
        in.ids[static_cast<size_t>(k)] = k;
    }
    std::vector<float> y(64);
    const moe_plan plan = make_plan(ks, mod.layer, 1, 8, n_threads);
    scratch_buffer scratch(plan.scratch_bytes);
    std::vector<double> times;
    std::vector<double> empty;
    for (int i = 0; i < 300; ++i) {
        double start = seconds();
        run(plan, mod.layer, in.batch(y.data()), scratch.p, n_threads);
        times.push_back(seconds() - start);
        start = seconds();
#pragma omp parallel num_threads(n_threads)
        {
            asm volatile("" ::: "memory");
        }
        empty.push_back(seconds() - start);
    }
    printf("%-7s layer of 8 experts of 64 x 64 %.1f us; an empty parallel region %.1f us\n", kernel_set_name(ks),
           median(times) * 1e6, median(empty) * 1e6);
}

} // namespace

int main(int argc, char ** argv) {
    const int n_threads   = argc > 1 ? atoi(argv[1]) : 2;
    const kernel_set * ks = argc > 2 ? find_kernel_set(argv[2]) : best_kernel_set();
    if (ks == nullptr || n_threads < 1) {
        fprintf(stderr, "error: no kernel set '%s' on this CPU\nhint: bench_kernels [threads] [set] [type ...]\n",
                argc > 2 ? argv[2] : "");
        return 2;
    }
    use_cpu_time = n_threads == 1;
    printf("load before: %.2f\n", load_average());
    double stream = 0.0;
    {
        const std::vector<uint8_t> memory(size_t{1} << 30, 1);
        stream = stream_bytes_per_s(memory, n_threads);
    }
    printf("stream read with %d threads: %.1f GB/s\n", n_threads, stream * 1e-9);
    bench_fixed(ks, n_threads);
    for (const int32_t type : {type_q4_0, type_q4_k, type_q8_0, type_q6_k, type_q4_1, type_q5_k, type_iq4_xs,
                               type_iq4_nl, type_mxfp4, type_bf16, type_f16, type_f32}) {
        bool wanted = argc <= 3;
        for (int i = 3; i < argc; ++i) {
            wanted = wanted || strcmp(argv[i], find_type(type)->name) == 0;
        }
        if (wanted) {
            bench_type(ks, type, n_threads, stream);
        }
    }
    printf("load after: %.2f\n", load_average());
    return 0;
}
