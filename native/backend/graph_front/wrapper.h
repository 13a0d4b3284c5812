// Devices that wrap the host's GPUs: llama.cpp gives them its whole graph, and they run it on the device inside. They
// exist where the setting `front` is "graph" when the library is loaded, and are used by whoever names them (-dev).
// Experts' weights are put into a host buffer type of theirs; whatever else they hand out is the inner device's.
#pragma once

#include "ggml-backend.h"
#include "ggml.h"

#include <cstddef>

namespace hybrimoe {

// After the plug-in's first device: the one whose buffer type is the experts', then a wrapper for each GPU. Empty
// where no wrapper is wanted, or none can work.
void make_wrappers(ggml_backend_reg_t registry);
size_t n_graph_devices();
ggml_backend_dev_t graph_device(size_t index);

bool is_expert_weight_of_ours(const ggml_tensor * t);
bool is_cut_product(const ggml_tensor * node);

// Of a backend instance of a wrapper; false for any other.
bool set_graph_threads(ggml_backend_t backend, int n_threads);
bool set_graph_abort_callback(ggml_backend_t backend, ggml_abort_callback callback, void * data);

} // namespace hybrimoe
