#include "../replay/closed_loop.h"

#include "handles.h"

using namespace hybrimoe;

extern "C" {

int hm_runtime_closed_loop(hm_runtime * runtime, const hm_trace * given, const hm_loop_options * options,
                           hm_loop_token * tokens, char * message, size_t message_size) {
    return guarded(message, message_size, [&]() -> status {
        if (!runtime || !options || !tokens || (options->n_phases > 0 && !options->phases)) {
            return null_argument("runtime, options, phases or tokens");
        }
        replay_trace trace;
        HYBRIMOE_TRY(read_trace(given, trace));
        HYBRIMOE_TRY(same_shape(trace.shape, runtime->rt->cache().shape()));
        loop_options o;
        o.n_tokens    = options->n_tokens;
        o.gap_us      = options->gap_us;
        o.overhead_us = options->overhead_us;
        o.seed        = options->seed;
        o.is_told     = options->is_told != 0;
        for (int32_t i = 0; i < options->n_phases; ++i) {
            const hm_machine_phase & p = options->phases[i];
            if (!p.costs) {
                return null_argument("costs of a phase");
            }
            o.phases.push_back({p.from_token, p.costs->model, p.noise, p.outlier_share, p.outlier_factor,
                                p.waits_every_layers, p.waits_us});
        }
        governor_options g;
        g.live      = options->live != 0;
        g.guard     = options->guard != 0;
        g.trials.on = options->trials != 0;
        governor made;
        HYBRIMOE_TRY(governor::create(runtime->rt->costs(), g, *runtime->rt, made));
        std::vector<loop_token> rows(static_cast<size_t>(std::max<int64_t>(0, o.n_tokens)));
        HYBRIMOE_TRY(run_closed_loop(trace, o, *runtime->rt, made, rows.data()));
        for (size_t i = 0; i < rows.size(); ++i) {
            const loop_token & t = rows[i];
            tokens[i]            = {t.us,           t.cpu_only_us,  t.whole_layers_us, t.trying_us,
                                    t.n_trials,     t.n_gpu,        t.n_copies,        static_cast<int32_t>(t.level),
                                    t.believed_cpu, t.believed_gpu, t.believed_link,   t.believed_dram};
        }
        return {};
    });
}

} // extern "C"
