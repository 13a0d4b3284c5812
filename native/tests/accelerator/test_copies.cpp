// Slots and the thread that fills them: what was ordered arrives, in the order that was promised, whole or not at all.
#include "../backend/check.h"
#include "accelerator/device_worker.h"
#include "settings.h"

#include "ggml-backend.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <set>

using namespace hybrimoe;

namespace {

constexpr int n_slots = 5, n_expert = 12;
constexpr int64_t n_embd = 48, n_ff = 32;
constexpr double enough_us = 60e6; // ends a test that hangs; no test is judged by its time

// Experts of two matrices and a bias; every byte says which expert and part it is of.
struct host_experts {
    host_experts() {
        add(part_role::up, n_embd, n_ff, 0);
        add(part_role::down, n_ff, n_embd, 64); // with a gap between experts
        add(part_role::down_bias, n_embd, 1, 0);
        layout.n_embd   = n_embd;
        layout.n_ff     = n_ff;
        layout.n_expert = n_expert;
    }

    void add(part_role role, int64_t n_in, int64_t n_out, size_t gap) {
        expert_part part;
        part.role         = role;
        part.n_in         = n_in;
        part.n_out        = n_out;
        part.n_bytes      = static_cast<size_t>(n_in * n_out) * sizeof(float);
        part.stride_bytes = part.n_bytes + gap;
        std::vector<char> bytes(part.stride_bytes * n_expert);
        for (size_t i = 0; i < bytes.size(); i++) {
            bytes[i] = static_cast<char>(i / part.stride_bytes * 16 + memory.size() + 1);
        }
        memory.push_back(std::move(bytes));
        part.host = memory.back().data();
        layout.parts.push_back(part);
    }

    expert_layout layout;
    std::vector<std::vector<char>> memory;
};

settings config_of(const std::string & faults) {
    return parse_settings("{\"devices\": [\"CPU\"], \"faults\": {" + faults + "}}", settings());
}

struct bench {
    explicit bench(const std::string & faults = "")
        : config(config_of(faults)), port(choose_devices(config)[0], 0, config), worker(port, config, clock) {
        CHECK(slots.allocate(port, experts.layout, n_slots));
    }

    copy_order order(int64_t id, int expert, int slot) const {
        copy_order one;
        one.id     = id;
        one.layout = &experts.layout;
        one.slots  = &slots;
        one.expert = expert;
        one.slot   = slot;
        return one;
    }

    // The expert that lies in the slot; -1 for zeros, -2 for a mixture.
    int held(int slot) const {
        std::set<int> seen;
        for (size_t i = 0; i < experts.layout.parts.size(); i++) {
            const size_t n = experts.layout.parts[i].n_bytes;
            std::vector<char> bytes(n);
            ggml_backend_tensor_get(slots.part(i), bytes.data(), static_cast<size_t>(slot) * n, n);
            for (const char byte : bytes) {
                const int value = static_cast<unsigned char>(byte);
                seen.insert(value == 0 ? -1 : value % 16 == static_cast<int>(i) + 1 ? value / 16 : -2);
            }
        }
        return seen.size() == 1 ? *seen.begin() : -2;
    }

