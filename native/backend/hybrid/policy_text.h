// Policies as text, "name" or "name:param=value,param=value", as the command line and the settings have them.
#pragma once

#include "core/registry.h"

#include <cstdlib>
#include <string>
#include <vector>

namespace hybrimoe {

struct parsed_policy {
    std::string name;
    std::vector<std::string> keys;
    std::vector<double> values;

    static status parse(const std::string & text, parsed_policy & out) {
        const size_t colon = text.find(':');
        out                = {};
        out.name           = text.substr(0, colon);
        size_t at          = colon == std::string::npos ? text.size() : colon + 1;
        while (at < text.size()) {
            const size_t end        = std::min(text.find(',', at), text.size());
            const std::string part  = text.substr(at, end - at);
            const size_t equals     = part.find('=');
            char * rest             = nullptr;
            const std::string value = equals == std::string::npos ? "" : part.substr(equals + 1);
            const double number     = std::strtod(value.c_str(), &rest);
            if (value.empty() || *rest != '\0') {
                return status::fail(error_code::invalid_argument, "'%s' in policy '%s' is not parameter=number",
                                    part.c_str(), text.c_str());
            }
            out.keys.push_back(part.substr(0, equals));
            out.values.push_back(number);
            at = end + 1;
        }
        return {};
    }
};

// Makes the policy that the text names.
template <class policy>
status make_policy(const policy_table<policy> & table, const std::string & text, const model_shape & shape,
                   std::unique_ptr<policy> & out) {
    parsed_policy parsed;
    HYBRIMOE_TRY(parsed_policy::parse(text, parsed));
    std::vector<named_value> given;
    for (size_t i = 0; i < parsed.keys.size(); i++) {
        given.push_back({parsed.keys[i].c_str(), parsed.values[i]});
    }
    return make_policy(table, parsed.name.c_str(), shape, given.data(), static_cast<int>(given.size()), out);
}

} // namespace hybrimoe
