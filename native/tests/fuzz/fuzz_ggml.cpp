// What the toy layers need of ggml: they are float32.
#include "ggml.h"

#include <cstddef>

extern "C" size_t ggml_row_size(ggml_type, int64_t n) {
    return static_cast<size_t>(n) * sizeof(float);
}
