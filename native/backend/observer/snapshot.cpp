#include "observer/snapshot.h"

#include "counters.h"
#include "observer/host.h"
#include "observer/observer.h"
#include "observer/trace_feed.h"

#include "nlohmann/json.hpp"

#include <charconv>
#include <chrono>
#include <cstdio>
#include <sstream>

namespace hybrimoe {

namespace {

using json_value = nlohmann::json;

// Raised by one with every change that an older reader would misread.
constexpr int schema_version = 1;

enum part : unsigned {
    counters_part  = 1,
    state_part     = 2,
    residency_part = 4,
    events_part    = 8,
    heat_part      = 16,
    recording_part = 32
};

struct wanted {
    uint64_t instance = 0; // 0: all
    uint64_t after    = 0; // number of an event
    unsigned parts    = 0;
    std::string not_known;
    bool has(unsigned one) const { return (parts & one) != 0; }
};

bool read_number(const std::string & text, uint64_t & out) {
    const char * end   = text.data() + text.size();
    const auto decoded = std::from_chars(text.data(), end, out);
    return decoded.ec == std::errc() && decoded.ptr == end;
}

wanted parse(const std::string & request) {
    static constexpr struct {
        const char * name;
        unsigned part;
    } names[] = {{"counters", counters_part}, {"state", state_part}, {"residency", residency_part},
                 {"events", events_part},     {"heat", heat_part},   {"trace", recording_part}};
    wanted out;
    std::istringstream words(request);
    std::string word;
    while (words >> word) {
        bool is_known = false;
        for (const auto & [name, one] : names) {
            if (word == name) {
                out.parts |= one;
                is_known = true;
            }
        }
        if (word.rfind("instance=", 0) == 0) {
            is_known = read_number(word.substr(9), out.instance);
        } else if (word.rfind("after=", 0) == 0) {
            is_known = read_number(word.substr(6), out.after);
        }
        if (!is_known) {
            out.not_known = word;
        }
    }
    if (out.parts == 0) {
        out.parts = counters_part | state_part | residency_part | events_part | heat_part;
    }
    return out;
}

std::string text_of(const json_value & value) {
    return value.dump(-1, ' ', false, json_value::error_handler_t::replace);
}

// Column by column; layers that have not run are left out.
json_value counters_of(const counters & data) {
    json_value out    = json_value::object();
    const auto column = [&out](const char * name) -> json_value & {
        json_value & made = out[name];
        if (made.is_null()) {
            made = json_value::array();
        }
        return made;
    };
    for (const char * name : {"layer", "n_experts", "top_k"}) {
        column(name);
    }
#define HYBRIMOE_COUNT(name) column(#name);
#define HYBRIMOE_TIME(name) column(#name "_us");
#include "counters.def"
    for (int layer = 0; layer < data.n_layers(); layer++) {
        const layer_counts now = data.read(layer);
        if (now.n_steps == 0) {
            continue;
        }
        out["layer"].push_back(layer);
        out["n_experts"].push_back(data.at(layer).n_experts.load(std::memory_order_relaxed));
        out["top_k"].push_back(data.at(layer).top_k.load(std::memory_order_relaxed));
#define HYBRIMOE_COUNT(name) out[#name].push_back(now.name);
#define HYBRIMOE_TIME(name) out[#name "_us"].push_back(now.name##_us);
#include "counters.def"
    }
    return out;
}

json_value passes_of(const pass_counters & data) {
    const auto get = [](const std::atomic<uint64_t> & one) { return one.load(std::memory_order_relaxed); };
    return {{"n_passes", get(data.n_passes)},
            {"n_prompt_tokens", get(data.n_prompt_tokens)},
            {"n_generated_tokens", get(data.n_generated_tokens)},
            {"prompt_s", static_cast<double>(get(data.prompt_ns)) * 1e-9},
            {"generation_s", static_cast<double>(get(data.generation_ns)) * 1e-9}};
}

std::string heat_of(trace_feed & feed) {
    std::string out = "[";
    char number[16];
    for (const std::vector<double> & row : feed.heat()) {
        out += out.size() == 1 ? "[" : ",[";
        for (size_t e = 0; e < row.size(); e++) {
            std::snprintf(number, sizeof(number), e == 0 ? "%.5g" : ",%.5g", row[e]);
            out += number;
        }
        out += "]";
    }
    return out + "]";
}

std::string events_of(const instance_view & view, uint64_t after) {
    json_value out = json_value::array();
    std::string line;
    uint64_t number = 0;
    while (view.next_event(after, number, line)) {
        out.push_back({number, line});
        after = number;
    }
    return text_of(out);
}

// Empty when the instance is gone.
std::string describe(uint64_t id, const wanted & request) {
    const auto data = find_instance(id);
    if (data == nullptr) {
        return {};
    }
    std::string out = "{\"id\":" + std::to_string(id);
    if (request.has(counters_part)) {
        out += ",\"passes\":" + text_of(passes_of(data->passes)) +
               ",\"n_nodes_delegated\":" + std::to_string(data->n_nodes_delegated.load(std::memory_order_relaxed)) +
               ",\"counters\":" + text_of(counters_of(*data));
    }
    const bool is_shown = ask_instance(id, [&](const instance_view & view) {
        const unsigned parts         = (request.has(state_part) ? report_state : 0U) |
                                       (request.has(residency_part) ? report_residency : 0U) |
                                       (request.has(recording_part) ? report_trace : 0U);
        const instance_report report = parts == 0 ? instance_report() : view.report(parts);
        for (const auto & [name, text] : {std::pair<const char *, const std::string &>{"state", report.state},
                                          {"residency", report.residency},
                                          {"trace", report.trace}}) {
            if (!text.empty()) {
                out += std::string(",\"") + name + "\":" + text;
            }
        }
        if (request.has(events_part)) {
            out += ",\"events\":" + events_of(view, request.after);
        }
        if (request.has(heat_part)) {
            trace_feed * const feed = view.feed();
            out += ",\"heat\":" + (feed == nullptr ? std::string("null") : heat_of(*feed));
        }
        return true;
    });
    return is_shown || request.has(counters_part) ? out + "}" : std::string();
}

} // namespace

std::string make_snapshot(const std::string & request) {
    const wanted parsed = parse(request);
    if (!parsed.not_known.empty()) {
        return text_of({{"schema", schema_version}, {"error", "'" + parsed.not_known + "' is not known"}});
    }
    const double now_s = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
    json_value head    = describe_process();
    head["schema"]     = schema_version;
    head["at_s"]       = now_s;
    head["socket"]     = observer_path().empty() ? json_value(nullptr) : json_value(observer_path());
    std::string out    = text_of(head);
    out.pop_back(); // the closing brace
    out += ",\"host\":" + host_facts() + ",\"instances\":[";
    bool is_first = true;
    for (const uint64_t id : parsed.instance == 0 ? all_instances() : std::vector<uint64_t>{parsed.instance}) {
        const std::string one = describe(id, parsed);
        if (!one.empty()) {
            out += (is_first ? "" : ",") + one;
            is_first = false;
        }
    }
    return out + "]}";
}

} // namespace hybrimoe
