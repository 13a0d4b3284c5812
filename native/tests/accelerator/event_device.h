// A CPU device with events, so that the paths for devices that have them run here too: its work is done when a call
// returns, and waiting for an event takes a moment, as on a device that is busy. Uses of freed events are counted.
#pragma once

#include "ggml-backend.h"

namespace event_device {

ggml_backend_dev_t get(); // one for the process

struct counts {
    int n_made = 0, n_freed = 0, n_recorded = 0, n_waits = 0;
    int n_late = 0; // uses of a freed event
};
counts read_counts();
void set_wait_us(int us); // of each wait

} // namespace event_device
