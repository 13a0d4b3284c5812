// Binds the plug-in's calls of ggml to the copy of ggml that its host has loaded, whatever that library's soname is and
// whatever scope it was loaded into. The plug-in itself needs no library of ggml.
#pragma once

namespace hybrimoe {

// Looks up every function of functions.def in `library` (a handle of dlopen) and what it depends on; null: wherever the
// process has them. Until then, calling one of them ends the process. Returns null, or the name of a function that is
// missing, with nothing bound. Once bound, later calls change nothing.
const char * bind_ggml(void * library);
bool is_ggml_bound();

} // namespace hybrimoe
