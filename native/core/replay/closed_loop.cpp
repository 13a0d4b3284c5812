#include "closed_loop.h"

#include "../allocation/whole_layers.h"
#include "virtual_machine.h"

#include <algorithm>
#include <cmath>

namespace hybrimoe {

namespace {

status check_phases(const std::vector<machine_phase> & phases, const runtime & rt) {
    if (phases.empty() || phases.front().from_token != 0) {
        return status::fail(error_code::invalid_argument, "the first phase must begin with token 0");
    }
    for (size_t i = 0; i < phases.size(); ++i) {
        const machine_phase & p = phases[i];
        if (i > 0 && p.from_token <= phases[i - 1].from_token) {
            return status::fail(error_code::invalid_argument, "phase %zu does not begin after the one before it", i);
        }
        HYBRIMOE_TRY(p.costs.check());
        if (p.costs.n_layers() != rt.costs().n_layers() || p.costs.n_devices() != rt.costs().n_devices()) {
            return status::fail(error_code::invalid_argument, "phase %zu has %d layers and %d devices, not %d and %d",
                                i, p.costs.n_layers(), p.costs.n_devices(), rt.costs().n_layers(),
                                rt.costs().n_devices());
        }
        if (!(p.noise >= 0.0 && p.noise < 1.0) || !(p.outlier_share >= 0.0 && p.outlier_share < 1.0) ||
            !(p.outlier_factor > 0.0 && std::isfinite(p.outlier_factor)) || p.waits_every_layers < 0 ||
            !(p.waits_us >= 0.0 && std::isfinite(p.waits_us))) {
            return status::fail(error_code::invalid_argument,
                                "phase %zu: noise and the share of outliers must be in 0..1, the outliers' factor "
                                "above 0, waits not negative",
                                i);
        }
    }
    return {};
}

class loop_run {
public:
    loop_run(const replay_trace & trace, const loop_options & options, runtime & rt, governor & gov)
        : trace_(trace), options_(options), rt_(rt), gov_(gov), machine_(options, rt.costs().n_devices()),
          n_layers_(trace.shape.n_layers) {
        for (int d = 0; d < rt.costs().n_devices(); ++d) {
            wanted_.emplace_back();
            for (int layer = 0; layer < n_layers_; ++layer) {
                wanted_.back().push_back(rt.cache().n_slots(layer, d));
            }
        }
        for (int layer = 0; layer < n_layers_; ++layer) {
            bytes_.push_back(rt.costs().of_layer(layer).bytes);
        }
        whole_ = static_slots(wanted_, bytes_, std::vector<int>(bytes_.size(), trace.shape.n_expert));
    }

    status begin_phase(const machine_phase & phase) {
        machine_.begin_phase(phase);
        return options_.is_told ? gov_.set_costs(phase.costs) : status();
    }

    status token(int64_t number, loop_token & out) {
        machine_.begin_token(number);
        const int64_t token   = number % trace_.n_tokens;
        const int64_t * begin = trace_.prompt_offsets;
        if (number > 0 && std::find(begin, begin + trace_.n_prompts, token) != begin + trace_.n_prompts) {
            rt_.begin_prompt();
        }
        out                    = loop_token();
        const double spent     = gov_.tried().spent_us();
        const int64_t n_trials = gov_.tried().n_trials();
        const double refill_us = refill_us_;
        refill_us_             = 0.0;
        gov_.begin_pass();
        for (int layer = 0; layer < n_layers_; ++layer) {
            HYBRIMOE_TRY(run_layer(token, layer, out));
        }
        guard_change change;
        const bool has_changed = gov_.end_pass(true, change);
        out.level              = gov_.level().level(); // from the next token on
        out.us += refill_us;
        out.trying_us = gov_.tried().spent_us() - spent + refill_us;
        out.n_trials  = static_cast<int>(gov_.tried().n_trials() - n_trials);
        compare(machine_.truth(), gov_.costs(), out);
        const auto is_static = [](guard_level level) { return level == guard_level::static_layers; };
        if (has_changed && is_static(change.from) != is_static(change.to)) {
            HYBRIMOE_TRY(relayout(is_static(change.to) ? whole_ : wanted_));
        }
        return {};
    }

private:
    static void compare(const cost_model & truth, const cost_model & belief, loop_token & out) {
        const auto cpu    = [](const cost_model & c) { return c.step_us(cpu_device) + c.t_cpu(0, 1.0, true); };
        out.believed_cpu  = cpu(belief) / cpu(truth);
        out.believed_dram = truth.dram_bytes_per_us() / belief.dram_bytes_per_us();
        if (truth.n_devices() > 0) {
            const auto gpu    = [](const cost_model & c) { return c.step_us(0) + c.t_gpu(0, 0, 1.0); };
            const auto copy   = [](const cost_model & c) { return c.t_copy(0, c.of_layer(0).bytes); };
            out.believed_gpu  = gpu(belief) / gpu(truth);
            out.believed_link = copy(belief) / copy(truth);
        }
    }

