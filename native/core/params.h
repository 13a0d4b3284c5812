// Self-described policy parameters: the one source for validation, CLI help and generated docs.
#pragma once

#include "status.h"

#include <vector>

namespace hybrimoe {

struct param_info {
    const char * name;
    double default_value;
    double min_value;
    double max_value;
    bool integer;
    const char * doc;
};

struct named_value {
    const char * name;
    double value;
};

// Values of all parameters of one policy: defaults, overridden by what the caller named.
class param_values {
public:
    static status resolve(const char * policy, const param_info * infos, int n_infos, const named_value * given,
                          int n_given, param_values & out);

    double get(const char * name) const; // a name the policy itself declared
    int get_int(const char * name) const { return static_cast<int>(get(name)); }

private:
    std::vector<named_value> values_;
};

} // namespace hybrimoe
