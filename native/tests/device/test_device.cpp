// What the test device promises: `test_device lazy|eager|random [DEATH]`. With the name of a death it does what a real
// device punishes and must abort; the test starts itself for that.
#include "test_device.h"
#include "window.h"

#include "../backend/check.h"
#include "graph_copy.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <vector>

namespace {

using test_device::window;

constexpr int64_t n_numbers = 64;
constexpr size_t n_bytes    = n_numbers * sizeof(float);
constexpr size_t uid_offset = 88; // in a graph of the pinned release

std::string mode;
bool is_lazy() {
    return mode == "lazy";
}

ggml_backend_dev_t device(const char * name = "TEST0") {
    return ggml_backend_dev_by_name(name);
}

// Pinned memory of floats.
struct pinned {
    ggml_backend_buffer_ptr buffer{
        ggml_backend_buft_alloc_buffer(ggml_backend_dev_host_buffer_type(device()), n_bytes)};
    float * data = static_cast<float *>(ggml_backend_buffer_get_base(buffer.get()));
    explicit pinned(float value) { fill(value); }
    void fill(float value) { std::fill(data, data + n_numbers, value); }
    bool all(float value) const {
        return std::all_of(data, data + n_numbers, [value](float one) { return one == value; });
    }
};

// A stream, and tensors a, b = 2 a, c = a + b in its device's memory.
struct bench {
    explicit bench(const char * name = "TEST0") : stream(ggml_backend_dev_init(device(name), nullptr)) {
        ggml_init_params params{};
        params.mem_size = 64 * ggml_tensor_overhead() + 2 * ggml_graph_overhead();
        params.no_alloc = true;
        context.reset(ggml_init(params));
        a = ggml_new_tensor_1d(context.get(), GGML_TYPE_F32, n_numbers);
        b = ggml_scale(context.get(), a, 2.0f);
        c = ggml_add(context.get(), a, b);
        memory.reset(ggml_backend_alloc_ctx_tensors(context.get(), stream.get()));
        ggml_set_name(a, "a");
        graph = ggml_new_graph(context.get());
        ggml_build_forward_expand(graph, c);
    }
    void set_uid(uint64_t uid) { std::memcpy(reinterpret_cast<char *>(graph) + uid_offset, &uid, sizeof(uid)); }
    void put(ggml_tensor * t, float value) {
        const std::vector<float> values(n_numbers, value);
        ggml_backend_tensor_set(t, values.data(), 0, n_bytes);
    }
    float held(const ggml_tensor * t) {
        float first = 0.0f;
        ggml_backend_tensor_get(t, &first, 0, sizeof(first));
        return first;
    }
    void compute() { CHECK(ggml_backend_graph_compute_async(stream.get(), graph) == GGML_STATUS_SUCCESS); }
    void upload(ggml_tensor * t, const float * from) {
        ggml_backend_tensor_set_async(stream.get(), t, from, 0, n_bytes);
    }
    void download(const ggml_tensor * t, float * to) { ggml_backend_tensor_get_async(stream.get(), t, to, 0, n_bytes); }
    void wait() { ggml_backend_synchronize(stream.get()); }

