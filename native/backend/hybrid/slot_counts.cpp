#include "hybrid/slot_counts.h"

#include "core/allocation/whole_layers.h"

#include "accelerator/device_compute.h"
#include "hybrid/accelerator.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace hybrimoe {

namespace {

bool may_cache(const common & shared, const device_port & port, int layer) {
    return shared.book.layer(layer).llama_layer >= shared.config.n_cpu_layers &&
           device_compute::supports(port, shared.book.layer(layer).layout);
}

// As many slots for each layer as the budget holds, then one more for as many layers as the rest allows. Backends pad
// what they allocate, so the sizes are asked of the device.
std::vector<int> slots_for_budget(const common & shared, const device_port & port, double budget) {
    const int n_layers = shared.book.n_layers();
    std::vector<int> slots(static_cast<size_t>(n_layers), 0);
    std::vector<bool> may(static_cast<size_t>(n_layers), false);
    int32_t most = 0;
    for (int layer = 0; layer < n_layers; layer++) {
        may[static_cast<size_t>(layer)] = may_cache(shared, port, layer);
        most                            = std::max(most, shared.book.layer(layer).layout.n_expert);
    }
    const auto bytes = [&](int layer, int n) {
        const bool has_any = may[static_cast<size_t>(layer)] && n > 0;
        return has_any ? static_cast<double>(slot_set::needed_bytes(port, shared.book.layer(layer).layout, n)) : 0.0;
    };
    const auto all_bytes = [&](int n) {
        double sum = 0.0;
        for (int layer = 0; layer < n_layers; layer++) {
            sum += bytes(layer, n);
        }
        return sum;
    };
    const double one = (all_bytes(33) - all_bytes(1)) / 32.0;
    if (one <= 0.0 || budget <= 0.0) {
        return slots;
    }
    int each = static_cast<int>(std::min(budget / one, static_cast<double>(most)));
    while (each > 0 && all_bytes(each) > budget) {
        each--;
    }
    double left = budget - all_bytes(each);
    for (int layer = 0; layer < n_layers; layer++) {
        const double more   = bytes(layer, each + 1) - bytes(layer, each);
        const bool one_more = more > 0.0 && more <= left;
        left -= one_more ? more : 0.0;
        slots[static_cast<size_t>(layer)] = may[static_cast<size_t>(layer)] ? each + (one_more ? 1 : 0) : 0;
    }
    return slots;
}

// With the setting "reproducible": whole layers stand on accelerators from set-up to the end, as plain llama.cpp would
// place them, so that which device computes an expert never depends on anything that happens while the model runs.
// Whole layers rather than some experts of each: then one device computes all of a token's sum in a layer, and only
// layers that are on an accelerator pay for launching and waiting. `free` decides for the size "auto" alone: any other
// size is shared out by what the devices have.
slot_table fixed_slots(const common & shared, const std::vector<const device_port *> & devices,
                       const std::vector<double> & free) {
    const layer_book & book        = shared.book;
    const expert_cache_size & size = shared.config.expert_cache;
    std::vector<double> total;
    for (const device_port * port : devices) {
        total.push_back(static_cast<double>(port->total_bytes()));
    }
    const double all = std::accumulate(total.begin(), total.end(), 0.0);
    std::vector<bool> is_taken(static_cast<size_t>(book.n_layers()), false);
    slot_table slots;
    for (size_t d = 0; d < devices.size(); d++) {
        const double share = all > 0.0 ? total[d] / all : 1.0 / static_cast<double>(devices.size());
        std::vector<bool> may_take(static_cast<size_t>(book.n_layers()), false);
        double budget = 0.0;
        for (int layer = 0; layer < book.n_layers(); layer++) {
            const expert_layout & layout = book.layer(layer).layout;
            if (!may_cache(shared, *devices[d], layer)) {
                continue;
            }
            may_take[static_cast<size_t>(layer)] = !is_taken[static_cast<size_t>(layer)];
            const double n = size.is == expert_cache_size::kind::slots ? static_cast<double>(size.n_slots)
                                                                       : size.fraction * layout.n_expert;
            budget += share * std::min<double>(n, layout.n_expert) * static_cast<double>(layout.expert_bytes());
        }
        if (size.is == expert_cache_size::kind::automatic) {
            budget = free[d] - static_cast<double>(shared.config.fit_margin_bytes);
        } else if (size.is == expert_cache_size::kind::bytes) {
            budget = share * size.n_bytes;
        }
        slots.push_back(whole_layers(book, budget, may_take));
        for (size_t layer = 0; layer < is_taken.size(); layer++) {
            is_taken[layer] = is_taken[layer] || slots.back()[layer] > 0;
        }
    }
    return slots;
}

// What slots may take of the device's memory: the rest is work memory of prefill.
double free_for_slots(const common & shared, const device_port & port) {
    const layer_book & book = shared.book;
    double work             = 0.0;
    for (int cls = 0; cls < book.n_classes(); cls++) {
        const expert_layout & layout = book.of_class(cls).layout;
        work = std::max(work, static_cast<double>(device_compute::batch_bytes(layout, shared.config.max_batch_tokens,
                                                                              book.max_top_k())));
        work += n_scratch_slots * static_cast<double>(layout.expert_bytes());
    }
    for (int layer = 0; layer < book.n_layers() && shared.in_graph(); layer++) {
        work += static_cast<double>(book.layer(layer).layout.expert_bytes()); // its zero slot
    }
    return std::max(0.0, static_cast<double>(port.free_bytes()) - work);
}

} // namespace

