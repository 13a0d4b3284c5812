// What is known about this process and its instances, as one JSON object: see hybrimoe_snapshot and
// docs/observability.md.
#pragma once

#include <string>

namespace hybrimoe {

// `request` is a line of words: `instance=N` (0: all), `after=N` (events after number N), and the parts that are
// wanted: counters, state, residency, events, heat, trace. Without one: all but trace. What cannot be understood gives
// an object with `error` alone. From any thread.
std::string make_snapshot(const std::string & request);

} // namespace hybrimoe