    ggml_backend_ptr stream;
    ggml_context_ptr context;
    ggml_backend_buffer_ptr memory;
    ggml_tensor * a     = nullptr;
    ggml_tensor * b     = nullptr;
    ggml_tensor * c     = nullptr;
    ggml_cgraph * graph = nullptr;
};

bool is_poison(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits == 0xffffffff;
}

void test_results_come_late() {
    bench on;
    on.put(on.a, 3.0f);
    pinned out(-1.0f);
    std::vector<float> pageable(n_numbers, -1.0f);
    on.compute();
    on.download(on.c, out.data);
    on.download(on.b, pageable.data());
    if (is_lazy()) {
        CHECK(out.all(-1.0f) && pageable[0] == -1.0f && is_poison(on.held(on.c)));
    } else if (mode == "eager") {
        CHECK(out.all(9.0f) && pageable[0] == 6.0f && on.held(on.c) == 9.0f);
    }
    on.wait();
    CHECK(out.all(9.0f) && pageable[0] == 6.0f && on.held(on.c) == 9.0f);
}

void test_sources_are_read_late_where_pinned() {
    bench on;
    pinned from(1.0f);
    std::vector<float> pageable(n_numbers, 1.0f);
    on.upload(on.a, from.data);
    on.upload(on.b, pageable.data());
    if (mode != "random") {
        from.fill(2.0f);
    }
    std::fill(pageable.begin(), pageable.end(), 2.0f);
    on.wait();
    CHECK(on.held(on.a) == (is_lazy() ? 2.0f : 1.0f));
    CHECK(on.held(on.b) == 1.0f);
}

void test_registered_memory_is_pinned() {
    using register_function     = bool (*)(void *, size_t);
    using unregister_function   = void (*)(void *);
    ggml_backend_reg_t registry = ggml_backend_dev_backend_reg(device());
    const auto pin              = reinterpret_cast<register_function>(
        ggml_backend_reg_get_proc_address(registry, "ggml_backend_register_host_buffer"));
    const auto unpin = reinterpret_cast<unregister_function>(
        ggml_backend_reg_get_proc_address(registry, "ggml_backend_unregister_host_buffer"));
    std::vector<float> memory(3 * n_numbers, 1.0f);
    float * middle = memory.data() + n_numbers;
    CHECK(pin(middle, n_bytes));
    CHECK(!pin(memory.data(), n_bytes + 4) && !pin(middle, n_bytes) && !pin(middle + 1, 4)); // overlaps
    bench on;
    test_device_reset_counts();
    on.upload(on.a, middle);
    on.upload(on.b, memory.data());
    on.upload(on.c, memory.data() + 1); // half of it
    on.wait();
    CHECK(window()["sets_pinned"] == 1 && window()["sets_pageable"] == 2);
    unpin(middle);
    CHECK(pin(memory.data(), 2 * n_bytes));
    unpin(memory.data());
}

// The buffer's own transfers do not wait for a stream.
void test_blocking_calls_do_not_wait() {
    bench on;
    on.put(on.a, 1.0f);
    on.compute();
    if (mode != "random") { // either would do
        on.put(on.a, 5.0f);
    }
    on.wait();
    CHECK(on.held(on.c) == (is_lazy() ? 15.0f : 3.0f));
}

void test_nodes_are_read_at_the_call() {
    bench on;
    on.put(on.a, 1.0f);
    on.compute();
    ggml_tensor * source = on.c->src[0];
    on.c->src[0]         = on.b;
    const float other    = 100.0f;
    std::memcpy(on.b->op_params, &other, sizeof(other));
    void * data = on.c->data;
    on.c->data  = nullptr;
    on.wait();
    on.c->src[0] = source;
    on.c->data   = data;
    CHECK(on.held(on.c) == 3.0f);
}

// As CUDA's recorded graphs: the same uid is the same graph, whatever its nodes say now.
void test_the_same_uid_runs_the_same_graph() {
    bench on;
    on.put(on.a, 1.0f);
    test_device_reset_counts();
    const auto set_scale = [&](float scale) { std::memcpy(on.b->op_params, &scale, sizeof(scale)); };
    const auto run       = [&](uint64_t uid) {
        on.set_uid(uid);
        CHECK(test_device::uid_of(on.graph) == uid);
        on.compute();
        on.wait();
        return on.held(on.c);
    };
    CHECK(run(0) == 3.0f && window()["graphs_changed"] == 1);
    CHECK(run(0) == 3.0f && window()["graphs_changed"] == 1);
    set_scale(4.0f);
    CHECK(run(0) == 5.0f && window()["graphs_changed"] == 2);
    CHECK(run(77) == 5.0f && window()["graphs_changed"] == 2);
    set_scale(2.0f);
    CHECK(run(77) == 5.0f && window()["graphs_changed"] == 2);
    CHECK(run(78) == 3.0f && window()["graphs_changed"] == 3);
    CHECK(window()["graphs"] == 6 && window()["nodes"] == 12);
}

void test_events_order_streams() {
    bench first;
    const ggml_backend_ptr second(ggml_backend_dev_init(device(), nullptr));
    const ggml_backend_event_ptr event(ggml_backend_event_new(device()));
    ggml_backend_event_synchronize(event.get()); // never recorded: nothing to wait for
    ggml_backend_event_wait(second.get(), event.get());
    pinned from(4.0f), out(-1.0f), missed(-1.0f);
    const auto read = [&](float * to) { ggml_backend_tensor_get_async(second.get(), first.c, to, 0, n_bytes); };
    first.upload(first.a, from.data);
    first.compute();
    ggml_backend_event_record(event.get(), first.stream.get());
    if (mode != "random") {
        read(missed.data); // before the wait
    }
    ggml_backend_event_wait(second.get(), event.get());
    read(out.data);
    ggml_backend_synchronize(second.get());
    CHECK(out.all(12.0f));
    CHECK(mode == "random" || (is_lazy() ? is_poison(missed.data[0]) : missed.all(12.0f)));
}

void test_an_event_is_a_place_in_the_queue() {
    bench on;
    const ggml_backend_event_ptr event(ggml_backend_event_new(device()));
    pinned one(1.0f), two(2.0f), out(-1.0f);
    on.upload(on.a, one.data);
    ggml_backend_event_record(event.get(), on.stream.get());
    on.upload(on.a, two.data);
    ggml_backend_event_synchronize(event.get());
    CHECK(on.held(on.a) == 1.0f || (!is_lazy() && on.held(on.a) == 2.0f));
    ggml_backend_event_record(event.get(), on.stream.get());
    ggml_backend_event_synchronize(event.get());
    CHECK(on.held(on.a) == 2.0f);
}

void test_copies_between_streams_and_devices() {
    bench first, same, other("TEST1");
    for (bench * to : {&same, &other}) {
        first.put(first.a, 7.0f);
        to->put(to->a, 0.0f);
        first.compute();
        ggml_backend_tensor_copy_async(first.stream.get(), to->stream.get(), first.c, to->a);
        CHECK(!is_lazy() || to->held(to->a) == 0.0f);
        to->compute();
        to->wait();
        CHECK(to->held(to->c) == 63.0f);
        ggml_backend_tensor_copy(to->a, first.b); // blocking
        CHECK(first.held(first.b) == 21.0f);
        first.wait();
    }
}

void test_waits_are_counted_once() {
    bench on;
    const ggml_backend_ptr second(ggml_backend_dev_init(device(), nullptr));
    const ggml_backend_event_ptr event(ggml_backend_event_new(device()));
    on.put(on.a, 1.0f);
    test_device_reset_counts();
    on.wait();
    CHECK(window()["waits"] == 0 && window()["idle_syncs"] == 1);
    on.compute();
    on.wait();
    on.wait();
    CHECK(window()["waits"] == 1 && window()["idle_syncs"] == 2 && window()["graphs"] == 1 && window()["nodes"] == 2);
    pinned out(0.0f);
    on.compute();
    on.download(on.c, out.data);
    ggml_backend_event_record(event.get(), on.stream.get());
    ggml_backend_event_wait(second.get(), event.get());
    ggml_backend_synchronize(second.get()); // for the other stream's work
    CHECK(window()["waits"] == 2 && out.all(3.0f));
    ggml_backend_event_synchronize(event.get());
    on.wait();
    CHECK(window()["waits"] == 2 && window()["idle_syncs"] == 4);
    CHECK(window()["events_recorded"] == 1 && window()["events_waited"] == 1);
    CHECK(window()["gets_pinned"] == 1 && window()["gets_pinned_bytes"] == n_bytes && window()["gets_pageable"] == 0);
    test_device_reset_counts();
    CHECK(window()["graphs"] == 0);
    on.put(on.a, 1.0f);
    on.upload(on.a, std::vector<float>(n_numbers, 1.0f).data());
    on.wait();
    CHECK(window()["blocking_sets_pageable"] == 1 && window()["blocking_sets_pageable_bytes"] == n_bytes);
    CHECK(window()["sets_pageable"] == 1 && window()["sets_pinned"] == 0 && window()["waits"] == 1);
    char small[8];
    CHECK(test_device_counts(small, sizeof(small)) > 8 && std::strlen(small) == 7);
}

void test_queries_are_counted() {
    test_device_reset_counts();
    ggml_backend_dev_props props;
    ggml_backend_dev_get_props(device(), &props);
    size_t free = 0, total = 0;
    ggml_backend_dev_memory(device(), &free, &total);
    CHECK(ggml_backend_dev_type(device()) == GGML_BACKEND_DEVICE_TYPE_GPU);
    CHECK(window()["props_queries"] == 1 && window()["memory_queries"] == 1 && window()["type_queries"] == 1);
    CHECK(props.memory_total == total && total == size_t{64} << 20 &&
          std::strcmp(props.device_id, "0000:01:00.0") == 0);
    ggml_backend_dev_props other;
    ggml_backend_dev_get_props(device("TEST1"), &other);
    CHECK(other.memory_total == size_t{32} << 20 && other.device_id == nullptr);
    CHECK(props.caps.async && props.caps.events && props.caps.host_buffer && !props.caps.buffer_from_host_ptr);
}

void test_memory() {
    ggml_backend_buffer_type_t type = ggml_backend_dev_buffer_type(device());
    ggml_backend_dev_t cpu          = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    CHECK(!ggml_backend_buft_is_host(type) && ggml_backend_buft_get_alignment(type) == 128);
    CHECK(ggml_backend_dev_supports_buft(device(), type) && !ggml_backend_dev_supports_buft(device("TEST1"), type));
    CHECK(!ggml_backend_dev_supports_buft(cpu, type));
    CHECK(!ggml_backend_dev_supports_buft(device(), ggml_backend_dev_host_buffer_type(device())));
    CHECK(ggml_backend_dev_supports_buft(cpu, ggml_backend_dev_host_buffer_type(device())));
    size_t free = 0, total = 0;
    const auto ask = [&] { ggml_backend_dev_memory(device(), &free, &total); };
    ask();
    CHECK(free == total);
    ggml_backend_buffer_ptr first(ggml_backend_buft_alloc_buffer(type, total - (1 << 20)));
    const void * where = ggml_backend_buffer_get_base(first.get());
    ask();
    CHECK(free == 1 << 20);
    test_device_reset_counts();
    CHECK(ggml_backend_buft_alloc_buffer(type, (1 << 20) + 1) == nullptr && window()["allocations_failed"] == 1);
    const ggml_backend_buffer_ptr second(ggml_backend_buft_alloc_buffer(type, 1 << 20));
    CHECK(second != nullptr);
    first.reset();
    const ggml_backend_buffer_ptr third(ggml_backend_buft_alloc_buffer(type, 4096));
    CHECK(ggml_backend_buffer_get_base(third.get()) == where); // a freed address comes again
    CHECK(window()["allocations"] == 2 && window()["frees"] == 1);
}

void test_padding_of_quantised_rows() {
    ggml_backend_buffer_type_t type = ggml_backend_dev_buffer_type(device());
    ggml_init_params params{};
    params.mem_size = 4 * ggml_tensor_overhead();
    params.no_alloc = true;
    const ggml_context_ptr context(ggml_init(params));
    ggml_tensor * t   = ggml_new_tensor_2d(context.get(), GGML_TYPE_Q8_0, 32, 3);
    const size_t size = ggml_backend_buft_get_alloc_size(type, t);
    CHECK(size == ggml_nbytes(t) + ggml_row_size(GGML_TYPE_Q8_0, 480));
    const ggml_backend_buffer_ptr buffer(ggml_backend_buft_alloc_buffer(type, size + 128));
    ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    ggml_tensor * bytes = ggml_new_tensor_1d(context.get(), GGML_TYPE_I8, static_cast<int64_t>(size + 128));
    void * base         = ggml_backend_buffer_get_base(buffer.get());
    CHECK(ggml_backend_tensor_alloc(buffer.get(), bytes, base) == GGML_STATUS_SUCCESS);
    CHECK(ggml_backend_tensor_alloc(buffer.get(), t, base) == GGML_STATUS_SUCCESS);
    std::vector<unsigned char> held(size + 128);
    ggml_backend_tensor_get(bytes, held.data(), 0, held.size());
    CHECK(held[ggml_nbytes(t) - 1] == 0xff && held[ggml_nbytes(t)] == 0 && held[size - 1] == 0 && held[size] == 0xff);
}

// Ends with streams that hold work: they run it.
void test_the_end_of_a_stream() {
    pinned from(2.0f);
    bench on;
    on.upload(on.a, from.data);
    on.compute();
    on.stream.reset();
    CHECK(on.held(on.c) == 6.0f);
}

struct death {
    std::function<void()> of;
    const char * says;
    bool only_lazy = false; // elsewhere the work may be done already
};

const std::map<std::string, death> & deaths() {
    static const std::map<std::string, death> all = {
        {"touch", {[] { *static_cast<volatile char *>(bench().a->data) = 1; }, ""}},
        {"host source",
         {[] {
              bench on;
              pinned host(1.0f);
              on.a->buffer = host.buffer.get();
              on.a->data   = host.data;
              on.compute();
          },
          "node 'node_0' (SCALE), of which source 0 'a' is not in its memory: 256 bytes at "}},
        {"source of another device",
         {[] {
              bench on, other("TEST1");
              on.a->buffer = other.a->buffer;
              on.a->data   = other.a->data;
              on.compute();
          },
          "the host's or another's"}},
        {"freed source",
         {[] {
              bench on;
              on.memory.reset();
              on.compute();
          },
          "beyond any allocation or in a freed one"}},
        {"same uid, freed source",
         {[] {
              bench on;
              on.set_uid(5);
              on.compute();
              on.wait();
              on.memory.reset();
              on.compute();
          },
          "whose uid says that it is the same as before"}},
        {"same uid, other nodes",
         {[] {
              bench on;
              on.set_uid(5);
              on.compute();
              ggml_tensor * more = ggml_add(on.context.get(), on.c, on.c);
              more->data         = on.a->data;
              more->buffer       = on.a->buffer;
              ggml_build_forward_expand(on.graph, more);
              on.compute();
          },
          "a graph of 3 nodes whose uid is that of one with 2"}},
        {"free in use",
         {[] {
              bench on;
              on.compute();
              on.memory.reset();
          },
          "is freed while queued work uses it", true}},
        {"free pinned in use",
         {[] {
              bench on;
              pinned from(1.0f);
              on.upload(on.a, from.data);
              from.buffer.reset();
          },
          "queued transfers use", true}},
        {"other type",
         {[] {
              bench on, other("TEST1");
              on.upload(other.a, std::vector<float>(n_numbers).data());
          },
          "'a' is in a buffer of type TEST1, not TEST0"}},
        {"freed event",
         {[] {
              bench on;
              ggml_backend_event_t event = ggml_backend_event_new(device());
              ggml_backend_event_free(event);
              ggml_backend_event_record(event, on.stream.get());
          },
          "an event is used that was freed"}},
        {"event freed while it is waited for",
         {[] {
              bench on;
              on.compute();
              ggml_backend_event_t event = ggml_backend_event_new(device());
              ggml_backend_event_record(event, on.stream.get());
              std::thread other([event] { ggml_backend_event_synchronize(event); });
              std::this_thread::sleep_for(std::chrono::milliseconds(50));
              ggml_backend_event_free(event);
              other.join();
          },
          "an event is used that was freed", true}},
        {"beyond",
         {[] {
              bench on;
              on.a->ne[0] = 1 << 20;
              ggml_backend_tensor_get(on.a, std::vector<char>(1 << 16).data(), 0, 1 << 16);
          },
          "are not in the memory of TEST0"}},
    };
    return all;
}

void test_deaths(const char * self) {
    for (const auto & one : deaths()) {
        if (one.second.only_lazy && !is_lazy()) {
            continue;
        }
        const std::string command =
            std::string("HYBRIMOE_TEST_DEVICE_WORK_US=200000 '") + self + "' " + mode + " '" + one.first + "' 2>&1";
        FILE * child = popen(command.c_str(), "r");
        std::string text;
        char part[256];
        while (std::fgets(part, sizeof(part), child) != nullptr) {
            text += part;
        }
        const int status = pclose(child);
        CHECK(status != 0 && text.find("survived") == std::string::npos);
        if (text.find(one.second.says) == std::string::npos) {
            check::fail(__FILE__, __LINE__, one.first.c_str());
            std::fprintf(stderr, "  %s: status %d, %s\n", one.first.c_str(), status, text.c_str());
        }
    }
}

} // namespace

