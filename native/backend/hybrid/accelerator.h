// An accelerator with everything that runs on it and all that is known of it alone. Owned by the fleet; the computing
// thread changes it, and its worker's thread runs what it was ordered to.
#pragma once

#include "accelerator/device_compute.h"
#include "accelerator/device_worker.h"

#include <memory>
#include <vector>

namespace hybrimoe {

class device_step;

constexpr int n_scratch_slots = 4;

struct accelerator {
    accelerator(ggml_backend_dev_t device, int index, const settings & config, const step_clock & clock);
    ~accelerator();

    // An event of the scratch slot's last user, recorded on the computing instance; null where there are no events.
    ggml_backend_event_t scratch_event(int slot) const {
        return scratch_events.empty() ? nullptr : scratch_events[static_cast<size_t>(slot)].get();
    }
    const slot_set & of_layer(int layer) const { return slots[static_cast<size_t>(layer)]; }
    slot_set & of_layer(int layer) { return slots[static_cast<size_t>(layer)]; }

    device_port port;
    std::vector<slot_set> slots;   // per layer
    std::vector<slot_set> scratch; // per class: experts that prefill streams through
    std::vector<event_ptr> scratch_events;
    event_ptr end_event; // of a step that is watched; null where there are no events

    std::vector<int> wanted;                     // slots per layer, after set-up and before memory became scarce
    double shrink     = 1.0;                     // share of them that it has now
    bool is_suspended = false;                   // a copy got stuck
    bool is_lost      = false;                   // its slots are in disorder: nothing is shared any more
    bool told_memory = false, told_copy = false; // said once

    // Of the block at hand: its share, copies of the share's own items, and when its launch began.
    std::unique_ptr<device_step> share;
    std::vector<copy_order> orders;
    double launch_us = 0.0;

    device_compute compute;
    device_worker worker; // last: its thread uses what stands above
};

} // namespace hybrimoe
