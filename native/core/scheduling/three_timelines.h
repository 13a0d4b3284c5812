// Simulation of the paper's three timelines.
#pragma once

#include "pricing.h"

#include <algorithm>

namespace hybrimoe {

// The paper's rule (HybriMoE sec. IV-B): simulate CPU, GPU and PCIe side by side and commit, of their next operations,
// the one that completes first. At a tie the link goes before the CPU and the CPU before the GPU, which is what the
// paper's figure 5 shows.
class three_timelines {
public:
    three_timelines(const priced_problem & p, assignment & device_of) : p_(p), device_of_(device_of) {
        for (int k = 0; k < p.n_items; ++k) {
            const int i  = p.order[k];
            done_[i]     = false;
            device_of[i] = cpu_device;
            if (p.is_miss(i)) {
                misses_[n_misses_++] = i; // heaviest first: the link takes from the front, the CPU from the back
            } else {
                arrival_[i]        = p.items[i].loading ? p.items[i].ready_us : 0.0;
                card_of_[i]        = p.items[i].device;
                queue_[n_queue_++] = i;
            }
        }
        cpu_us_ = p.problem->cpu_ready_us + p.cpu_step_us + p.cpu_first_us;
        for (int d = 0; d < p.n_devices; ++d) {
            gpu_us_[d]   = p.problem->gpu_ready_us[d] + p.gpu_step_us[d];
            link_us_[d]  = p.link_ready_us[d];
            n_copies_[d] = 0;
        }
        last_miss_ = n_misses_;
    }

    void run() {
        for (int n_done = 0; n_done < p_.n_items;) {
            operation best;
            propose_copy(best);
            propose_cpu(best);
            propose_gpu(best);
            n_done += commit(best);
        }
    }

private:
    enum class kind { none, copy, cpu_miss, cpu_waiting, gpu };
    struct operation {
        kind what     = kind::none;
        double end_us = 0.0;
        int item      = 0;
        int device    = cpu_device;
    };

    static void offer(operation & best, const operation & next) {
        if (best.what == kind::none || next.end_us < best.end_us) {
            best = next;
        }
    }

    void propose_copy(operation & best) const {
        int k = first_miss_;
        while (k < last_miss_ && !p_.items[misses_[k]].may_copy) {
            ++k;
        }
        if (k == last_miss_) {
            return;
        }
        for (int d = 0; d < p_.n_devices; ++d) {
            if (n_copies_[d] < p_.problem->max_copies[d]) {
                offer(best, {kind::copy, link_us_[d] + p_.copy_us[d], k, d});
            }
        }
    }

    void propose_cpu(operation & best) const {
        if (first_miss_ < last_miss_) {
            const int i = misses_[last_miss_ - 1];
            offer(best, {kind::cpu_miss, cpu_us_ + p_.cpu_us[i], i, cpu_device});
            return;
        }
        for (int k = n_queue_ - 1; k >= 0; --k) { // the lightest that waits for a card, copied or not
            const int i = queue_[k];
            if (!done_[i]) {
                offer(best, {kind::cpu_waiting, cpu_us_ + p_.cpu_us[i], i, cpu_device});
                return;
            }
        }
    }

    void propose_gpu(operation & best) const {
        for (int d = 0; d < p_.n_devices; ++d) {
            int chosen = -1;
            for (int k = 0; k < n_queue_; ++k) { // heaviest that is there; else the one that comes first
                const int i = queue_[k];
                if (done_[i] || card_of_[i] != d) {
                    continue;
                }
                if (arrival_[i] <= gpu_us_[d]) {
                    chosen = i;
                    break;
                }
                if (chosen < 0 || arrival_[i] < arrival_[chosen]) {
                    chosen = i;
                }
            }
            if (chosen >= 0) {
                offer(best, {kind::gpu, std::max(gpu_us_[d], arrival_[chosen]) + p_.gpu_us[d][chosen], chosen, d});
            }
        }
    }

    int commit(const operation & op) {
        switch (op.what) {
        case kind::copy: {
            const int i = misses_[op.item];
            for (int k = op.item; k > first_miss_; --k) { // keeps those that may not be copied, in order
                misses_[k] = misses_[k - 1];
            }
            ++first_miss_;
            ++n_copies_[op.device];
            link_us_[op.device] = op.end_us;
            arrival_[i]         = op.end_us;
            card_of_[i]         = op.device;
            int k               = n_queue_++;
            while (k > 0 && p_.items[queue_[k - 1]].n_tokens < p_.items[i].n_tokens) {
                queue_[k] = queue_[k - 1];
                --k;
            }
            queue_[k] = i;
            return 0;
        }
        case kind::cpu_miss:
            --last_miss_;
            [[fallthrough]];
        case kind::cpu_waiting:
            cpu_us_ = op.end_us;
            break;
        case kind::gpu:
            gpu_us_[op.device] = op.end_us;
            break;
        case kind::none:
            break;
        }
        done_[op.item]      = true;
        device_of_[op.item] = static_cast<int8_t>(op.device);
        return 1;
    }

    const priced_problem & p_;
    assignment & device_of_;
    int misses_[max_experts];
    int queue_[max_experts]; // heaviest first
    int card_of_[max_experts];
    double arrival_[max_experts];
    bool done_[max_experts];
    int n_misses_ = 0, first_miss_ = 0, last_miss_ = 0, n_queue_ = 0;
    double cpu_us_;
    double gpu_us_[max_devices];
    double link_us_[max_devices];
    int n_copies_[max_devices];
};

} // namespace hybrimoe
