#include "scheduler.h"

#include <algorithm>

namespace hybrimoe {
namespace {

constexpr double max_assignments = 1 << 22;

// Counts through every assignment, one digit per item: first the CPU, then its card (a hit) or every card (a miss).
class exhaustive final : public scheduler {
public:
    status assign(const priced_problem & p, assignment & device_of) const override {
        double n_assignments = 1.0;
        for (int i = 0; i < p.n_items; ++i) {
            n_assignments *= n_choices(p, i);
            if (n_assignments > max_assignments) {
                return status::fail(error_code::invalid_argument,
                                    "exhaustive search over %d experts exceeds %g assignments", p.n_items,
                                    max_assignments);
            }
        }
        assignment trial;
        int digit[max_experts] = {};
        for (int i = 0; i < p.n_items; ++i) {
            trial[i] = cpu_device;
        }
        double best = -1.0;
        for (;;) {
            if (within_slots(p, trial)) {
                const double us = makespan(p, trial);
                if (best < 0.0 || us < best) {
                    best = us;
                    std::copy(trial, trial + p.n_items, device_of);
                }
            }
            int i = 0;
            while (i < p.n_items && ++digit[i] == n_choices(p, i)) {
                digit[i] = 0;
                trial[i] = cpu_device;
                ++i;
            }
            if (i == p.n_items) {
                return {};
            }
            trial[i] = static_cast<int8_t>(p.is_miss(i) ? digit[i] - 1 : p.items[i].device);
        }
    }

private:
    static int n_choices(const priced_problem & p, int i) {
        return p.is_miss(i) ? (p.items[i].may_copy ? 1 + p.n_devices : 1) : 2;
    }

    static bool within_slots(const priced_problem & p, const assignment & device_of) {
        int n_copies[max_devices] = {};
        for (int i = 0; i < p.n_items; ++i) {
            if (p.is_miss(i) && device_of[i] != cpu_device &&
                ++n_copies[device_of[i]] > p.problem->max_copies[device_of[i]]) {
                return false;
            }
        }
        return true;
    }
};

} // namespace

extern const policy_entry<scheduler> exhaustive_scheduler;
const policy_entry<scheduler> exhaustive_scheduler = {
    "exhaustive",
    "Every assignment is tried: the optimum under the cost model, for tests and small layers only.",
    "",
    {false, true, false},
    nullptr,
    0,
    [](const model_shape &, const param_values &) -> std::unique_ptr<scheduler> {
        return std::make_unique<exhaustive>();
    },
};

} // namespace hybrimoe
