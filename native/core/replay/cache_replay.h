// Event-atomic replay of a routing trace against one cache policy: no clock, no costs. Of a step's experts all are
// looked up before any is admitted; every miss that admission wants is admitted, in the order listed; a victim is never
// one of the step's own experts.
#pragma once

#include "../admission/admission_policy.h"
#include "../expert_cache.h"

namespace hybrimoe {

struct replay_trace {
    model_shape shape;
    const int32_t * experts        = nullptr; // [n_tokens, n_layers, top_k]; -1 in the first place: did not run
    const float * weights          = nullptr; // the same shape, or null
    const float * scores           = nullptr; // [n_tokens, n_layers, n_expert], or null
    int64_t n_tokens               = 0;
    const int64_t * prompt_offsets = nullptr; // [n_prompts + 1]
    int64_t n_prompts              = 0;
};

struct replay_options {
    bool cold    = false; // every prompt from a cold cache and fresh statistics; else state is kept
    bool preload = true;  // caches start with experts 0.. of their layers; else empty
    // Start with these instead: [n_layers, n_expert], 1 = resident at first (lowest ids up to the slots). Null:
    // preload.
    const uint8_t * resident = nullptr;
};

struct replay_result {
    int64_t n_queries = 0, n_hits = 0, n_loads = 0, n_evictions = 0;
    std::vector<int64_t> hits_per_layer, queries_per_layer;
};

status replay_cache(const replay_trace & trace, const replay_options & options, expert_cache & cache,
                    admission_policy & admission, bool oracle, replay_result & out);

// Checks ids and offsets; names the place of the first fault.
status check_trace(const replay_trace & trace);

} // namespace hybrimoe
