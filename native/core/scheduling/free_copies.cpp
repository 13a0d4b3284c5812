#include "free_copies.h"

#include "one_card.h"

#include <algorithm>

namespace hybrimoe {

namespace {

constexpr int max_items = 64;

// The layer's time where CPU and links share the ceiling in proportion to what they ask for: what the bound of
// makespan() hides is that one of them alone may not use it up when the others are done.
double shared_us(const priced_problem & p, const assignment & device_of) {
    double left[max_devices + 1] = {}, asked[max_devices + 1] = {}, resident[max_devices], last[max_devices] = {};
    for (int d = 0; d < p.n_devices; ++d) {
        resident[d] = p.problem->gpu_ready_us[d] + p.gpu_step_us[d];
    }
    for (int i = 0; i < p.n_items; ++i) {
        const int d = device_of[i];
        if (d == cpu_device) {
            left[0] += p.cpu_us[i];
            asked[0] += p.bytes;
        } else {
            resident[d] += p.gpu_us[d][i];
            if (p.is_miss(i)) {
                left[d + 1] += p.copy_us[d];
                asked[d + 1] += p.bytes;
                last[d] = p.gpu_us[d][i];
            }
        }
    }
    if (asked[0] > 0.0) {
        left[0] += p.cpu_step_us + p.cpu_first_us;
    }
    for (int k = 0; k <= p.n_devices; ++k) {
        asked[k] = left[k] > 0.0 ? asked[k] / left[k] : 0.0;
    }
    double end[max_devices + 1] = {}, now = 0.0;
    for (int n_running = 1; n_running > 0;) {
        double all = 0.0, next = 0.0;
        n_running = 0;
        for (int k = 0; k <= p.n_devices; ++k) {
            if (left[k] > 0.0) {
                next = n_running == 0 ? left[k] : std::min(next, left[k]);
                all += asked[k];
                ++n_running;
            }
        }
        const double speed = std::min(1.0, p.dram_bytes_per_us / std::max(all, 1e-9));
        now += next / speed;
        for (int k = 0; k <= p.n_devices; ++k) {
            if (left[k] > 0.0) {
                left[k] = left[k] - next <= 1e-9 * next ? 0.0 : left[k] - next;
                end[k]  = left[k] > 0.0 ? 0.0 : now;
            }
        }
    }
    double us = p.problem->cpu_ready_us + end[0];
    for (int d = 0; d < p.n_devices; ++d) {
        us = std::max(us, std::max(resident[d], end[d + 1] > 0.0 ? p.link_ready_us[d] + end[d + 1] + last[d] : 0.0));
    }
    return us;
}

} // namespace

void add_free_copies(const priced_problem & p, assignment & device_of) {
    if (!p.problem->copies_stay || p.n_items > max_items) {
        return;
    }
    int n_copies[max_devices] = {};
    for (int i = 0; i < p.n_items; ++i) {
        if (p.is_miss(i) && device_of[i] != cpu_device) {
            ++n_copies[device_of[i]];
        }
    }
    const double us = makespan(p, device_of) * (1.0 + negligible_share);
    double shared   = shared_us(p, device_of) * (1.0 + negligible_share);
    for (int k = 0; k < p.n_items; ++k) {
        const int i = p.order[k];
        if (!p.is_miss(i) || device_of[i] != cpu_device || !p.items[i].may_copy) {
            continue;
        }
        int best = cpu_device;
        for (int d = 0; d < p.n_devices; ++d) {
            if (n_copies[d] >= p.problem->max_copies[d]) {
                continue;
            }
            device_of[i]       = static_cast<int8_t>(d);
            const double after = shared_us(p, device_of);
            if (!clearly_less(us, makespan(p, device_of)) && !clearly_less(shared, after) &&
                (best == cpu_device || after < shared)) {
                best   = d;
                shared = after;
            }
        }
        device_of[i] = static_cast<int8_t>(best);
        if (best != cpu_device) {
            ++n_copies[best];
        }
    }
}

} // namespace hybrimoe
