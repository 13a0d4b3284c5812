// Whether the setting "reproducible" has held so far. Any part may break it, on the computing thread; under the
// instance's mutex where another thread reads it.
#pragma once

#include "hybrid/common.h"

namespace hybrimoe {

class fleet;

class reproducibility {
public:
    explicit reproducibility(const common & shared) : shared_(shared) {}

    // Said once; the state keeps it.
    void broken(const char * why);
    bool holds() const { return shared_.config.reproducible && holds_; }

    // After the caches are filled: whole layers must be there.
    void check(const fleet & devices);
    void announce(const fleet & devices) const;

private:
    const common & shared_;
    bool holds_ = true;
};

} // namespace hybrimoe