    settings config;
    step_clock clock;
    host_experts experts;
    device_port port;
    slot_set slots;
    device_worker worker; // last, as in an accelerator
};

// Notes which copies had ended when it was called.
class note : public worker_call {
public:
    explicit note(bench & on) : on_(on) {}
    void run(int index) override {
        std::vector<copy_result> results;
        on_.worker.collect(results);
        for (const copy_result & result : results) {
            ended.push_back(result.id);
        }
        called_ = index;
    }
    int called() const { return called_; }
    std::vector<int64_t> ended; // read after wait_idle

private:
    bench & on_;
    std::atomic<int> called_{-1};
};

void test_slots_begin_as_zeros() {
    bench b;
    for (size_t i = 0; i < b.experts.layout.parts.size(); i++) {
        std::vector<char> bytes(b.experts.layout.parts[i].n_bytes * n_slots);
        ggml_backend_tensor_get(b.slots.part(i), bytes.data(), 0, bytes.size());
        CHECK(std::all_of(bytes.begin(), bytes.end(), [](char c) { return c == 0; }));
    }
    CHECK(b.slots.n_slots() == n_slots);
    CHECK(b.slots.n_bytes() >= n_slots * b.experts.layout.expert_bytes());
    CHECK(slot_set::needed_bytes(b.port, b.experts.layout, n_slots) <= b.slots.n_bytes());
    const uint64_t generation = b.slots.generation();
    CHECK(b.slots.allocate(b.port, b.experts.layout, 2) && b.slots.n_slots() == 2);
    CHECK(b.slots.generation() != generation);
    CHECK(b.slots.allocate(b.port, b.experts.layout, 0) && b.slots.n_slots() == 0 && b.slots.n_bytes() == 0);
}

void test_no_memory() {
    const settings config = config_of("\"fail_alloc_from\": 2, \"fail_alloc_until\": 2");
    device_port port(choose_devices(config)[0], 0, config);
    const host_experts experts;
    slot_set slots;
    CHECK(slots.allocate(port, experts.layout, 1));
    CHECK(!slots.allocate(port, experts.layout, 1) && slots.n_slots() == 0 && slots.n_bytes() == 0);
    CHECK(slots.allocate(port, experts.layout, 1) && slots.n_slots() == 1);
}

void test_random_copies(const std::string & faults, bool may_fail) {
    bench b(faults);
    std::mt19937_64 rng(3);
    std::vector<int> expected(n_slots, -1);
    int64_t id       = 0;
    double all_bytes = 0.0;
    std::vector<copy_result> results;
    for (int wave = 0; wave < 60; wave++) {
        std::map<int64_t, std::pair<int, int>> sent; // id: slot, expert
        for (int slot = 0; slot < n_slots; slot++) {
            if (rng() % 3 == 0) {
                continue;
            }
            const int expert = static_cast<int>(rng() % n_expert);
            sent[++id]       = {slot, expert};
            b.worker.copy(b.order(id, expert, slot), rng() % 2 == 0);
            if (rng() % 4 == 0) {
                b.worker.promote(id);
            }
        }
        b.worker.promote(-5); // nobody's
        CHECK(b.worker.wait_idle(enough_us));
        b.worker.collect(results);
        CHECK(results.size() == sent.size());
        for (const copy_result & result : results) {
            const auto found = sent.find(result.id);
            CHECK(found != sent.end());
            CHECK(result.us >= 0.0 && result.end_us > 0.0);
            if (found == sent.end()) {
                continue;
            }
            if (result.ok) {
                CHECK(result.bytes == static_cast<double>(b.experts.layout.expert_bytes()));
                expected[static_cast<size_t>(found->second.first)] = found->second.second;
                all_bytes += result.bytes;
            }
            CHECK(result.ok || may_fail);
            sent.erase(found);
        }
        CHECK(sent.empty());
        for (int slot = 0; slot < n_slots; slot++) {
            CHECK(b.held(slot) == expected[static_cast<size_t>(slot)]);
        }
        b.worker.collect(results);
        CHECK(results.empty());
    }
    CHECK(static_cast<double>(b.worker.n_bytes_copied()) == all_bytes);
    CHECK(all_bytes > 0.0 && b.worker.busy_us() > 0.0);
}

void test_calls_wait_for_copies() {
    for (const char * faults : {"", "\"delay_copy_us\": 100"}) {
        bench b(faults);
        for (int round = 0; round < 30; round++) {
            note after(b);
            std::vector<int64_t> before;
            for (int i = 0; i < 4; i++) {
                const int64_t id = round * 10 + i;
                before.push_back(id);
                b.worker.copy(b.order(id, (round + i) % n_expert, i), true);
            }
            b.worker.call(&after, round);
            b.worker.copy(b.order(round * 10 + 4, round % n_expert, 4), true);
            CHECK(b.worker.wait_idle(enough_us));
            CHECK(after.called() == round);
            CHECK(after.ended == before);
            std::vector<copy_result> rest;
            b.worker.collect(rest);
            CHECK(rest.size() == 1);
        }
    }
}

// What is wanted now goes before what may be wanted later.
void test_urgent_first() {
    bench b("\"delay_copy_us\": 2000");
    for (int i = 0; i < 6; i++) {
        b.worker.copy(b.order(i, i, i % n_slots), false);
    }
    b.worker.copy(b.order(100, 7, 0), true);
    b.worker.promote(5);
    CHECK(b.worker.wait_idle(enough_us));
    std::vector<copy_result> results;
    b.worker.collect(results);
    CHECK(results.size() == 7);
    const auto at = [&](int64_t id) {
        return std::find_if(results.begin(), results.end(), [id](const copy_result & r) { return r.id == id; }) -
               results.begin();
    };
    // Two may have begun before; the rest of the idle ones come after both.
    CHECK(at(100) < at(5));
    CHECK(at(5) < at(3) && at(5) < at(4));
}

void test_failures() {
    bench b("\"fail_copy_every\": 2");
    b.worker.copy(b.order(1, 4, 0), true);
    b.worker.copy(b.order(2, 5, 0), true);
    b.worker.copy(b.order(3, 6, 1), true);
    CHECK(b.worker.wait_idle(enough_us));
    CHECK(!b.worker.has_failed(1) && b.worker.has_failed(2) && !b.worker.has_failed(3));
    CHECK(b.held(0) == 4 && b.held(1) == 6); // the failed one left what was there
    std::vector<copy_result> results;
    b.worker.collect(results);
    CHECK(!b.worker.has_failed(2)); // forgotten
    CHECK(results.size() == 3 && !results[1].ok);
    CHECK(static_cast<double>(b.worker.n_bytes_copied()) == 2.0 * static_cast<double>(b.experts.layout.expert_bytes()));
}

void test_timeout_and_end() {
    auto b = std::make_unique<bench>("\"stick_copy\": 1, \"stick_us\": 100000");
    for (int i = 0; i < 50; i++) {
        b->worker.copy(b->order(i, i % n_expert, i % n_slots), i % 2 == 0);
    }
    CHECK(!b->worker.wait_idle(1000.0));
    b.reset(); // what has not begun is dropped; memory is freed after the thread has ended
}

} // namespace

int main() {
    test_slots_begin_as_zeros();
    test_no_memory();
    test_random_copies("", false);
    test_random_copies("\"fail_copy_every\": 3", true);
    test_random_copies("\"delay_copy_us\": 50", false);
    test_calls_wait_for_copies();
    test_urgent_first();
    test_failures();
    test_timeout_and_end();
    return check::report();
}
