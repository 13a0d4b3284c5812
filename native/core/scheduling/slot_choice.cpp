#include "slot_choice.h"

#include "one_card.h"

#include <algorithm>

namespace hybrimoe {

namespace {

constexpr int max_items = 64; // of a layer; prefill replaces most of a cache anyway

class slot_choice {
public:
    slot_choice(const priced_problem & p, assignment & device_of)
        : p_(p), device_of_(device_of), us_(makespan(p, device_of) * (1.0 + negligible_share)) {
        for (int i = 0; i < p.n_items; ++i) {
            n_copies_[device_of[i] + 1] += p.is_miss(i) ? 1 : 0;
        }
    }

    // One copy to the card where that gains most.
    bool improve() {
        int from = cpu_device, to = cpu_device, most = 0;
        for (int a = 0; a < p_.n_devices; ++a) {
            for (int b = 0; b < p_.n_devices && n_copies(a) > 0; ++b) {
                const int gain = rank(a, n_copies(a) - 1) - rank(b, n_copies(b));
                if (a != b && n_copies(b) < p_.problem->max_copies[b] && gain > most && !refused_[a][b]) {
                    from = a;
                    to   = b;
                    most = gain;
                }
            }
        }
        if (from == cpu_device) {
            return false;
        }
        if (!move(from, to)) {
            refused_[from][to] = true;
            return true;
        }
        --n_copies_[from + 1];
        ++n_copies_[to + 1];
        std::fill(&refused_[0][0], &refused_[0][0] + max_devices * max_devices, false);
        return true;
    }

private:
    int n_copies(int device) const { return n_copies_[device + 1]; }

    // Of the slot that the card's (k + 1)-th copy takes.
    int rank(int device, int k) const {
        for (int at = 0; at < p_.problem->n_slot_order; ++at) {
            if (p_.problem->slot_order[at] == device && k-- == 0) {
                return at;
            }
        }
        return p_.problem->n_slot_order;
    }

    // Any of its copies that the other card may take without a longer layer; equal loads are equal.
    bool move(int from, int to) {
        int n_tokens = 0;
        for (int k = p_.n_items - 1; k >= 0; --k) {
            const int i = p_.order[k];
            if (device_of_[i] != from || !p_.is_miss(i) || p_.items[i].n_tokens == n_tokens) {
                continue;
            }
            n_tokens      = p_.items[i].n_tokens;
            device_of_[i] = static_cast<int8_t>(to);
            if (!clearly_less(us_, makespan(p_, device_of_))) {
                return true;
            }
            device_of_[i] = static_cast<int8_t>(from);
        }
        return false;
    }

    const priced_problem & p_;
    assignment & device_of_;
    double us_;
    int n_copies_[max_devices + 1]          = {}; // misses on the CPU come first
    bool refused_[max_devices][max_devices] = {};
};

} // namespace

void choose_slots(const priced_problem & p, assignment & device_of) {
    if (p.n_devices < 2 || p.problem->n_slot_order == 0 || p.n_items > max_items) {
        return;
    }
    slot_choice choice(p, device_of);
    while (choice.improve()) {
    }
}

} // namespace hybrimoe
