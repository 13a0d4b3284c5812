#include "settings.h"

#include "nlohmann/json.hpp"

#include <cstdlib>
#include <mutex>
#include <stdexcept>

namespace hybrimoe {

namespace {

cpu_kernels parse_kernels(const std::string & name) {
    if (name == "ggml") {
        return cpu_kernels::ggml;
    }
    throw std::invalid_argument("cpu_kernels is \"" + name + "\", known: \"ggml\"");
}

std::mutex & guard() {
    static std::mutex mutex;
    return mutex;
}

settings & stored() {
    static settings value = [] {
        settings     initial;
        const char * kernels = std::getenv("HYBRIMOE_CPU");
        if (kernels != nullptr && *kernels != '\0') {
            initial.kernels = parse_kernels(kernels);
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
        base.kernels = parse_kernels(value.get<std::string>());
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
