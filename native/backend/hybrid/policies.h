// The policies that the settings name, composed to a runtime. No state; called once, at set-up.
#pragma once

#include "hybrid/common.h"
#include "hybrid/slot_counts.h"

#include "core/runtime.h"

#include <memory>

namespace hybrimoe {

struct composed {
    std::unique_ptr<runtime> made;
    bool needs_scores = false; // of the router, for every expert
    int horizon       = 0;     // layers that a prefetcher may look ahead
};

status compose(const common & shared, const cost_model & costs, const slot_table & slots, composed & out);

} // namespace hybrimoe
