// Plug-ins that were compiled for other releases of ggml on this machine (`hybrimoe plugin build`).
#pragma once

#include "ggml-backend.h"

#include <string>
#include <vector>

namespace hybrimoe {

// Where they are: HYBRIMOE_PLUGINS, or hybrimoe/plugins in the user's data folder ($XDG_DATA_HOME or ~/.local/share).
// Empty: nowhere.
std::string other_builds_folder();

// The libraries in the folders of `folder`, the one built last first. What another user could have put there is left
// out.
std::vector<std::string> builds_in(const std::string & folder);

struct other_build {
    std::string path;                       // empty: none fits
    ggml_backend_reg_t (*init)() = nullptr; // its ggml_backend_init()
};

// The first one, of this version of HybriMoE, that fits the ggml in the library `ggml`. It stays loaded.
other_build find_build_that_fits(void * ggml);

} // namespace hybrimoe
