#include "settings.h"

#include "kernels/moe_kernels.h"

#include "nlohmann/json.hpp"

#include <cstdlib>
#include <mutex>
#include <stdexcept>

namespace hybrimoe {

namespace {

void parse_kernels(const std::string & name, settings & out) {
    if (name == "auto" || name == "ggml") {
        out.kernels = name == "ggml" ? cpu_kernels::ggml : cpu_kernels::best;
        out.kernel_set.clear();
        return;
    }
    if (kernels::find_kernel_set(name.c_str()) == nullptr) {
        std::string known = "\"auto\", \"ggml\"";
        for (const char * const * one = kernels::available_kernel_sets(); *one != nullptr; one++) {
            known += std::string(", \"") + *one + "\"";
        }
        throw std::invalid_argument("cpu_kernels is \"" + name + "\", this CPU has: " + known);
    }
    out.kernels    = cpu_kernels::named;
    out.kernel_set = name;
}

std::mutex & guard() {
    static std::mutex mutex;
    return mutex;
}

settings & stored() {
    static settings value = [] {
        settings initial;
        const char * given = std::getenv("HYBRIMOE_CPU");
        if (given != nullptr && *given != '\0') {
            parse_kernels(given, initial);
        }
        return initial;
    }();
    return value;
}

} // namespace

settings parse_settings(const std::string & json, settings base) {
    nlohmann::json object;
    try {
        object = nlohmann::json::parse(json);
    } catch (const nlohmann::json::exception & error) {
        throw std::invalid_argument(std::string("not JSON: ") + error.what());
    }
    if (!object.is_object()) {
        throw std::invalid_argument("the settings must be one JSON object");
    }
    for (const auto & [key, value] : object.items()) {
        if (key != "cpu_kernels") {
            throw std::invalid_argument("unknown key \"" + key + "\", known: \"cpu_kernels\"");
        }
        if (!value.is_string()) {
            throw std::invalid_argument("cpu_kernels must be a string");
        }
        parse_kernels(value.get<std::string>(), base);
    }
    return base;
}

settings current_settings() {
    std::lock_guard<std::mutex> lock(guard());
    return stored();
}

void set_current_settings(const settings & value) {
    std::lock_guard<std::mutex> lock(guard());
    stored() = value;
}

} // namespace hybrimoe
