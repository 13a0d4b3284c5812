// An accelerator whose device has events: they are there as long as anything may wait for them.
#include "../backend/check.h"
#include "hybrid/accelerator.h"
#include "hybrid/device_step.h"
#include "test_device.h"
#include "window.h"

#include <chrono>
#include <cstdlib>
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
        on              = std::make_unique<accelerator>(ggml_backend_dev_by_name("TEST0"), 0, config, clock);
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
    test_device_reset_counts();
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
    const nlohmann::json counts = test_device::window();
    CHECK(counts["events_made"] > 0 && counts["events_freed"] == counts["events_made"]);
    CHECK(counts["events_recorded"] > 0);
}

// The worker waits for an earlier step's event while the accelerator is given up: the event must outlive the wait, else
// the device aborts.
void test_end_while_a_copy_waits() {
    test_device_reset_counts();
    {
        bench b;
        const std::vector<char> bytes(1024);
        ggml_backend_t step = b.on->port.compute();
        ggml_backend_tensor_set_async(step, b.on->of_layer(0).part(0), bytes.data(), 0, bytes.size());
        ggml_backend_event_record(b.on->scratch_event(0), step);
        b.copy(1, 0);
        std::this_thread::sleep_for(std::chrono::milliseconds(10)); // the step takes longer
    }
    const nlohmann::json counts = test_device::window();
    CHECK(counts["waits"] > 0 && counts["events_freed"] == counts["events_made"]);
}

} // namespace

int main() {
    setenv("HYBRIMOE_TEST_DEVICE_WORK_US", "30000", 1);
    ggml_backend_register(test_device_registry());
    test_all_are_freed_once();
    test_end_while_a_copy_waits();
    return check::report();
}
