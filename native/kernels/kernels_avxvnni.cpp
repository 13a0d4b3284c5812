#include "kernels_256.h"

namespace hybrimoe::kernels {

const kernel_set kernels_avxvnni = {
    "avxvnni", 2, 3, false, quantize_32, quantize_256, panel_32, panel_256, panel_f32, glu, add_scaled, types,
};

} // namespace hybrimoe::kernels
