#include "copy_all.h"

#include <algorithm>

namespace hybrimoe {

double card_loads::end(int d) const {
    return std::max(resident_us[d] + queued_us[d], chain_us[d]);
}

double card_loads::end_with(const priced_problem & p, int d, int i) const {
    const double g = p.gpu_us[d][i];
    return std::max(resident_us[d] + queued_us[d] + g, std::max(chain_us[d], arrival_us[d] + p.copy_us[d]) + g);
}

void card_loads::take(const priced_problem & p, int d, int i) {
    arrival_us[d] += p.copy_us[d];
    chain_us[d] = std::max(chain_us[d], arrival_us[d]) + p.gpu_us[d][i];
    queued_us[d] += p.gpu_us[d][i];
    --copies_left[d];
}

int card_loads::first_to_finish(const priced_problem & p, int i) const {
    int best        = cpu_device;
    double best_end = 0.0;
    for (int d = 0; d < p.n_devices; ++d) {
        if (copies_left[d] <= 0) {
            continue;
        }
        const double e = end_with(p, d, i);
        if (best == cpu_device || e < best_end) {
            best     = d;
            best_end = e;
        }
    }
    return best;
}

void start_cards(const priced_problem & p, const assignment & device_of, card_loads & out) {
    for (int d = 0; d < p.n_devices; ++d) {
        out.resident_us[d] = p.problem->gpu_ready_us[d] + p.gpu_step_us[d];
        out.queued_us[d]   = 0.0;
        out.arrival_us[d]  = p.link_ready_us[d];
        out.chain_us[d]    = 0.0;
        out.copies_left[d] = p.problem->max_copies[d];
    }
    for (int i = 0; i < p.n_items; ++i) {
        if (device_of[i] != cpu_device && p.is_hit(i)) {
            out.resident_us[device_of[i]] += p.gpu_us[device_of[i]][i];
        }
    }
    for (int k = 0; k < p.n_loading; ++k) {
        const int i = p.loading[k];
        const int d = device_of[i];
        if (d != cpu_device) {
            out.chain_us[d] = std::max(out.chain_us[d], p.items[i].ready_us) + p.gpu_us[d][i];
            out.queued_us[d] += p.gpu_us[d][i];
        }
    }
}

void assign_copy_all(const priced_problem & p, assignment & device_of) {
    for (int i = 0; i < p.n_items; ++i) {
        device_of[i] = static_cast<int8_t>(p.items[i].device);
    }
    card_loads cards;
    start_cards(p, device_of, cards);
    for (int k = 0; k < p.n_items; ++k) {
        const int i = p.order[k];
        if (!p.is_miss(i) || !p.items[i].may_copy) {
            continue;
        }
        const int d = cards.first_to_finish(p, i);
        if (d != cpu_device) {
            cards.take(p, d, i);
            device_of[i] = static_cast<int8_t>(d);
        }
    }
}

} // namespace hybrimoe
