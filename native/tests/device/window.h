// The test device's counts since their last reset, for native tests.
#pragma once

#include "test_device.h"

#include "nlohmann/json.hpp"

#include <vector>

namespace test_device {

inline nlohmann::json window() {
    std::vector<char> text(static_cast<size_t>(test_device_counts(nullptr, 0)) + 1);
    test_device_counts(text.data(), text.size());
    return nlohmann::json::parse(text.data())["window"];
}

} // namespace test_device
