#include "hybrid/governor_changes.h"

#include <string>

namespace hybrimoe {

namespace {

void log_drift(const common & shared, const fleet & devices, const drift_report & drift) {
    const char * where = drift.device < 0 ? "CPU" : devices[drift.device].port.name().c_str();
    const double since = (shared.clock.now_us() - drift.since_us) * 1e-6;
    const bool is_rate = drift.kind == cost_kind::dram || std::string(drift.parameter) == "bandwidth";
    const char * what  = drift.kind == cost_kind::copy  ? "link"
                         : drift.kind == cost_kind::cpu ? "CPU expert"
                         : drift.kind == cost_kind::gpu ? "GPU expert"
                                                        : "memory";
    if (is_rate) {
        shared.log.add("cost model: %s %s %.1f -> %.1f GB/s since %.0f s", what, where, drift.old_value * 1e-3,
                       drift.new_value * 1e-3, since);
    } else {
        shared.log.add("cost model: %s %s %s %.1f -> %.1f us since %.0f s", what, where, drift.parameter,
                       drift.old_value, drift.new_value, since);
    }
}

} // namespace

void tell_drift(const common & shared, const fleet & devices, governor & gov) {
    drift_report drift;
    while (gov.is_live() && gov.estimator().next_drift(drift)) {
        log_drift(shared, devices, drift);
    }
}

void apply_guard(const common & shared, fleet & devices, recording & record, governor & gov,
                 const runtime_limits & limits, const guard_change & change) {
    record.on_limits(limits);
    shared.log.add(
        "guard: %s -> %s%s: experts take %.0f us a token, plain llama.cpp's best placement would take about %.0f",
        guard_level_name(change.from), guard_level_name(change.to), change.is_trial ? " on trial" : "", change.token_us,
        change.floor_us);
    const bool was_static = change.from == guard_level::static_layers;
    if (was_static == (change.to == guard_level::static_layers)) {
        return;
    }
    const double begin_us = shared.clock.now_us();
    for (int d = 0; d < devices.size(); d++) {
        devices.relayout(d, was_static ? devices.current_slots(d) : devices.static_slots(d));
        devices.fill_layers(d);
    }
    gov.on_refill(shared.clock.now_us() - begin_us);
}

} // namespace hybrimoe
