#include "clock_replay.h"

#include <algorithm>

namespace hybrimoe {

namespace {

class clock_run {
public:
    clock_run(const replay_trace & trace, const clock_options & options, runtime & rt)
        : t_(trace), o_(options), rt_(rt) {}

    double now_us() const { return now_us_; }

    status layer(int64_t step, int layer, clock_layer & record, bool & ran) {
        layer_event event;
        gather(step, layer, event);
        ran = event.n_rows > 0;
        if (!ran) {
            return {};
        }
        HYBRIMOE_TRY(deliver());
        event.gap_us          = o_.gap_us;
        event.gpu_ready_us[0] = rt_.costs().n_devices() > 0 ? o_.shared_us : 0.0;
        event.scratch         = o_.scratch && event.n_rows > 1;
        const decision * d    = nullptr;
        HYBRIMOE_TRY(rt_.on_layer(event, now_us_, d));
        fill(step, event, *d, record);
        now_us_ += d->plan.makespan_us + o_.gap_us;
        rt_.on_layer_done();
        return {};
    }

private:
    // Copies that ended by now, earliest first.
    status deliver() {
        for (;;) {
            const transfer * next = nullptr;
            for (const transfer & f : rt_.in_flight()) {
                if (f.end_us <= now_us_ &&
                    (!next || f.end_us < next->end_us || (f.end_us == next->end_us && f.id < next->id))) {
                    next = &f;
                }
            }
            if (!next) {
                return {};
            }
            HYBRIMOE_TRY(rt_.on_complete(next->id, next->end_us));
        }
    }

    // Rows of the step's tokens that ran this layer.
    void gather(int64_t step, int layer, layer_event & event) {
        const model_shape & s = t_.shape;
        ids_.clear();
        weights_.clear();
        scores_.clear();
        event.layer         = layer;
        event.top_k         = s.top_k;
        event.n_rows        = 0;
        const auto n_expert = static_cast<size_t>(s.n_expert);
        const auto n_look   = static_cast<size_t>(max_lookahead) * n_expert;
        if (o_.lookahead) {
            lookahead_.assign(n_look, 0.0F);
        }
        for (int64_t token = o_.step_offsets[step]; token < o_.step_offsets[step + 1]; ++token) {
            const size_t at = static_cast<size_t>(token) * static_cast<size_t>(s.n_layers) + static_cast<size_t>(layer);
            const size_t k  = at * static_cast<size_t>(s.top_k);
            if (t_.experts[k] < 0) {
                continue;
            }
            ++event.n_rows;
            ids_.insert(ids_.end(), t_.experts + k, t_.experts + k + s.top_k);
            if (t_.weights) {
                weights_.insert(weights_.end(), t_.weights + k, t_.weights + k + s.top_k);
            }
            if (t_.scores) {
                scores_.insert(scores_.end(), t_.scores + at * n_expert, t_.scores + (at + 1) * n_expert);
            }
            for (size_t i = 0; o_.lookahead && i < n_look; ++i) {
                lookahead_[i] += o_.lookahead[at * n_look + i];
            }
        }
        event.ids     = ids_.data();
        event.weights = t_.weights ? weights_.data() : nullptr;
        event.scores  = t_.scores ? scores_.data() : nullptr;
        for (size_t d = 0; o_.lookahead && d < max_lookahead; ++d) {
            event.lookahead[d] = lookahead_.data() + d * n_expert;
        }
    }

    void fill(int64_t step, const layer_event & event, const decision & d, clock_layer & r) const {
        const layer_plan & p = d.plan;
        r                    = clock_layer();
        r.step               = step;
        r.layer              = event.layer;
        r.n_rows             = event.n_rows;
        r.n_hits             = d.n_hits;
        r.n_misses           = d.n_misses;
        r.n_cpu              = p.n_cpu;
        r.n_gpu              = p.n_gpu;
        r.n_copies           = p.n_copies;
        r.start_us           = d.now_us;
        r.makespan_us        = p.makespan_us;
        for (const placement & at : p.placements) {
            (at.device == cpu_device ? r.cpu_us : r.gpu_us) += at.end_us - at.start_us;
        }
        for (const transfer & f : d.transfers) {
            r.link_us += f.end_us - f.start_us;
            r.n_prefetched += f.kind == transfer_kind::prefetch;
        }
    }

    const replay_trace & t_;
    const clock_options & o_;
    runtime & rt_;
    double now_us_ = 0.0;
    std::vector<int32_t> ids_;
    std::vector<float> weights_, scores_, lookahead_;
};

} // namespace

status replay_clock(const replay_trace & trace, const clock_options & options, runtime & rt, clock_layer * records,
                    int64_t capacity, clock_result & out) {
    HYBRIMOE_TRY(check_trace(trace));
    if (options.n_steps < 1 || !options.step_offsets || options.step_offsets[0] != 0 ||
        options.step_offsets[options.n_steps] != trace.n_tokens) {
        return status::fail(error_code::invalid_argument, "step offsets must run from 0 to the %lld tokens",
                            static_cast<long long>(trace.n_tokens));
    }
    for (int64_t i = 0; i < options.n_steps; ++i) {
        if (options.step_offsets[i + 1] < options.step_offsets[i]) {
            return status::fail(error_code::invalid_argument, "step offset %lld falls", static_cast<long long>(i + 1));
        }
    }
    out = clock_result();
    clock_run run(trace, options, rt);
    int64_t prompt = 1;
    for (int64_t step = 0; step < options.n_steps; ++step) {
        while (prompt < trace.n_prompts && trace.prompt_offsets[prompt] <= options.step_offsets[step]) {
            rt.begin_prompt();
            ++prompt;
        }
        for (int layer = 0; layer < trace.shape.n_layers; ++layer) {
            clock_layer record;
            bool ran = false;
            HYBRIMOE_TRY(run.layer(step, layer, record, ran));
            if (!ran) {
                continue;
            }
            if (records && out.n_layers_run < capacity) {
                records[out.n_layers_run] = record;
            }
            ++out.n_layers_run;
            out.experts_us += record.makespan_us;
            out.cpu_busy_us += record.cpu_us;
            out.gpu_busy_us += record.gpu_us;
            out.link_busy_us += record.link_us;
        }
    }
    out.total_us = run.now_us();
    return {};
}

} // namespace hybrimoe
