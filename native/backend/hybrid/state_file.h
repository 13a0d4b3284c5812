// Which experts were resident when a model was last used, so that its next start is warm.
#pragma once

#include "hybrid/layer_book.h"

#include <string>
#include <vector>

namespace hybrimoe {

// False with a reason when there is a file that cannot be used; a missing file is no problem.
bool read_state(const std::string & path, const layer_book & book, std::vector<std::vector<int32_t>> & experts,
                std::string & problem);
// Writes a temporary file beside it, then renames. False when that fails.
bool write_state(const std::string & path, const layer_book & book, const std::vector<std::vector<int32_t>> & experts);

} // namespace hybrimoe
