#include "hybrid/memory_watch.h"

#include <algorithm>

namespace hybrimoe {

void memory_watch::look(bool is_static) {
    if (shared_.config.reproducible) {
        return;
    }
    const fault_plan & faults = shared_.config.faults;
    n_looks_++;
    const bool is_scarce = faults.scarce_from > 0 && n_looks_ >= faults.scarce_from &&
                           (faults.scarce_until == 0 || n_looks_ < faults.scarce_until);
    for (int d = 0; d < devices_.size(); d++) {
        const device_port & port = devices_[d].port;
        const bool is_own_memory = !port.is_cpu() || faults.free_bytes >= 0;
        // A size that the user gave stays.
        if (shared_.config.expert_cache.is == expert_cache_size::kind::automatic && is_own_memory && !is_static) {
            judge(d, static_cast<double>(is_scarce ? faults.scarce_bytes : static_cast<int64_t>(port.free_bytes())));
        }
    }
}

void memory_watch::judge(int device, double free) {
    const auto margin   = static_cast<double>(shared_.config.fit_margin_bytes);
    const double wanted = devices_.wanted_bytes(device);
    const double before = devices_[device].shrink;
    double share        = before;
    if (free < margin / 2) {
        share = std::max(0.0, share - std::max(0.1, (margin - free) / std::max(wanted, 1.0)));
    } else if (share < 1.0 && free > margin * 1.25 + 0.1 * wanted) {
        share = std::min(1.0, share + 0.1);
    }
    if (share != before) {
        shared_.log.add("%s has %.2f GiB free, %.2f GiB are kept: expert cache %.0f %% -> %.0f %% of its size",
                        devices_[device].port.name().c_str(), gib(free), gib(margin), 100.0 * before, 100.0 * share);
        devices_.shrink(device, share);
    }
}

} // namespace hybrimoe
