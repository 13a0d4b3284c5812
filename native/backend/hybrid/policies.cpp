#include "hybrid/policies.h"

#include "hybrid/policy_text.h"

namespace hybrimoe {

status compose(const common & shared, const cost_model & costs, const slot_table & slots, composed & out) {
    const settings & config = shared.config;
    runtime_config made;
    model_shape & shape  = made.cache.shape;
    shape.n_layers       = shared.book.n_layers();
    shape.n_expert       = shared.book.max_experts();
    shape.top_k          = shared.book.max_top_k();
    made.cache.n_devices = static_cast<int>(slots.size());
    for (const auto & of_device : slots) {
        made.cache.n_slots.insert(made.cache.n_slots.end(), of_device.begin(), of_device.end());
    }
    HYBRIMOE_TRY(make_policy(eviction_policies(), config.cache_policy, shape, made.eviction));
    HYBRIMOE_TRY(make_policy(admission_policies(), config.admission, shape, made.admission));
    HYBRIMOE_TRY(make_policy(schedulers(), config.schedule, shape, made.schedule));
    HYBRIMOE_TRY(make_policy(prefetchers(), config.prefetch, shape, made.prefetch));
    parsed_policy eviction;
    HYBRIMOE_TRY(parsed_policy::parse(config.cache_policy, eviction));
    const policy_entry<eviction_policy> * entry = nullptr;
    HYBRIMOE_TRY(find_entry(eviction_policies(), eviction.name.c_str(), entry));
    out.needs_scores = entry->traits.needs_scores;
    if (entry->traits.oracle) {
        return status::fail(error_code::invalid_argument, "the cache policy %s knows the future: it is for simulations",
                            eviction.name.c_str());
    }
    out.horizon = made.prefetch->horizon() > 0 ? made.prefetch->max_horizon() : 0;
    made.costs  = costs;
    return runtime::create(std::move(made), out.made);
}

} // namespace hybrimoe
