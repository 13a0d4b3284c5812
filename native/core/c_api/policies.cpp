#include "../allocation/slot_allocation.h"
#include "handles.h"

using namespace hybrimoe;

namespace {

template <class policy> int describe(const policy_table<policy> & table, int32_t index, hm_policy_info * out) {
    if (index < 0 || index >= table.n_entries || !out) {
        return HM_INVALID_ARGUMENT;
    }
    const policy_entry<policy> & e = *table.entries[index];
    *out = {e.name, e.doc, e.source, e.traits.needs_scores, e.traits.oracle, e.traits.needs_costs, e.n_params};
    return HM_OK;
}

template <class policy>
int describe_param(const policy_table<policy> & table, int32_t index, int32_t param, hm_param_info * out) {
    if (index < 0 || index >= table.n_entries || param < 0 || param >= table.entries[index]->n_params || !out) {
        return HM_INVALID_ARGUMENT;
    }
    const param_info & p = table.entries[index]->params[param];
    *out                 = {p.name, p.doc, p.default_value, p.min_value, p.max_value, p.integer};
    return HM_OK;
}

// Calls `visit` with the table of a kind; `none` where there is no such kind.
template <class result, class visitor> result with_table(int32_t kind, result none, visitor visit) {
    switch (kind) {
    case HM_SCHEDULER:
        return visit(schedulers());
    case HM_EVICTION:
        return visit(eviction_policies());
    case HM_ADMISSION:
        return visit(admission_policies());
    case HM_PREFETCH:
        return visit(prefetchers());
    case HM_ALLOCATION:
        return visit(slot_allocations());
    default:
        return none;
    }
}

} // namespace

extern "C" {

int hm_core_api_version(void) {
    return HM_CORE_API_VERSION;
}

const char * hm_kind_name(int32_t kind) {
    return with_table<const char *>(kind, nullptr, [](const auto & table) { return table.kind; });
}

int32_t hm_policy_count(int32_t kind) {
    return with_table<int32_t>(kind, 0, [](const auto & table) { return static_cast<int32_t>(table.n_entries); });
}

int hm_policy_describe(int32_t kind, int32_t index, hm_policy_info * out) {
    return with_table<int>(kind, HM_INVALID_ARGUMENT, [&](const auto & table) { return describe(table, index, out); });
}

int hm_policy_param(int32_t kind, int32_t index, int32_t param, hm_param_info * out) {
    return with_table<int>(kind, HM_INVALID_ARGUMENT,
                           [&](const auto & table) { return describe_param(table, index, param, out); });
}

int hm_allocate_slots(const hm_policy * policy, int32_t n_layers, int32_t n_expert, int32_t n_total,
                      const double * demand, int32_t * n_slots, char * message, size_t message_size) {
    return guarded(message, message_size, [&]() -> status {
        if (!n_slots) {
            return null_argument("n_slots");
        }
        allocation_request request;
        request.shape   = {n_layers, n_expert, 1};
        request.n_total = n_total;
        request.demand  = demand;
        std::unique_ptr<slot_allocation> made;
        HYBRIMOE_TRY(make_from(slot_allocations(), policy, request.shape, made));
        std::vector<int> slots;
        HYBRIMOE_TRY(allocate_slots(*made, request, slots));
        std::copy(slots.begin(), slots.end(), n_slots);
        return {};
    });
}

} // extern "C"
