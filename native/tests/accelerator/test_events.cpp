// An accelerator whose device has events: they are there as long as anything may wait for them.
#include "../backend/check.h"
#include "event_device.h"
#include "hybrid/accelerator.h"
#include "hybrid/device_step.h"

#include <chrono>
#include <memory>
#include <thread>
#include <vector>

using namespace hybrimoe;

namespace {

constexpr int n_expert = 6;

struct bench {
    bench() {
        expert_part part;
        part.role         = part_role::up;
        part.n_in         = 32;
        part.n_out        = 32;
        part.n_bytes      = 32 * 32 * sizeof(float);
        part.stride_bytes = part.n_bytes;
        memory.assign(part.n_bytes * n_expert, 1);
        part.host = memory.data();
        layout.parts.push_back(part);
        layout.n_embd   = 32;
        layout.n_ff     = 32;
        layout.n_expert = n_expert;
        on              = std::make_unique<accelerator>(event_device::get(), 0, config, clock);
        on->slots.resize(1);
        CHECK(on->of_layer(0).allocate(on->port, layout, n_scratch_slots));
    }

    void copy(int64_t id, int slot) {
        copy_order one;
        one.id          = id;
        one.layout      = &layout;
        one.slots       = &on->of_layer(0);
        one.expert      = static_cast<int>(id) % n_expert;
        one.slot        = slot;
        one.slot_in_use = true;
        one.after       = on->scratch_event(slot);
        on->worker.copy(one, true);
    }

    settings config;
    step_clock clock;
    std::vector<char> memory;
    expert_layout layout;
    std::unique_ptr<accelerator> on;
};

void test_all_are_freed_once() {
    const event_device::counts before = event_device::read_counts();
    {
        bench b;
        CHECK(b.on->port.has_events() && b.on->end_event != nullptr);
        for (int64_t id = 0; id < 40; id++) {
            const int slot = static_cast<int>(id) % n_scratch_slots;
            CHECK(b.on->scratch_event(slot) != nullptr);
            b.copy(id, slot);
        }
        CHECK(b.on->worker.wait_idle(60e6));
        std::vector<copy_result> results;
        b.on->worker.collect(results);
        CHECK(results.size() == 40);
    }
    const event_device::counts after = event_device::read_counts();
    CHECK(after.n_made > before.n_made && after.n_freed - before.n_freed == after.n_made - before.n_made);
    CHECK(after.n_recorded > before.n_recorded && after.n_late == 0);
}

// The worker waits for an earlier step's event while the accelerator is given up.
void test_end_while_a_copy_waits() {
    event_device::set_wait_us(50000);
    {
        bench b;
        const int n_waits = event_device::read_counts().n_waits;
        b.copy(1, 0);
        while (event_device::read_counts().n_waits == n_waits) {
            std::this_thread::sleep_for(std::chrono::microseconds(100));
        }
    }
    event_device::set_wait_us(0);
    const event_device::counts after = event_device::read_counts();
    CHECK(after.n_late == 0 && after.n_freed == after.n_made);
}

} // namespace

int main() {
    test_all_are_freed_once();
    test_end_while_a_copy_waits();
    return check::report();
}
