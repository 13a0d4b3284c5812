// JSON from files and hosts: whatever it says, reading it ends in a value or an exception of std.
#pragma once

#include "nlohmann/json.hpp"

#include <cmath>
#include <stdexcept>
#include <string>

namespace hybrimoe {

// The parser stands any depth; copying, comparing and writing what it made recurse. Ours nest five deep.
constexpr int max_json_depth = 64;

// Input: text or a stream. Throws nlohmann::json::exception, std::invalid_argument for what nests too deeply.
template <class input> nlohmann::json parse_json(input && from) {
    return nlohmann::json::parse(from, [](int depth, nlohmann::json::parse_event_t, nlohmann::json &) {
        if (depth > max_json_depth) {
            throw std::invalid_argument("it nests too deeply");
        }
        return true;
    });
}

// The value as an integer from 0 to `most`. Throws std::invalid_argument for all else: the library's own conversion of
// a fraction or of 1e300 is undefined.
inline int64_t read_index(const nlohmann::json & value, int64_t most) {
    if (!value.is_number_integer() || value.get<double>() < 0.0 || value.get<double>() > static_cast<double>(most)) {
        throw std::invalid_argument("it holds a number that is no index");
    }
    return value.get<int64_t>();
}

} // namespace hybrimoe
