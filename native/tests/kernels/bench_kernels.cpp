// Speed of the expert kernels: decode bandwidth against plain reads (in 1, 2, 4 and 8 sequential streams a thread),
// multiply-adds of prefill, and the fixed cost of a layer.
//
//   bench_kernels [threads] [set] [type ...]
//
// Each figure is a median of short repetitions; experts rotate through more memory than the caches hold.
#include <omp.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <iterator>
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
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
    }
};

// Reads `bytes` as n sequential streams; one load a cache line is what the memory sees anyway.
template <int n> uint64_t read_streams(const uint8_t * from, size_t bytes) {
    uint64_t sum[n]   = {};
    const size_t part = bytes / n / 64 * 64;
    for (size_t at = 0; at < part; at += 64) {
        for (int i = 0; i < n; ++i) {
            const uint8_t * p = from + static_cast<size_t>(i) * part + at;
            __builtin_prefetch(p + 2048);
            uint64_t v;
            memcpy(&v, p, sizeof(v));
            sum[i] += v;
        }
    }
    uint64_t total = 0;
    for (uint64_t s : sum) {
        total += s;
    }
    return total;
}

constexpr int stream_counts[] = {1, 2, 4, 8};

// Bytes per second of one read of `bytes` by all threads, each with its own part
double read_rate(const uint8_t * from, size_t bytes, int n_streams, int n_threads) {
    std::atomic<uint64_t> sink{0};
    const size_t part  = bytes / static_cast<size_t>(n_threads) / 4096 * 4096;
    const double start = seconds();
#pragma omp parallel num_threads(n_threads)
    {
        const uint8_t * mine = from + static_cast<size_t>(omp_get_thread_num()) * part;
        sink += n_streams == 1   ? read_streams<1>(mine, part)
                : n_streams == 2 ? read_streams<2>(mine, part)
                : n_streams == 4 ? read_streams<4>(mine, part)
                                 : read_streams<8>(mine, part);
    }
    const double elapsed = seconds() - start;
    if (sink == 42) {
        printf(" ");
    }
    return static_cast<double>(part) * n_threads / elapsed;
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

// Decode steps and plain reads of the same memory by the same threads take turns, so that both meet the same machine.
void bench_type(const kernel_set * ks, int32_t type, int n_threads) {
    const int n_expert = 128;
    const int top_k    = 8;
    model mod;
    mod.make(type, type, type, 2048, 768, n_expert, ffn_op::swiglu, 1, 0, false);
    const double layer_bytes =
        static_cast<double>(mod.gate.m.row_bytes * 768 * 2 + mod.down.m.row_bytes * 2048) * top_k;
    const auto * weights      = static_cast<const uint8_t *>(mod.gate.m.data);
    const size_t gate_bytes   = mod.gate.m.expert_bytes * n_expert;
    constexpr size_t n_counts = std::size(stream_counts);

    input in;
    in.make(1, top_k, 2048, 2);
    std::vector<float> y(2048);
    const moe_plan plan = make_plan(ks, mod.layer, 1, top_k, n_threads);
    scratch_buffer scratch(plan.scratch_bytes);
    std::vector<double> times;
    std::vector<double> rates[n_counts];
    for (int i = 0; i < 160; ++i) {
        for (int k = 0; k < top_k; ++k) {
            in.ids[static_cast<size_t>(k)] = (i * top_k + k) * 37 % n_expert;
        }
        const double start = seconds();
        run(plan, mod.layer, in.batch(y.data()), scratch.p, n_threads);
        times.push_back(seconds() - start);
        for (size_t s = 0; s < n_counts; ++s) {
            const size_t part = gate_bytes / 8;
            const size_t at   = (static_cast<size_t>(i) * n_counts + s) % 8 * part;
            rates[s].push_back(read_rate(weights + at, part, stream_counts[s], n_threads));
        }
    }
    const double decode = median(times);
    printf("%-7s %-7s decode %7.1f us  %5.1f GB/s;  plain read", kernel_set_name(ks), find_type(type)->name,
           decode * 1e6, layer_bytes / decode * 1e-9);
    for (size_t s = 0; s < n_counts; ++s) {
        const double rate = median(rates[s]);
        printf("  x%d %.1f GB/s (%.0f %%)", stream_counts[s], rate * 1e-9, layer_bytes / decode / rate * 100.0);
    }

    printf(";  cached %5.1f GB/s ", cached_bytes_per_s(ks, type, n_threads) * 1e-9);
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

// What a layer costs beside its experts: a step whose experts are all computed elsewhere, with everything but the
// products
void bench_fixed(const kernel_set * ks, int n_threads) {
    model mod;
    mod.make(type_q4_0, type_q4_0, type_q4_0, 2048, 768, 8, ffn_op::swiglu, 1, 0, false);
    input in;
    in.make(1, 8, 2048, 2);
    std::fill(in.ids.begin(), in.ids.end(), -1);
    std::vector<float> y(2048);
    const moe_plan plan = make_plan(ks, mod.layer, 1, 8, n_threads);
    scratch_buffer scratch(plan.scratch_bytes);
    std::vector<double> times;
    std::vector<double> empty;
    for (int i = 0; i < 1000; ++i) {
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
    printf("%-7s a layer without experts to compute %.1f us; an empty parallel region %.1f us\n", kernel_set_name(ks),
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
    bench_fixed(ks, n_threads);
    for (const int32_t type : {type_q4_0, type_q4_k, type_q8_0, type_q6_k, type_q4_1, type_q5_k, type_iq4_xs,
                               type_iq4_nl, type_mxfp4, type_bf16, type_f16, type_f32}) {
        bool wanted = argc <= 3;
        for (int i = 3; i < argc; ++i) {
            wanted = wanted || strcmp(argv[i], find_type(type)->name) == 0;
        }
        if (wanted) {
            bench_type(ks, type, n_threads);
        }
    }
    printf("load after: %.2f\n", load_average());
    return 0;
}
