#include "several_cards.h"

#include "copy_all.h"
#include "one_card.h"
#include "single_moves.h"

#include <algorithm>

namespace hybrimoe {

namespace {

// Coordinate descent over u (copied misses, each to the card that finishes it first) and one v per card (hits handed to
// the CPU). "Copy nothing" and "copy all" are among the starts, so it is never worse than CPU-runs-misses or
// load-everything.
class descent {
public:
    explicit descent(const priced_problem & p) : p_(p) {
        for (int d = 0; d < p.n_devices; ++d) {
            n_hits_[d] = 0;
        }
        for (int k = p.n_items - 1; k >= 0; --k) {
            const int i = p.order[k];
            if (!p.is_miss(i)) { // loading experts are handed over like hits
                const int d            = p.items[i].device;
                hits_[d][n_hits_[d]++] = static_cast<int16_t>(i);
            }
        }
        n_misses_ = 0;
        for (int k = 0; k < p.n_items; ++k) {
            n_misses_ += p.is_miss(p.order[k]) && p.items[p.order[k]].may_copy;
        }
    }

    int n_misses() const { return n_misses_; }

    // Descends from u copied misses; the v first, since a good u is only seen with its v.
    double run(int u, assignment & best) {
        u_ = u;
        for (int d = 0; d < p_.n_devices; ++d) {
            v_[d] = 0;
        }
        double best_us = write(best);
        for (int round = 0; round < max_rounds; ++round) {
            bool better = false;
            for (int d = 0; d < p_.n_devices; ++d) {
                better = improve(v_[d], n_hits_[d], best, best_us) || better;
            }
            better = improve(u_, n_misses_, best, best_us) || better;
            if (!better) {
                break;
            }
        }
        return best_us;
    }

private:
    static constexpr int max_rounds = 4;

    // Narrows one coordinate: few values are all tried, many are sampled ever more finely around the best one.
    bool improve(int & coordinate, int max_value, assignment & best, double & best_us) {
        int at          = coordinate;
        const int start = at;
        assignment trial;
        for (int step = std::max(1, max_value / 8); step > 0; step = step == 1 ? 0 : std::max(1, step / 4)) {
            const int centre = at;
            for (int k = -8; k <= 8; ++k) {
                const int value = centre + k * step;
                if (k == 0 || value < 0 || value > max_value) {
                    continue;
                }
                coordinate      = value;
                const double us = write(trial);
                if (clearly_less(us, best_us)) {
                    best_us = us;
                    at      = value;
                    std::copy(trial, trial + p_.n_items, best);
                }
            }
        }
        coordinate = at;
        return at != start;
    }

    double write(assignment & device_of) const {
        for (int i = 0; i < p_.n_items; ++i) {
            device_of[i] = static_cast<int8_t>(p_.items[i].device);
        }
        for (int d = 0; d < p_.n_devices; ++d) {
            for (int v = 0; v < v_[d]; ++v) {
                device_of[hits_[d][v]] = cpu_device;
            }
        }
        card_loads cards;
        start_cards(p_, device_of, cards);
        int left = u_;
        for (int k = 0; k < p_.n_items && left > 0; ++k) {
            const int i = p_.order[k];
            if (!p_.is_miss(i) || !p_.items[i].may_copy) {
                continue;
            }
            const int d = cards.first_to_finish(p_, i);
            if (d == cpu_device) {
                break;
            }
            cards.take(p_, d, i);
            device_of[i] = static_cast<int8_t>(d);
            --left;
        }
        return makespan(p_, device_of);
    }

    const priced_problem & p_;
    int16_t hits_[max_devices][max_experts]; // lightest first
    int n_hits_[max_devices];
    int n_misses_;
    int u_ = 0;
    int v_[max_devices];
};

} // namespace

void assign_several_cards(const priced_problem & p, assignment & device_of) {
    descent search(p);
    double us = search.run(0, device_of);
    assignment trial;
    const int m    = search.n_misses();
    const int step = m <= 12 ? 1 : (m + 1) / 2; // every u in decode, three starts in prefill
    for (int u = step; u < m + step; u += step) {
        const double trial_us = search.run(std::min(u, m), trial);
        if (clearly_less(trial_us, us)) {
            std::copy(trial, trial + p.n_items, device_of);
            us = trial_us;
        }
    }
    // Where cards are equally late, no single move gains: so all on the CPU is tried as another start.
    std::fill(trial, trial + p.n_items, static_cast<int8_t>(cpu_device));
    const double cpu_us = makespan(p, trial);
    if (clearly_less(cpu_us, us)) {
        std::copy(trial, trial + p.n_items, device_of);
        us = cpu_us;
    }
    move_singles(p, us, device_of);
}

} // namespace hybrimoe
