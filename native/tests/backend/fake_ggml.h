// A ggml that says what a test wants it to say.
#pragma once

namespace fake_ggml {

struct answers {
    const char * missing_function = nullptr; // what binding does not find
    const char * reason           = "";      // what the probe says
};

answers & current();

} // namespace fake_ggml