    status run_layer(int64_t token, int layer, loop_token & out) {
        const model_shape & s = trace_.shape;
        const size_t at = static_cast<size_t>(token) * static_cast<size_t>(n_layers_) + static_cast<size_t>(layer);
        const size_t k  = at * static_cast<size_t>(s.top_k);
        if (trace_.experts[k] < 0) {
            return {}; // the layer did not run
        }
        HYBRIMOE_TRY(deliver());
        layer_event event;
        event.layer   = layer;
        event.top_k   = s.top_k;
        event.ids     = trace_.experts + k;
        event.weights = trace_.weights ? trace_.weights + k : nullptr;
        event.scores  = trace_.scores ? trace_.scores + at * static_cast<size_t>(s.n_expert) : nullptr;
        event.gap_us  = options_.gap_us;
        gov_.begin_layer(event);
        in_flight_            = rt_.in_flight(); // before the plan adds its own
        const decision * made = nullptr;
        HYBRIMOE_TRY(rt_.on_layer(event, machine_.now_us(), made));
        out.cpu_only_us += machine_.plain_us(*made, layer, cpu_device);
        int plain_device = cpu_device;
        for (size_t d = 0; d < whole_.size(); ++d) {
            plain_device = whole_[d][static_cast<size_t>(layer)] > 0 ? static_cast<int>(d) : plain_device;
        }
        out.whole_layers_us += machine_.plain_us(*made, layer, plain_device);
        out.n_gpu += made->plan.n_gpu;
        out.n_copies += static_cast<int>(made->transfers.size());
        layer_timing timing;
        machine_.run_layer(event, *made, in_flight_, timing);
        out.us += timing.span_us;
        gov_.end_layer(event, *made, timing);
        rt_.on_layer_done();
        machine_.pass(options_.gap_us);
        return {};
    }

    status deliver() {
        for (const finished_copy & c : machine_.finished()) {
            HYBRIMOE_TRY(rt_.on_complete(c.id, c.end_us));
            gov_.on_copy(c.device, c.bytes, c.us, c.end_us);
        }
        machine_.finished().clear();
        return {};
    }

    // As the engine does: no copy is under way, layers whose slots change get what they are to hold.
    status relayout(const std::vector<std::vector<int>> & slots) {
        machine_.drain();
        HYBRIMOE_TRY(deliver());
        std::vector<std::vector<double>> copies(slots.size());
        // Those that shrink first: an expert is on one device only.
        for (const bool grows : {false, true}) {
            for (size_t d = 0; d < slots.size(); ++d) {
                const int device = static_cast<int>(d);
                for (int layer = 0; layer < n_layers_; ++layer) {
                    const int n = slots[d][static_cast<size_t>(layer)], before = rt_.cache().n_slots(layer, device);
                    if (n == before || (n > before) != grows) {
                        continue;
                    }
                    HYBRIMOE_TRY(rt_.resize(layer, device, n, moves_));
                    HYBRIMOE_TRY(fill(layer, device, copies[d]));
                }
            }
        }
        refill_us_ = machine_.fill(copies);
        gov_.on_refill(refill_us_);
        return {};
    }

    // What stays is copied into its new place; a layer that is held whole is filled.
    status fill(int layer, int device, std::vector<double> & copies) {
        const bool is_whole = rt_.cache().n_slots(layer, device) == trace_.shape.n_expert;
        for (int e = 0; e < trace_.shape.n_expert; ++e) {
            const residency at = rt_.cache().lookup(layer, e);
            if (at.state == slot_state::resident && at.device == device) {
                copies.push_back(bytes_[static_cast<size_t>(layer)]);
            } else if (is_whole && at.state == slot_state::absent) {
                load_result loaded;
                HYBRIMOE_TRY(rt_.cache().begin_load(layer, e, device, false, loaded));
                HYBRIMOE_TRY(rt_.cache().complete_load(layer, e));
                copies.push_back(bytes_[static_cast<size_t>(layer)]);
            }
        }
        return {};
    }

    const replay_trace & trace_;
    const loop_options & options_;
    runtime & rt_;
    governor & gov_;
    virtual_machine machine_;
    const int n_layers_;
    std::vector<std::vector<int>> wanted_, whole_; // [n_devices, n_layers] slots
    std::vector<double> bytes_;                    // [n_layers] of one expert
    std::vector<transfer> in_flight_;
    std::vector<slot_move> moves_;
    double refill_us_ = 0.0; // belongs to the next token
};

} // namespace

status run_closed_loop(const replay_trace & trace, const loop_options & options, runtime & rt, governor & gov,
                       loop_token * tokens) {
    HYBRIMOE_TRY(check_trace(trace));
    HYBRIMOE_TRY(check_phases(options.phases, rt));
    if (options.n_tokens < 1 || trace.n_tokens < 1 || !(options.gap_us >= 0.0) || !(options.overhead_us >= 0.0)) {
        return status::fail(error_code::invalid_argument,
                            "a closed loop needs tokens, and times that are not negative");
    }
    loop_run run(trace, options, rt, gov);
    size_t phase = 0;
    HYBRIMOE_TRY(run.begin_phase(options.phases[0]));
    for (int64_t token = 0; token < options.n_tokens; ++token) {
        while (phase + 1 < options.phases.size() && options.phases[phase + 1].from_token <= token) {
            HYBRIMOE_TRY(run.begin_phase(options.phases[++phase]));
        }
        HYBRIMOE_TRY(run.token(token, tokens[token]));
    }
    return {};
}

} // namespace hybrimoe
