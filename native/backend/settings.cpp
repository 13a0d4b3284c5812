#include "settings.h"

#include "json_text.h"
#include "kernels/moe_kernels.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <stdexcept>

namespace hybrimoe {

namespace {

using json_value = nlohmann::json;

[[noreturn]] void refuse(const std::string & key, const char * what) {
    throw std::invalid_argument(key + " must be " + what);
}

std::string read_text(const std::string & key, const json_value & value) {
    if (!value.is_string()) {
        refuse(key, "a string");
    }
    return value.get<std::string>();
}

bool read_bool(const std::string & key, const json_value & value) {
    if (!value.is_boolean()) {
        refuse(key, "true or false");
    }
    return value.get<bool>();
}

int64_t read_count(const std::string & key, const json_value & value, int64_t least = 0) {
    if (!value.is_number_integer() || value.get<double>() > 9e15 || value.get<int64_t>() < least) {
        throw std::invalid_argument(key + " must be an integer of at least " + std::to_string(least));
    }
    return value.get<int64_t>();
}

double read_number(const std::string & key, const json_value & value) {
    if (!value.is_number() || !std::isfinite(value.get<double>()) || value.get<double>() < 0.0) {
        refuse(key, "a number of at least 0");
    }
    return value.get<double>();
}

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

void parse_front(const std::string & key, const json_value & value, settings & out) {
    const std::string name = read_text(key, value);
    if (name != "block" && name != "graph") {
        throw std::invalid_argument(key + " must be \"block\" or \"graph\", not \"" + name + "\"");
    }
    out.front = name == "graph" ? front_end::graph : front_end::block;
}

void parse_devices(const std::string & key, const json_value & value, settings & out) {
    out.all_devices = value.is_string() && value.get<std::string>() == "auto";
    out.devices.clear();
    if (out.all_devices) {
        return;
    }
    if (!value.is_array()) {
        refuse(key, "\"auto\" or a list of device names");
    }
    for (const json_value & name : value) {
        out.devices.push_back(read_text(key + "[]", name));
    }
}

void parse_pins(const std::string & key, const json_value & value, settings & out) {
    if (!value.is_array()) {
        refuse(key, "a list of processors");
    }
    out.pin_threads.clear();
    for (const json_value & cpu : value) {
        const int64_t number = read_count(key + "[]", cpu);
        if (number > std::numeric_limits<int>::max()) {
            refuse(key + "[]", "a processor's number");
        }
        out.pin_threads.push_back(static_cast<int>(number));
    }
}

void parse_cache_size(const std::string & key, const json_value & value, settings & out) {
    expert_cache_size size;
    if (value.is_string() && value.get<std::string>() == "auto") {
        size.is = expert_cache_size::kind::automatic;
    } else if (value.is_number_integer()) {
        size.is      = expert_cache_size::kind::slots;
        size.n_slots = read_count(key, value);
    } else if (value.is_object() && value.size() == 1 && value.contains("bytes")) {
        size.is      = expert_cache_size::kind::bytes;
        size.n_bytes = read_number(key + ".bytes", value["bytes"]);
    } else if (value.is_object() && value.size() == 1 && value.contains("fraction")) {
        size.is       = expert_cache_size::kind::fraction;
        size.fraction = read_number(key + ".fraction", value["fraction"]);
        if (size.fraction > 1.0) {
            refuse(key + ".fraction", "at most 1");
        }
    } else {
        refuse(key, "\"auto\", slots per layer, {\"bytes\": n} or {\"fraction\": f}");
    }
    out.expert_cache = size;
}

void parse_costs(const std::string & key, const json_value & value, settings & out) {
    out.simple.reset();
    out.costs_json.clear();
    if (value.is_null()) {
        return;
    }
    if (!value.is_object()) {
        refuse(key, "an object or null");
    }
    if (!value.contains("cpu_us")) {
        out.costs_json = value.dump();
        return;
    }
    simple_costs costs;
    for (const auto & [name, number] : value.items()) {
        double * const target = name == "cpu_us"         ? &costs.cpu_us
                                : name == "cpu_first_us" ? &costs.cpu_first_us
                                : name == "gpu_us"       ? &costs.gpu_us
                                : name == "copy_us"      ? &costs.copy_us
                                                         : nullptr;
        if (target == nullptr) {
            throw std::invalid_argument("unknown key \"" + key + "." + name +
                                        "\", known: \"cpu_us\", \"cpu_first_us\", \"gpu_us\", \"copy_us\"");
        }
        *target = read_number(key + "." + name, number);
    }
    if (costs.copy_us <= 0.0) {
        refuse(key + ".copy_us", "above 0");
    }
    out.simple = costs;
}

void parse_faults(const std::string & key, const json_value & value, settings & out) {
    if (!value.is_object()) {
        refuse(key, "an object");
    }
    fault_plan faults;
    for (const auto & [name, number] : value.items()) {
        int64_t * const target = name == "fail_copy_every"    ? &faults.fail_copy_every
                                 : name == "stick_copy"       ? &faults.stick_copy
                                 : name == "stick_us"         ? &faults.stick_us
                                 : name == "delay_copy_us"    ? &faults.delay_copy_us
                                 : name == "fail_alloc_from"  ? &faults.fail_alloc_from
                                 : name == "fail_alloc_until" ? &faults.fail_alloc_until
                                 : name == "free_bytes"       ? &faults.free_bytes
                                 : name == "scarce_from"      ? &faults.scarce_from
                                 : name == "scarce_until"     ? &faults.scarce_until
                                 : name == "scarce_bytes"     ? &faults.scarce_bytes
                                 : name == "fail_step"        ? &faults.fail_step
                                 : name == "fail_finish"      ? &faults.fail_finish
                                 : name == "fail_pass_end"    ? &faults.fail_pass_end
                                 : name == "fail_set_up"      ? &faults.fail_set_up
                                 : name == "fail_worker"      ? &faults.fail_worker
                                 : name == "pause_us"         ? &faults.pause_us
                                 : name == "copy_patience_us" ? &faults.copy_patience_us
                                                              : nullptr;
        if (target == nullptr) {
            throw std::invalid_argument("unknown key \"" + key + "." + name + "\"");
        }
        *target = read_count(key + "." + name, number);
    }
    out.faults = faults;
}

struct key_reader {
    const char * key;
    void (*read)(const std::string & key, const json_value & value, settings & out);
};

const key_reader readers[] = {
    {"cpu_kernels", [](const std::string & key, const json_value & value,
                       settings & out) { parse_kernels(read_text(key, value), out); }},
    {"devices", parse_devices},
    {"pin_threads", parse_pins},
    {"expert_cache", parse_cache_size},
    {"fit_margin_bytes", [](const std::string & key, const json_value & value,
                            settings & out) { out.fit_margin_bytes = read_count(key, value); }},
    {"cache_policy", [](const std::string & key, const json_value & value,
                        settings & out) { out.cache_policy = read_text(key, value); }},
    {"schedule",
     [](const std::string & key, const json_value & value, settings & out) { out.schedule = read_text(key, value); }},
    {"prefetch",
     [](const std::string & key, const json_value & value, settings & out) { out.prefetch = read_text(key, value); }},
    {"admission",
     [](const std::string & key, const json_value & value, settings & out) { out.admission = read_text(key, value); }},
    {"guard",
     [](const std::string & key, const json_value & value, settings & out) { out.guard = read_bool(key, value); }},
    {"live_costs",
     [](const std::string & key, const json_value & value, settings & out) { out.live_costs = read_bool(key, value); }},
    {"reproducible", [](const std::string & key, const json_value & value,
                        settings & out) { out.reproducible = read_bool(key, value); }},
    {"costs", parse_costs},
    {"max_batch_tokens", [](const std::string & key, const json_value & value,
                            settings & out) { out.max_batch_tokens = read_count(key, value, 1); }},
    {"n_cpu_layers", [](const std::string & key, const json_value & value,
                        settings & out) { out.n_cpu_layers = read_count(key, value); }},
    {"trace", [](const std::string & key, const json_value & value,
                 settings & out) { out.trace_bytes = read_count(key, value); }},
    {"trace_scores", [](const std::string & key, const json_value & value,
                        settings & out) { out.trace_scores = read_bool(key, value); }},
    {"trace_spans", [](const std::string & key, const json_value & value,
                       settings & out) { out.trace_spans = read_bool(key, value); }},
    {"route_trace", [](const std::string & key, const json_value & value,
                       settings & out) { out.route_trace = read_text(key, value); }},
    {"throttle_link_bytes_per_s", [](const std::string & key, const json_value & value,
                                     settings & out) { out.throttle_bytes_per_s = read_number(key, value); }},
    {"state_path",
     [](const std::string & key, const json_value & value, settings & out) { out.state_path = read_text(key, value); }},
    {"observe",
     [](const std::string & key, const json_value & value, settings & out) { out.observe = read_bool(key, value); }},
    {"log_to_stderr", [](const std::string & key, const json_value & value,
                         settings & out) { out.log_to_stderr = read_bool(key, value); }},
    {"pin_experts", [](const std::string & key, const json_value & value,
                       settings & out) { out.pin_experts = read_bool(key, value); }},
    {"front", parse_front},
    {"faults", parse_faults},
};

const key_reader * find_reader(const std::string & key) {
    for (const key_reader & one : readers) {
        if (key == one.key) {
            return &one;
        }
    }
    return nullptr;
}

std::string known_keys() {
    std::string list;
    for (const key_reader & one : readers) {
        list += (list.empty() ? "\"" : ", \"") + std::string(one.key) + "\"";
    }
    return list;
}

std::mutex & guard() {
    static std::mutex mutex;
    return mutex;
}

const char * environment(const char * name) {
    const char * value = std::getenv(name);
    return value == nullptr || *value == '\0' ? nullptr : value;
}

// What is wrong with the environment is said once. A program that the user started for something else goes on without
// those settings.
settings of_environment() {
    settings initial;
    const auto take = [&](const char * name, const char * what_holds, auto read) {
        const char * value = environment(name);
        if (value == nullptr) {
            return;
        }
        try {
            initial = read(std::string(value), initial);
        } catch (const std::exception & error) {
            std::fprintf(stderr, "error: HybriMoE: %s: %s\nhint: correct or unset %s; until then %s\n", name,
                         error.what(), name, what_holds);
        }
    };
    take("HYBRIMOE_CONFIG", "none of it is used, the defaults hold",
         [](const std::string & text, const settings & base) { return parse_settings(text, base); });
    take("HYBRIMOE_CPU", "the kernels are chosen automatically", [](const std::string & text, settings base) {
        parse_kernels(text, base);
        return base;
    });
    return initial;
}

settings & stored() {
    static settings value = of_environment();
    return value;
}

} // namespace

settings parse_settings(const std::string & json, settings base) {
    json_value object;
    try {
        object = parse_json(json);
    } catch (const std::exception & error) {
        throw std::invalid_argument(std::string("not JSON: ") + error.what());
    }
    if (!object.is_object()) {
        throw std::invalid_argument("the settings must be one JSON object");
    }
    for (const auto & [key, value] : object.items()) {
        const key_reader * reader = find_reader(key);
        if (reader == nullptr) {
            throw std::invalid_argument("unknown key \"" + key + "\", known: " + known_keys());
        }
        reader->read(key, value, base);
    }
    return base;
}

settings in_force(settings given) {
    if (!given.reproducible) {
        return given;
    }
    given.cache_policy = "static";
    given.schedule     = "cpu-only"; // reads no costs: who holds an expert computes it
    given.prefetch     = "none";
    given.admission    = "always"; // never asked: the set-up forbids admissions, and this one keeps no books
    given.guard        = false;
    given.live_costs   = false;
    given.state_path.clear();
    given.costs_json.clear();
    given.simple          = simple_costs();
    given.simple->copy_us = 1.0; // a link must have a rate
    return given;
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
