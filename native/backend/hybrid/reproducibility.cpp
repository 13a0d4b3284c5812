#include "hybrid/reproducibility.h"

#include "hybrid/fleet.h"

#include <cmath>

namespace hybrimoe {

void reproducibility::broken(const char * why) {
    if (holds()) {
        holds_ = false;
        shared_.log.add("not reproducible from here on: %s", why);
    }
}

void reproducibility::check(const fleet & devices) {
    for (int d = 0; d < devices.size(); d++) {
        if (devices[d].is_suspended) {
            broken("an accelerator does not finish its copies");
        }
    }
    for (int layer = 0; layer < shared_.book.n_layers(); layer++) {
        const int32_t n_expert = shared_.book.layer(layer).layout.n_expert;
        int n_resident         = 0;
        for (int32_t e = 0; e < n_expert; e++) {
            n_resident += devices.holder(layer, e) != cpu_device ? 1 : 0;
        }
        if (n_resident != 0 && n_resident != n_expert) {
            broken("a copy failed");
        }
    }
}

void reproducibility::announce(const fleet & devices) const {
    double bytes = 0.0;
    for (int d = 0; d < devices.size(); d++) {
        int n_layers = 0;
        int n_slots  = 0;
        for (int layer = 0; layer < shared_.book.n_layers(); layer++) {
            const int n = devices[d].of_layer(layer).n_slots();
            n_layers += n > 0 ? 1 : 0;
            n_slots += n;
            bytes += static_cast<double>(shared_.book.layer(layer).layout.expert_bytes()) * n;
        }
        shared_.log.add("reproducible: %s holds the experts of %d of %d layers (%d slots), nothing is copied while the "
                        "model runs",
                        devices[d].port.name().c_str(), n_layers, shared_.book.n_layers(), n_slots);
    }
    if (shared_.config.expert_cache.is == expert_cache_size::kind::automatic) {
        constexpr double mib = 1 << 20;
        shared_.log.add(
            "reproducible: that followed from the memory that is free now; the same again: --expert-cache %.0fMiB",
            std::ceil(bytes / mib));
    }
}

} // namespace hybrimoe
