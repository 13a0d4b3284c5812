#include "one_card.h"

#include "single_moves.h"

#include <algorithm>

namespace hybrimoe {

namespace {

struct choice {
    double makespan_us  = 0.0;
    double secondary_us = 0.0; // end of all work that waits for no copy
    int n_copied        = 0;   // u
    int n_handed        = 0;   // v
    int n_dropped       = 0;   // w: expected copies that the CPU does not wait for
};

// For a fixed w, the CPU's time falls in u and grows in v, the card's grows in u and falls in v. So for each u the best
// v lies where the two cross, and the crossing only moves up with u: all (u, v) cost O(n).
class search {
public:
    explicit search(const priced_problem & p) : p_(p) {
        for (int k = 0; k < p.n_items; ++k) {
            const int i = p.order[k];
            if (p.is_miss(i)) {
                if (p.n_devices > 0 && p.items[i].may_copy) {
                    misses_[n_misses_++] = i;
                } else {
                    fixed_us_ += p.cpu_us[i];
                    ++n_fixed_;
                }
            }
        }
        for (int k = p.n_items - 1; k >= 0; --k) {
            const int i = p.order[k];
            if (p.is_hit(i)) {
                hits_[n_hits_++] = i;
            }
        }
        n_copies_max_ = p.n_devices > 0 ? std::min(n_misses_, std::max(0, p.problem->max_copies[0])) : 0;

        miss_cpu_[n_misses_] = 0.0;
        for (int u = n_misses_ - 1; u >= 0; --u) {
            miss_cpu_[u] = miss_cpu_[u + 1] + p.cpu_us[misses_[u]];
        }
        hit_cpu_[0] = 0.0;
        for (int v = 0; v < n_hits_; ++v) {
            hit_cpu_[v + 1] = hit_cpu_[v] + p.cpu_us[hits_[v]];
        }
        hit_gpu_[n_hits_] = 0.0;
        for (int v = n_hits_ - 1; v >= 0; --v) {
            hit_gpu_[v] = hit_gpu_[v + 1] + p.gpu_us[0][hits_[v]];
        }
    }

    choice best() {
        choice out;
        const int n = p_.n_loading;
        // Loading experts whose copies come last are the ones worth computing on the CPU. There is rarely more than
        // one.
        for (int w = 0; w <= n; w = w < 4 || w == n ? w + 1 : n) {
            drop(w);
            const choice c = sweep();
            if (w == 0 || clearly_less(c.makespan_us, out.makespan_us)) {
                out           = c;
                out.n_dropped = w;
            }
        }
        return out;
    }

    void write(const choice & c, assignment & device_of) const {
        for (int i = 0; i < p_.n_items; ++i) {
            device_of[i] = static_cast<int8_t>(p_.items[i].device);
        }
        for (int u = 0; u < c.n_copied; ++u) {
            device_of[misses_[u]] = 0;
        }
        for (int v = 0; v < c.n_handed; ++v) {
            device_of[hits_[v]] = cpu_device;
        }
        for (int w = 0; w < c.n_dropped; ++w) {
            device_of[p_.loading[p_.n_loading - 1 - w]] = cpu_device;
        }
    }

private:
    // Chain of arriving work after the loading experts that stay on the card.
    void drop(int w) {
        dropped_us_ = chain0_ = queued0_ = 0.0;
        n_dropped_                       = w;
        n_waiting_                       = p_.n_loading - w;
        for (int k = 0; k < p_.n_loading; ++k) {
            const int i = p_.loading[k];
            if (k < n_waiting_) {
                chain0_ = std::max(chain0_, p_.items[i].ready_us) + p_.gpu_us[0][i];
                queued0_ += p_.gpu_us[0][i];
            } else {
                dropped_us_ += p_.cpu_us[i];
            }
        }
    }

