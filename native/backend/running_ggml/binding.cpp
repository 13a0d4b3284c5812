#include "running_ggml/binding.h"

#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>

// One variable for each function holds where it is, and a hidden symbol of the function's own name jumps there. Of
// ggml's names none is left undefined or exported, so the dynamic linker has nothing to bind.
namespace {

[[noreturn]] void not_bound() {
    std::fprintf(stderr, "HybriMoE: a function of ggml was called before the plug-in was bound to one\n");
    std::abort();
}

} // namespace

#if defined(__x86_64__)
#define HM_JUMP(name) "\tendbr64\n\tjmp *hybrimoe_to_" #name "(%rip)\n"
#elif defined(__aarch64__)
#define HM_JUMP(name) "\tadrp x16, hybrimoe_to_" #name "\n\tldr x16, [x16, #:lo12:hybrimoe_to_" #name "]\n\tbr x16\n"
#else
#error "binding to ggml is written for x86-64 and AArch64"
#endif

#define HM_GGML_FUNCTION(name)                                                                                         \
    extern "C" __attribute__((visibility("hidden"), used)) void * hybrimoe_to_##name =                                 \
        reinterpret_cast<void *>(not_bound);                                                                           \
    __asm__(".text\n\t.p2align 4\n\t.globl " #name "\n\t.hidden " #name "\n\t.type " #name ", %function\n" #name       \
            ":\n" HM_JUMP(name) "\t.size " #name ", .-" #name "\n");
#include "functions.def"
#undef HM_GGML_FUNCTION

namespace hybrimoe {

namespace {

struct function {
    const char * name;
    void ** where;
};

const function functions[] = {
#define HM_GGML_FUNCTION(name) {#name, &hybrimoe_to_##name},
#include "functions.def"
#undef HM_GGML_FUNCTION
};

bool is_bound = false; // written once, before any thread of ours

} // namespace

const char * bind_ggml(void * library) {
    if (is_bound) {
        return nullptr;
    }
    void * const scope = library == nullptr ? RTLD_DEFAULT : library;
    for (const function & one : functions) {
        if (dlsym(scope, one.name) == nullptr) {
            return one.name;
        }
    }
    for (const function & one : functions) {
        *one.where = dlsym(scope, one.name);
    }
    is_bound = true;
    return nullptr;
}

bool is_ggml_bound() {
    return is_bound;
}

} // namespace hybrimoe
