#include "running_ggml/loaded_library.h"

#include <dlfcn.h>

namespace hybrimoe {

void * library_of(const void * address) {
    Dl_info where{};
    if (dladdr(address, &where) == 0 || where.dli_fname == nullptr) {
        return nullptr;
    }
    void * found = dlopen(where.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    return found == nullptr ? dlopen(nullptr, RTLD_LAZY) : found; // the program itself has no name that dlopen takes
}

} // namespace hybrimoe