std::vector<int> whole_layers(const layer_book & book, double budget, const std::vector<bool> & may_take) {
    std::vector<double> expert_bytes;
    std::vector<int> n_expert;
    for (int layer = 0; layer < book.n_layers(); layer++) {
        expert_bytes.push_back(static_cast<double>(book.layer(layer).layout.expert_bytes()));
        n_expert.push_back(static_cast<int>(book.layer(layer).layout.n_expert));
    }
    return whole_layers(budget, expert_bytes, n_expert, may_take);
}

slot_table count_slots(const common & shared, const std::vector<const device_port *> & devices) {
    const layer_book & book        = shared.book;
    const expert_cache_size & size = shared.config.expert_cache;
    std::vector<double> free;
    for (const device_port * port : devices) {
        free.push_back(free_for_slots(shared, *port));
    }
    if (shared.config.reproducible) {
        return fixed_slots(shared, devices, free);
    }
    const double all_free = std::accumulate(free.begin(), free.end(), 0.0);
    slot_table slots;
    for (size_t d = 0; d < devices.size(); d++) {
        const double share = all_free > 0.0 ? free[d] / all_free : 1.0 / static_cast<double>(devices.size());
        switch (size.is) {
        case expert_cache_size::kind::automatic:
            slots.push_back(
                slots_for_budget(shared, *devices[d], free[d] - static_cast<double>(shared.config.fit_margin_bytes)));
            break;
        case expert_cache_size::kind::bytes:
            slots.push_back(slots_for_budget(shared, *devices[d], size.n_bytes * share));
            break;
        default: {
            std::vector<int> one;
            for (int layer = 0; layer < book.n_layers(); layer++) {
                const double n    = size.is == expert_cache_size::kind::slots
                                        ? static_cast<double>(size.n_slots)
                                        : std::round(size.fraction * book.layer(layer).layout.n_expert);
                const bool usable = may_cache(shared, *devices[d], layer);
                one.push_back(usable ? static_cast<int>(std::ceil(n * share - 1e-9)) : 0);
            }
            slots.push_back(std::move(one));
        }
        }
    }
    // No layer has more slots than experts, on all devices together.
    for (int layer = 0; layer < book.n_layers(); layer++) {
        int left = book.layer(layer).layout.n_expert;
        for (auto & of_device : slots) {
            int & n = of_device[static_cast<size_t>(layer)];
            n       = std::min(n, left);
            left -= n;
        }
    }
    return slots;
}

} // namespace hybrimoe
