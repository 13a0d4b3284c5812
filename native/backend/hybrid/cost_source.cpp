#include "hybrid/cost_source.h"

#include "hybrid/fleet.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <thread>

namespace hybrimoe {

namespace {

constexpr int n_runs       = 3;   // the fastest counts: the first one warms up
constexpr int many_tokens  = 32;  // second point of a curve
constexpr double enough_us = 2e6; // a copy that takes longer is not waited for

// Time over tokens through two measured points: constant up to one token's, then a straight line, never falling.
status curve_of(double one_us, double many_us, int n_many, cost_curve & out) {
    const double points[] = {1.0, static_cast<double>(n_many)};
    const double times[]  = {std::max(one_us, 0.01), std::max(many_us, std::max(one_us, 0.01))};
    return cost_curve::piecewise(points, times, 2, out);
}

std::vector<int32_t> some_experts(const known_layer & layer, int n, int turn) {
    std::vector<int32_t> experts;
    for (int i = 0; i < n; i++) {
        experts.push_back((turn * n + i) % layer.layout.n_expert);
    }
    return experts;
}

class prober {
public:
    prober(const common & shared, fleet & devices, cpu_timer & timer)
        : book_(shared.book), devices_(devices), timer_(timer), clock_(shared.clock) {}

    status run(cost_model & out) {
        double dram_bytes_per_us = 0.0;
        double cpu_step_us       = std::numeric_limits<double>::infinity();
        for (int cls = 0; cls < book_.n_classes(); cls++) {
            HYBRIMOE_TRY(probe_cpu(cls, out, dram_bytes_per_us, cpu_step_us));
        }
        HYBRIMOE_TRY(out.set_step(cpu_device, cpu_step_us));
        for (int d = 0; d < devices_.size(); d++) {
            HYBRIMOE_TRY(probe_device(d, out, dram_bytes_per_us));
        }
        // The ceiling that CPU reads and copies share: at least what either reached alone.
        return out.set_dram(dram_bytes_per_us);
    }

private:
    status probe_cpu(int cls, cost_model & out, double & dram, double & step_us) {
        const known_layer & layer = book_.of_class(cls);
        const int several         = std::min<int>(4, layer.layout.n_expert);
        double one                = best([&](int i) { return timer_.time_us(layer, some_experts(layer, 1, i), 1); });
        double all  = best([&](int i) { return timer_.time_us(layer, some_experts(layer, several, i + 2), 1); });
        double wide = best([&](int i) { return timer_.time_us(layer, some_experts(layer, 1, i + 5), many_tokens); });
        all         = std::max(all, one);
        const double each  = several > 1 ? std::max((all - one) / (several - 1), one / several / 4) : one;
        const double first = std::max(one - each, 0.0);
        step_us            = std::min(step_us, 0.0);
        dram               = std::max(dram, several * static_cast<double>(layer.layout.expert_bytes()) / all);
        cost_curve curve;
        HYBRIMOE_TRY(curve_of(each, wide - first, many_tokens, curve));
        return out.set_cpu(cls, curve, first);
    }

    status probe_device(int d, cost_model & out, double & dram) {
        accelerator & device = devices_[d];
        double step_us       = 0.0;
        double big_bytes = 0.0, big_us = 0.0;
        for (int cls = 0; cls < book_.n_classes(); cls++) {
            const int layer_index = usable_layer(device, cls);
            if (layer_index < 0) { // never used there: as dear as can be, so that no plan takes it
                cost_curve never;
                HYBRIMOE_TRY(cost_curve::affine(1e9, 0.0, never));
                HYBRIMOE_TRY(out.set_gpu(cls, d, never));
                continue;
            }
            const known_layer & layer = book_.layer(layer_index);
            const slot_set & slots    = device.of_layer(layer_index);
            const double copy_us      = best([&](int i) { return time_copy(device, layer, slots, i); });
            if (static_cast<double>(layer.layout.expert_bytes()) > big_bytes) {
                big_bytes = static_cast<double>(layer.layout.expert_bytes());
                big_us    = copy_us;
            }
            const int several = std::min<int>({4, slots.n_slots(), layer.top_k});
            const double one  = best([&](int) { return time_rows(device, layer, slots, 1); });
            const double all  = std::max(one, best([&](int) { return time_rows(device, layer, slots, several); }));
            const double each = several > 1 ? std::max((all - one) / (several - 1), 0.01) : one / 2;
            const double wide = best([&](int) { return time_chunk(device, layer, slots); });
            step_us           = std::max(step_us, std::max(one - each, 0.0));
            cost_curve curve;
            HYBRIMOE_TRY(curve_of(each, each + std::max(wide - one, 0.0), many_tokens, curve));
            HYBRIMOE_TRY(out.set_gpu(cls, d, curve));
        }
        if (big_bytes == 0.0) { // no slots at all
            HYBRIMOE_TRY(out.set_step(d, 0.0));
            return out.set_link(d, 0.0, 1.0);
        }
        // Six to seven microseconds for each small copy (measured on CUDA; algorithms.md section 4); live timings mend
        // it.
        const double latency_us = device.port.is_cpu() ? 0.0 : std::min(7.0, big_us / 2);
        dram                    = std::max(dram, big_bytes / big_us);
        HYBRIMOE_TRY(out.set_step(d, step_us));
        return out.set_link(d, latency_us, big_bytes / std::max(big_us - latency_us, 0.01));
    }

