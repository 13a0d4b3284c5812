// Tables of policies by name. Each folder lists its policies once, in policies.def; a name is looked up once, when a
// policy is made, and never compared again.
#pragma once

#include "params.h"
#include "types.h"

#include <memory>
#include <string>

namespace hybrimoe {

struct policy_traits {
    bool needs_scores = false; // router scores, not only ids
    bool oracle       = false; // needs the future: replay only
    bool needs_costs  = false; // needs a cost model
};

template <class policy> struct policy_entry {
    const char * name;
    const char * doc;    // one sentence
    const char * source; // paper section or repository, or "" for the plain textbook policy
    policy_traits traits;
    const param_info * params;
    int n_params;
    std::unique_ptr<policy> (*make)(const model_shape &, const param_values &);
};

template <class policy> struct policy_table {
    const char * kind; // for messages: "eviction policy"
    const policy_entry<policy> * const * entries;
    int n_entries;
};

template <class policy>
status find_entry(const policy_table<policy> & table, const char * name, const policy_entry<policy> *& out) {
    std::string known;
    for (int i = 0; i < table.n_entries; ++i) {
        if (name && std::strcmp(table.entries[i]->name, name) == 0) {
            out = table.entries[i];
            return {};
        }
        known += (i ? ", " : "") + std::string(table.entries[i]->name);
    }
    return status::fail(error_code::unknown_name, "unknown %s '%s'; known: %s", table.kind, name ? name : "",
                        known.c_str());
}

template <class policy>
status make_policy(const policy_table<policy> & table, const char * name, const model_shape & shape,
                   const named_value * given, int n_given, std::unique_ptr<policy> & out) {
    const policy_entry<policy> * entry = nullptr;
    HYBRIMOE_TRY(find_entry(table, name, entry));
    param_values values;
    HYBRIMOE_TRY(param_values::resolve(name, entry->params, entry->n_params, given, n_given, values));
    out = entry->make(shape, values);
    return {};
}

} // namespace hybrimoe
