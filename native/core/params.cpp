#include "params.h"

#include <cassert>
#include <cmath>
#include <string>

namespace hybrimoe {

status param_values::resolve(const char * policy, const param_info * infos, int n_infos, const named_value * given,
                             int n_given, param_values & out) {
    param_values resolved;
    for (int i = 0; i < n_infos; ++i) {
        resolved.values_.push_back({infos[i].name, infos[i].default_value});
    }
    for (int g = 0; g < n_given; ++g) {
        const char * name = given[g].name ? given[g].name : "";
        int i             = 0;
        while (i < n_infos && std::strcmp(infos[i].name, name) != 0) {
            ++i;
        }
        if (i == n_infos) {
            std::string known;
            for (int k = 0; k < n_infos; ++k) {
                known += (k ? ", " : "") + std::string(infos[k].name);
            }
            return status::fail(error_code::unknown_name, "policy '%s' has no parameter '%s'; known: %s", policy, name,
                                known.empty() ? "none" : known.c_str());
        }
        const param_info & info = infos[i];
        const double value      = given[g].value;
        // Written so that NaN fails too.
        if (!(value >= info.min_value && value <= info.max_value)) {
            return status::fail(error_code::invalid_argument, "%s: %s = %g is outside %g..%g", policy, name, value,
                                info.min_value, info.max_value);
        }
        if (info.integer && value != std::floor(value)) {
            return status::fail(error_code::invalid_argument, "%s: %s = %g must be a whole number in %g..%g", policy,
                                name, value, info.min_value, info.max_value);
        }
        resolved.values_[static_cast<size_t>(i)].value = value;
    }
    out = std::move(resolved);
    return {};
}

double param_values::get(const char * name) const {
    for (const named_value & v : values_) {
        if (std::strcmp(v.name, name) == 0) {
            return v.value;
        }
    }
    assert(!"a policy asked for a parameter that it does not declare");
    return 0.0;
}

} // namespace hybrimoe