    int usable_layer(const accelerator & device, int cls) const {
        for (int layer = 0; layer < book_.n_layers(); layer++) {
            if (book_.layer(layer).cls == cls && device.of_layer(layer).n_slots() > 0) {
                return layer;
            }
        }
        return -1;
    }

    double time_copy(accelerator & device, const known_layer & layer, const slot_set & slots, int turn) {
        copy_order order;
        order.id     = -1;
        order.layout = &layer.layout;
        order.slots  = &slots;
        order.expert = turn % layer.layout.n_expert;
        order.slot   = turn % slots.n_slots();
        device.worker.copy(order, true);
        if (!device.worker.wait_idle(enough_us)) {
            return enough_us;
        }
        device.worker.collect(results_);
        return results_.empty() ? enough_us : std::max(results_.back().us, 0.01);
    }

    double time_rows(accelerator & device, const known_layer & layer, const slot_set & slots, int n) {
        std::vector<float> x(static_cast<size_t>(layer.layout.n_embd), 0.01f);
        std::vector<int32_t> ids(static_cast<size_t>(n));
        std::iota(ids.begin(), ids.end(), 0);
        const double begin = clock_.now_us();
        rows_request request;
        request.layout   = &layer.layout;
        request.slots    = &slots;
        request.x        = x.data();
        request.slot_ids = request.experts = ids.data();
        request.n                          = n;
        if (!device.compute.launch_rows(request)) {
            return enough_us;
        }
        device.compute.synchronize();
        return clock_.now_us() - begin;
    }

    double time_chunk(accelerator & device, const known_layer & layer, const slot_set & slots) {
        std::vector<float> x(static_cast<size_t>(layer.layout.n_embd) * many_tokens, 0.01f);
        pair_list pairs;
        for (int t = 0; t < many_tokens; t++) {
            pairs.add(t, 0, 0);
        }
        int64_t row = 0;
        if (!device.compute.begin_batch(layer.layout, x.data(),
                                        static_cast<size_t>(layer.layout.n_embd) * sizeof(float), {}, many_tokens,
                                        many_tokens, 1)) {
            return enough_us;
        }
        device.compute.synchronize();
        const double begin = clock_.now_us();
        if (!device.compute.launch_chunk(layer.layout, slots, pairs, row)) {
            return enough_us;
        }
        device.compute.synchronize();
        return clock_.now_us() - begin;
    }

    template <class measure> static double best(measure one) {
        double least = std::numeric_limits<double>::infinity();
        for (int i = 0; i < n_runs; i++) {
            least = std::min(least, one(i));
        }
        return least;
    }

    const layer_book & book_;
    fleet & devices_;
    cpu_timer & timer_;
    const step_clock & clock_;
    std::vector<copy_result> results_;
};

} // namespace

status simple_cost_model(const simple_costs & given, const layer_book & book, int n_devices, cost_model & out) {
    HYBRIMOE_TRY(set_layers(book, n_devices, out));
    cost_curve cpu;
    cost_curve gpu;
    HYBRIMOE_TRY(cost_curve::affine(0.0, given.cpu_us, cpu));
    HYBRIMOE_TRY(cost_curve::affine(given.gpu_us, 0.0, gpu));
    double most_bytes = 1.0;
    for (int cls = 0; cls < book.n_classes(); cls++) {
        HYBRIMOE_TRY(out.set_cpu(cls, cpu, given.cpu_first_us));
        for (int d = 0; d < n_devices; d++) {
            HYBRIMOE_TRY(out.set_gpu(cls, d, gpu));
        }
        most_bytes = std::max(most_bytes, static_cast<double>(book.of_class(cls).layout.expert_bytes()));
    }
    for (int d = 0; d < n_devices; d++) {
        HYBRIMOE_TRY(out.set_link(d, 0.0, most_bytes / given.copy_us));
        HYBRIMOE_TRY(out.set_step(d, 0.0));
    }
    HYBRIMOE_TRY(out.set_step(cpu_device, 0.0));
    return out.set_dram(std::numeric_limits<double>::infinity());
}

status measured_cost_model(const common & shared, fleet & devices, cpu_timer & timer, cost_model & out) {
    HYBRIMOE_TRY(set_layers(shared.book, devices.size(), out));
    HYBRIMOE_TRY(prober(shared, devices, timer).run(out));
    return out.check();
}

status find_cost_model(const common & shared, fleet & devices, cpu_timer & timer, cost_model & out) {
    const settings & config = shared.config;
    if (config.simple) {
        return simple_cost_model(*config.simple, shared.book, devices.size(), out);
    }
    if (!config.costs_json.empty()) {
        const status made = calibrated_cost_model(config.costs_json, shared.book, devices.size(), out);
        if (made.ok()) {
            return made;
        }
        shared.log.add("%s; measuring instead", made.message());
    }
    return measured_cost_model(shared, devices, timer, out);
}

} // namespace hybrimoe