    double cpu_us(int u, int v) const {
        const int n_cpu = n_fixed_ + n_dropped_ + (n_misses_ - u) + v;
        double us       = p_.problem->cpu_ready_us;
        if (n_cpu > 0) {
            us += p_.cpu_step_us + p_.cpu_first_us + fixed_us_ + dropped_us_ + miss_cpu_[u] + hit_cpu_[v];
        }
        // Misses are read once whoever computes them, so only v moves the DRAM floor: it joins the CPU's side.
        return std::max(us, (n_fixed_ + n_dropped_ + n_misses_ + v) * p_.bytes / p_.dram_bytes_per_us);
    }

    double resident_us(int u, int v) const {
        if (p_.n_devices == 0) {
            return 0.0;
        }
        const bool any = v < n_hits_ || u > 0 || n_waiting_ > 0;
        return p_.problem->gpu_ready_us[0] + (any ? p_.gpu_step_us[0] : 0.0) + hit_gpu_[v];
    }

    double gpu_us(int u, int v) const { return std::max(resident_us(u, v) + queued_us_, chain_us_); }

    choice sweep() {
        choice out;
        bool first        = true;
        int v             = 0;
        double arrival_us = p_.n_devices > 0 ? p_.link_ready_us[0] : 0.0;
        chain_us_         = chain0_;
        queued_us_        = queued0_;
        for (int u = 0;; ++u) {
            while (v < n_hits_ && cpu_us(u, v) < gpu_us(u, v)) {
                ++v;
            }
            const double here   = std::max(cpu_us(u, v), gpu_us(u, v));
            const double before = v > 0 ? std::max(cpu_us(u, v - 1), gpu_us(u, v - 1)) : here;
            const double us     = std::min(here, before);
            if (first || clearly_less(us, out.makespan_us)) {
                out   = choose_handed(u, us);
                first = false;
            }
            if (u == n_copies_max_) {
                return out;
            }
            arrival_us += p_.copy_us[0];
            chain_us_ = std::max(chain_us_, arrival_us) + p_.gpu_us[0][misses_[u]];
            queued_us_ += p_.gpu_us[0][misses_[u]];
        }
    }

    // Of the v that reach this makespan, the one whose copy-independent work ends first: if the copy comes earlier than
    // predicted the layer ends earlier. At a tie the card is kept free for it.
    choice choose_handed(int u, double makespan_us) const {
        choice out;
        out.n_copied = u;
        out.n_handed = -1;
        for (int v = 0; v <= n_hits_; ++v) {
            const double cpu = cpu_us(u, v);
            if (clearly_less(makespan_us, cpu)) {
                break;
            }
            if (clearly_less(makespan_us, gpu_us(u, v))) {
                continue;
            }
            const double secondary = std::max(cpu, resident_us(u, v));
            if (out.n_handed < 0 || !clearly_less(out.secondary_us, secondary)) {
                out.makespan_us  = makespan_us;
                out.secondary_us = secondary;
                out.n_handed     = v;
            }
        }
        return out;
    }

    const priced_problem & p_;
    int misses_[max_experts]; // that may be copied, heaviest first
    int hits_[max_experts];   // lightest first
    double miss_cpu_[max_experts + 1], hit_cpu_[max_experts + 1], hit_gpu_[max_experts + 1];
    int n_misses_ = 0, n_hits_ = 0, n_fixed_ = 0, n_copies_max_ = 0, n_dropped_ = 0, n_waiting_ = 0;
    double fixed_us_ = 0.0, dropped_us_ = 0.0, chain0_ = 0.0, queued0_ = 0.0, chain_us_ = 0.0, queued_us_ = 0.0;
};

} // namespace

void assign_one_card(const priced_problem & p, assignment & device_of) {
    search s(p);
    const choice best = s.best();
    s.write(best, device_of);
    // Equal loads (decode of one token) are solved exactly by thresholds.
    const bool equal = p.items[p.order[0]].n_tokens == p.items[p.order[p.n_items - 1]].n_tokens;
    if (!equal && p.n_devices > 0) {
        move_singles(p, best.makespan_us, device_of);
    }
}

} // namespace hybrimoe
