// What every part of the hybrid dispatch reads: the settings in force, the log, the clock and the layers. Owned by
// `hybrid`, which alone learns layers; the rest is constant or safe from any thread.
#pragma once

#include "accelerator/device_worker.h"
#include "hybrid/event_log.h"
#include "hybrid/layer_book.h"
#include "settings.h"

namespace hybrimoe {

struct common {
    explicit common(const settings & given) : config(in_force(given)), log(given.log_to_stderr) {}

    const settings config;
    mutable event_log log;
    const step_clock clock;
    layer_book book;
};

// For lines of text.
inline double gib(double bytes) {
    return bytes / (1 << 30);
}

} // namespace hybrimoe
