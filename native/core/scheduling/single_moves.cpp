#include "single_moves.h"

#include "one_card.h"

#include <algorithm>

namespace hybrimoe {

namespace {

constexpr int max_items         = 64;
constexpr int max_rounds        = 2;
constexpr int max_items_swapped = 24;

// Exchanges an expert of the CPU with one of a card, where that clearly helps. Copies are exchanged for copies only, so
// no limit can be exceeded.
bool swap_pairs(const priced_problem & p, double & us, assignment & device_of) {
    bool better = false;
    for (int i = 0; i < p.n_items; ++i) {
        for (int j = 0; j < p.n_items; ++j) {
            const int8_t card = device_of[j];
            const bool fits   = p.is_miss(i) ? p.is_miss(j) && p.items[i].may_copy : p.items[i].device == card;
            if (device_of[i] != cpu_device || card == cpu_device || !fits) {
                continue;
            }
            device_of[i]         = card;
            device_of[j]         = cpu_device;
            const double swapped = makespan(p, device_of);
            if (clearly_less(swapped, us)) {
                us     = swapped;
                better = true;
            } else {
                device_of[i] = cpu_device;
                device_of[j] = card;
            }
        }
    }
    return better;
}

} // namespace

void move_singles(const priced_problem & p, double us, assignment & device_of) {
    if (p.n_items > max_items) {
        return;
    }
    int n_copies[max_devices] = {};
    for (int i = 0; i < p.n_items; ++i) {
        if (p.is_miss(i) && device_of[i] != cpu_device) {
            ++n_copies[device_of[i]];
        }
    }
    bool better = true;
    for (int round = 0; better && round < max_rounds; ++round) {
        better = false;
        for (int i = 0; i < p.n_items; ++i) {
            const bool miss = p.is_miss(i);
            if (miss && !p.items[i].may_copy) {
                continue;
            }
            for (int to = cpu_device; to < p.n_devices; ++to) {
                const int8_t from = device_of[i];
                const bool allowed =
                    to == cpu_device || (miss ? n_copies[to] < p.problem->max_copies[to] : to == p.items[i].device);
                if (to == from || !allowed) {
                    continue;
                }
                device_of[i]       = static_cast<int8_t>(to);
                const double moved = makespan(p, device_of);
                if (!clearly_less(moved, us)) {
                    device_of[i] = from;
                    continue;
                }
                us     = moved;
                better = true;
                if (miss && from != cpu_device) {
                    --n_copies[from];
                }
                if (miss && to != cpu_device) {
                    ++n_copies[to];
                }
            }
        }
        if (p.n_items <= max_items_swapped && swap_pairs(p, us, device_of)) {
            better = true;
        }
    }
}

} // namespace hybrimoe
