#include "cpu_probe.h"
#include "device_probe.h"

#include <chrono>
#include <cstdio>
#include <exception>
#include <memory>
#include <stdexcept>
#include <thread>

struct hybrimoe_cpu_probe {
    explicit hybrimoe_cpu_probe(const hybrimoe_ffn_shape & shape) : probe(shape) {}
    hybrimoe::probe::cpu_probe probe;
};

struct hybrimoe_device_probe {
    hybrimoe_device_probe(int32_t device, const hybrimoe_ffn_shape & shape) : probe(device, shape) {}
    hybrimoe::probe::device_probe probe;
};

namespace {

template <class body> int guarded(char * error, size_t error_size, body run) {
    try {
        run();
        return 0;
    } catch (const std::bad_alloc &) {
        std::snprintf(error, error_size, "there is too little memory to probe with");
    } catch (const std::exception & problem) {
        std::snprintf(error, error_size, "%s", problem.what());
    } catch (...) {
        std::snprintf(error, error_size, "unexpected exception while probing");
    }
    return -1;
}

template <class type> const type & given(const type * pointer) {
    if (pointer == nullptr) {
        throw std::invalid_argument("an argument is missing");
    }
    return *pointer;
}

template <class type> type & given(type * pointer) {
    return const_cast<type &>(given(static_cast<const type *>(pointer)));
}

} // namespace

extern "C" {

int hybrimoe_cpu_probe_open(const struct hybrimoe_ffn_shape * shape, hybrimoe_cpu_probe ** out, char * error,
                            size_t error_size) {
    return guarded(error, error_size, [&]() { given(out) = new hybrimoe_cpu_probe(given(shape)); });
}

void hybrimoe_cpu_probe_close(hybrimoe_cpu_probe * probe) {
    delete probe;
}

int hybrimoe_cpu_probe_run(hybrimoe_cpu_probe * probe, int32_t n_active, int32_t n_tokens, int32_t n_threads,
                           int32_t n_runs, double * us, char * error, size_t error_size) {
    return guarded(error, error_size,
                   [&]() { given(probe).probe.run(n_active, n_tokens, n_threads, n_runs, &given(us)); });
}

int hybrimoe_cpu_probe_nodes(hybrimoe_cpu_probe * probe, int32_t n_nodes, int32_t n_threads, int32_t n_runs,
                             double * us, char * error, size_t error_size) {
    return guarded(error, error_size, [&]() { given(probe).probe.run_nodes(n_nodes, n_threads, n_runs, &given(us)); });
}

int hybrimoe_cpu_probe_dense(hybrimoe_cpu_probe * probe, int32_t n_experts, int32_t n_threads, int32_t n_runs,
                             double * us, char * error, size_t error_size) {
    return guarded(error, error_size,
                   [&]() { given(probe).probe.run_dense(n_experts, n_threads, n_runs, &given(us)); });
}

int hybrimoe_probe_read(int32_t n_threads, size_t n_bytes, double seconds, double * bytes_per_us, char * error,
                        size_t error_size) {
    return guarded(error, error_size, [&]() {
        if (n_threads < 1 || n_bytes < (1 << 20) || !(seconds > 0.0) || seconds > 60.0) {
            throw std::invalid_argument("the reads to probe are out of range");
        }
        hybrimoe::probe::reader_team team(n_threads, n_bytes);
        const auto step     = std::chrono::duration<double>(seconds / 10.0);
        given(bytes_per_us) = team.run(seconds, [&]() { std::this_thread::sleep_for(step); });
    });
}

int hybrimoe_device_probe_open(int32_t device, const struct hybrimoe_ffn_shape * shape, hybrimoe_device_probe ** out,
                               char * error, size_t error_size) {
    return guarded(error, error_size, [&]() { given(out) = new hybrimoe_device_probe(device, given(shape)); });
}

void hybrimoe_device_probe_close(hybrimoe_device_probe * probe) {
    delete probe;
}

int hybrimoe_device_probe_has(const hybrimoe_device_probe * probe, int32_t kind) {
    return probe != nullptr && probe->probe.has(kind) ? 1 : 0;
}

int hybrimoe_device_probe_copy(hybrimoe_device_probe * probe, int32_t kind, size_t n_bytes, int32_t n_runs, double * us,
                               char * error, size_t error_size) {
    return guarded(error, error_size, [&]() { given(probe).probe.copy(kind, n_bytes, n_runs, &given(us)); });
}

int hybrimoe_device_probe_sync(hybrimoe_device_probe * probe, int32_t n_runs, double * us, char * error,
                               size_t error_size) {
    return guarded(error, error_size, [&]() { given(probe).probe.sync(n_runs, &given(us)); });
}

int hybrimoe_device_probe_run(hybrimoe_device_probe * probe, int32_t n_active, int32_t n_tokens, int32_t n_runs,
                              double * us, char * error, size_t error_size) {
    return guarded(error, error_size, [&]() { given(probe).probe.run(n_active, n_tokens, n_runs, &given(us)); });
}

int hybrimoe_device_probe_together(hybrimoe_device_probe * probe, int32_t n_threads, size_t n_bytes, double seconds,
                                   double * read_bytes_per_us, double * copy_bytes_per_us, char * error,
                                   size_t error_size) {
    return guarded(error, error_size, [&]() {
        given(read_bytes_per_us) = given(probe).probe.together(n_threads, n_bytes, seconds, &given(copy_bytes_per_us));
    });
}

} // extern "C"
