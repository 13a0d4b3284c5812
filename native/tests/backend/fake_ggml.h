// A ggml that says what a test wants it to say.
#pragma once

namespace fake_ggml {

struct answers {
    const char * version  = nullptr; // null: the one that the plug-in is compiled for
    bool has_cpu          = true;
    int api_version_delta = 0; // difference of the running backend API from the plug-in's
    bool other_layout     = false;
};

answers & current();

} // namespace fake_ggml
