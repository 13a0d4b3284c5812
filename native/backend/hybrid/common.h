// What every part of the hybrid dispatch reads: the settings in force, the log, the clock and the layers. Owned by
// `hybrid`, which alone learns layers; the rest is constant or safe from any thread.
#pragma once

#include "accelerator/device_worker.h"
#include "hybrid/event_log.h"
#include "hybrid/layer_book.h"
#include "settings.h"

namespace hybrimoe {

struct common {
    common(const settings & given, ggml_backend_dev_t inner)
        : config(in_force(given)), inner_device(inner), log(given.log_to_stderr) {}

    // Whether hits are computed by the graph of a device that we wrap (graph_front/): its slots have a zero one.
    bool in_graph() const { return inner_device != nullptr; }

    const settings config;
    const ggml_backend_dev_t inner_device; // the only accelerator then; null: those that the settings name
    mutable event_log log;
    const step_clock clock;
    layer_book book;
};

// For lines of text.
inline double gib(double bytes) {
    return bytes / (1 << 30);
}

} // namespace hybrimoe
