// Whether the running ggml is what the plug-in takes for granted. What decides is the interface, never a version: any
// release fits whose operations, types, structures and tables are those that the plug-in was compiled with.
#pragma once

#include "running_ggml/facts.h"

#include <string>

namespace hybrimoe {

// The backend API that the running ggml speaks, as its CPU backend says; 0: it has no CPU backend (yet).
int running_api_version();

// Compares the running ggml with `facts` and with the tables of tables.h. Reads nothing that a wrong answer could make
// it read outside of ggml's own memory: numbers and sizes first, tables last. Returns why it does not fit, in a few
// words, or an empty text.
std::string why_ggml_does_not_fit(const ggml_facts & facts);

} // namespace hybrimoe
