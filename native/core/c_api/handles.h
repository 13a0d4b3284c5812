// What the opaque handles of hybrimoe_core.h are, and how a status leaves the library.
#pragma once

#include "../cost_model.h"
#include "../expert_cache.h"
#include "../replay/cache_replay.h"
#include "../runtime.h"

#include "hybrimoe_core.h"

#include <memory>
#include <new>
#include <vector>

struct hm_costs {
    hybrimoe::cost_model model;
};

struct hm_scheduler {
    std::unique_ptr<hybrimoe::scheduler> policy;
};

// Distinct experts and loads of one step, buffers reused.
struct hm_gathered_step {
    std::vector<int32_t> active, loads, load_of;
};

struct hm_cache {
    hybrimoe::expert_cache cache;
    hm_gathered_step step;
    std::vector<hybrimoe::slot_move> moves;
};

struct hm_runtime {
    std::unique_ptr<hybrimoe::runtime> rt;
    // The last decision, in C layout.
    std::vector<hm_placement> placements;
    std::vector<hm_transfer> transfers;
    std::vector<hybrimoe::slot_move> moves;
    hybrimoe::trial_request trial; // of the next layer that is replayed
};

namespace hybrimoe {

inline int leave(const status & s, char * message, size_t message_size) {
    if (!s.ok() && message && message_size > 0) {
        std::snprintf(message, message_size, "%s", s.message());
    }
    return static_cast<int>(s.code());
}

// Runs a body that yields a status; no exception crosses the C interface.
template <class body> int guarded(char * message, size_t message_size, body run) {
    try {
        return leave(run(), message, message_size);
    } catch (const std::bad_alloc &) {
        return leave(status::fail(error_code::out_of_memory, "out of memory"), message, message_size);
    } catch (...) {
        return leave(status::fail(error_code::internal, "unexpected exception in the policy core"), message,
                     message_size);
    }
}

inline status null_argument(const char * name) {
    return status::fail(error_code::invalid_argument, "%s is NULL", name);
}

template <class policy>
status make_from(const policy_table<policy> & table, const hm_policy * given, const model_shape & shape,
                 std::unique_ptr<policy> & out) {
    if (!given || given->n_params < 0 || (given->n_params > 0 && !given->params)) {
        return null_argument("policy");
    }
    std::vector<named_value> values;
    for (int i = 0; i < given->n_params; ++i) {
        values.push_back({given->params[i].name, given->params[i].value});
    }
    return make_policy(table, given->name, shape, values.data(), given->n_params, out);
}

status read_cache_config(const hm_cache_config * config, cache_config & out);
status read_trace(const hm_trace * t, replay_trace & out);
status same_shape(const model_shape & a, const model_shape & b);
status copy_moves(const model_shape & shape, const std::vector<slot_move> & moves, hm_slot_move * out, int32_t capacity,
                  int32_t * n_moves);

} // namespace hybrimoe
