// Looks at the accelerators' free memory between passes and asks the fleet for smaller or larger caches: before the
// driver runs out, and back when there is room. Owns nothing but how often it has looked. Called by the computing
// thread.
#pragma once

#include "hybrid/fleet.h"

namespace hybrimoe {

class memory_watch {
public:
    memory_watch(const common & shared, fleet & devices) : shared_(shared), devices_(devices) {}

    // `is_static`: whole layers stand on the accelerators (guard); they are not touched.
    void look(bool is_static);

private:
    void judge(int device, double free);

    const common & shared_;
    fleet & devices_;
    int64_t n_looks_ = 0;
};

} // namespace hybrimoe