int main(int argc, char ** argv) {
    mode = argc > 1 ? argv[1] : "lazy";
    setenv("HYBRIMOE_TEST_DEVICE_MODE", mode.c_str(), 1);
    setenv("HYBRIMOE_TEST_DEVICES", "2", 1);
    setenv("HYBRIMOE_TEST_DEVICE_MIB", "64,32", 1);
    setenv("HYBRIMOE_TEST_DEVICE_ID", "0000:01:00.0,none", 1);
    ggml_backend_register(test_device_registry());
    if (argc > 2) {
        deaths().at(argv[2]).of();
        std::fprintf(stderr, "survived\n");
        return 0;
    }
    CHECK(ggml_backend_dev_get(0) != device());
    test_device_stand_first();
    CHECK(ggml_backend_dev_get(0) == device() && device("CPU") != nullptr);
    for (int i = 0; i < (mode == "random" ? 20 : 1); i++) {
        test_results_come_late();
        test_sources_are_read_late_where_pinned();
        test_registered_memory_is_pinned();
        test_blocking_calls_do_not_wait();
        test_nodes_are_read_at_the_call();
        test_the_same_uid_runs_the_same_graph();
        test_events_order_streams();
        test_an_event_is_a_place_in_the_queue();
        test_copies_between_streams_and_devices();
        test_waits_are_counted_once();
        test_the_end_of_a_stream();
    }
    test_queries_are_counted();
    test_memory();
    test_padding_of_quantised_rows();
    test_deaths(argv[0]);
    return check::report();
}
