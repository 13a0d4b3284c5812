#include "cache_replay.h"

#include <algorithm>

namespace hybrimoe {

status check_trace(const replay_trace & t) {
    const model_shape & s = t.shape;
    if (!t.experts || t.n_tokens < 0) {
        return status::fail(error_code::invalid_argument, "the trace is empty or has %lld tokens",
                            static_cast<long long>(t.n_tokens));
    }
    if (t.n_prompts < 1 || !t.prompt_offsets || t.prompt_offsets[0] != 0 ||
        t.prompt_offsets[t.n_prompts] != t.n_tokens) {
        return status::fail(error_code::invalid_argument, "prompt offsets must run from 0 to the %lld tokens",
                            static_cast<long long>(t.n_tokens));
    }
    for (int64_t p = 0; p < t.n_prompts; ++p) {
        if (t.prompt_offsets[p + 1] < t.prompt_offsets[p]) {
            return status::fail(error_code::invalid_argument, "prompt offset %lld falls",
                                static_cast<long long>(p + 1));
        }
    }
    const int32_t * ids = t.experts;
    for (int64_t token = 0; token < t.n_tokens; ++token) {
        for (int layer = 0; layer < s.n_layers; ++layer, ids += s.top_k) {
            for (int k = 0; k < s.top_k; ++k) {
                const bool skipped = ids[0] < 0;
                if (skipped ? ids[k] >= 0 : ids[k] < 0 || ids[k] >= s.n_expert) {
                    return status::fail(error_code::invalid_argument,
                                        "token %lld, layer %d: expert %d is outside 0..%d",
                                        static_cast<long long>(token), layer, ids[k], s.n_expert - 1);
                }
            }
        }
    }
    return {};
}

namespace {

void start(const replay_options & options, expert_cache & cache, admission_policy & admission) {
    cache.reset(options.preload && !options.resident);
    admission.reset();
    if (!options.resident) {
        return;
    }
    const model_shape & s = cache.shape();
    load_result ignored;
    for (int layer = 0; layer < s.n_layers; ++layer) {
        int device = 0, left = cache.n_devices() > 0 ? cache.n_slots(layer, 0) : 0;
        for (int e = 0; e < s.n_expert; ++e) {
            while (left == 0 && device + 1 < cache.n_devices()) {
                left = cache.n_slots(layer, ++device);
            }
            if (left > 0 && options.resident[s.key(layer, e)] &&
                cache.begin_load(layer, e, device, false, ignored).ok()) {
                cache.complete_load(layer, e);
                --left;
            }
        }
    }
}

class replayer {
public:
    replayer(const replay_trace & trace, expert_cache & cache, admission_policy & admission, replay_result & out)
        : trace_(trace), s_(trace.shape), cache_(cache), admission_(admission), out_(out) {
        std::fill(ones_, ones_ + max_experts, 1);
    }

    status run_layer(int64_t token, int layer) {
        const auto at = static_cast<size_t>(token) * static_cast<size_t>(s_.n_layers) + static_cast<size_t>(layer);
        const int32_t * ids = trace_.experts + at * static_cast<size_t>(s_.top_k);
        if (ids[0] < 0) {
            return {};
        }
        router_step step;
        step.layer     = layer;
        step.experts   = ids;
        step.n_tokens  = ones_;
        step.n_experts = s_.top_k;
        step.n_rows    = 1;
        step.top_k     = s_.top_k;
        step.ids       = ids;
        step.weights   = trace_.weights ? trace_.weights + at * static_cast<size_t>(s_.top_k) : nullptr;
        step.scores    = trace_.scores ? trace_.scores + at * static_cast<size_t>(s_.n_expert) : nullptr;

        const int64_t hits_before = cache_.stats().n_hits;
        HYBRIMOE_TRY(cache_.begin_step(step));
        admission_.on_step(step);
        const int64_t n_hits = cache_.stats().n_hits - hits_before;
        out_.n_queries += s_.top_k;
        out_.n_hits += n_hits;
        out_.queries_per_layer[static_cast<size_t>(layer)] += s_.top_k;
        out_.hits_per_layer[static_cast<size_t>(layer)] += n_hits;
        if (n_hits < s_.top_k) {
            admit_misses(step);
        }
        cache_.end_step();
        return {};
    }

private:
    void admit_misses(const router_step & step) {
        load_result loaded;
        for (int k = 0; k < step.n_experts; ++k) {
            const int expert = step.experts[k];
            const int key    = s_.key(step.layer, expert);
            if (cache_.lookup(step.layer, expert).state != slot_state::absent || !admission_.wants(key)) {
                continue;
            }
            for (int d = 0; d < cache_.n_devices(); ++d) {
                if (!cache_.begin_load(step.layer, expert, d, false, loaded).ok()) {
                    continue; // refused here: no slot, or bypassed
                }
                cache_.complete_load(step.layer, expert);
                admission_.on_admit(key);
                ++out_.n_loads;
                if (loaded.evicted_key >= 0) {
                    ++out_.n_evictions;
                    admission_.on_evict(loaded.evicted_key);
                }
                break;
            }
        }
    }

    const replay_trace & trace_;
    const model_shape & s_;
    expert_cache & cache_;
    admission_policy & admission_;
    replay_result & out_;
    int32_t ones_[max_experts];
};

} // namespace

status replay_cache(const replay_trace & trace, const replay_options & options, expert_cache & cache,
                    admission_policy & admission, bool oracle, replay_result & out) {
    HYBRIMOE_TRY(check_trace(trace));
    out = replay_result();
    out.hits_per_layer.assign(static_cast<size_t>(trace.shape.n_layers), 0);
    out.queries_per_layer.assign(static_cast<size_t>(trace.shape.n_layers), 0);
    replayer run(trace, cache, admission, out);
    const size_t row = static_cast<size_t>(trace.shape.n_layers) * static_cast<size_t>(trace.shape.top_k);
    for (int64_t p = 0; p < trace.n_prompts; ++p) {
        const int64_t first = trace.prompt_offsets[p];
        const int64_t last  = trace.prompt_offsets[p + 1];
        if (p == 0 || options.cold) {
            start(options, cache, admission);
            if (oracle) { // a cold oracle knows the future of its own prompt, which is all that matters to it
                const int64_t n_known = (options.cold ? last : trace.n_tokens) - first;
                HYBRIMOE_TRY(cache.policy().set_future({trace.experts + static_cast<size_t>(first) * row, n_known}));
            }
        } else {
            cache.begin_prompt();
        }
        for (int64_t token = first; token < last; ++token) {
            for (int layer = 0; layer < trace.shape.n_layers; ++layer) {
                HYBRIMOE_TRY(run.run_layer(token, layer));
            }
        }
    }
    return {};
}

} // namespace hybrimoe
