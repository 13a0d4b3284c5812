// Which kernel set runs: by CPUID, or by name.
#include <cstring>

#ifdef HYBRIMOE_KERNELS_X86
#include <cpuid.h>
#endif

#include "kernel_set.h"

namespace hybrimoe::kernels {

namespace {

#ifdef HYBRIMOE_KERNELS_X86

// __builtin_cpu_supports also asks XGETBV whether the operating system saves the wider registers.
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

// Leaf 7, sub-leaf 1, EAX bit 4: not every compiler has a name for it in __builtin_cpu_supports.
bool has_avxvnni() {
    unsigned a = 0;
    unsigned b = 0;
    unsigned c = 0;
    unsigned d = 0;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

#endif

struct candidate {
    const kernel_set * set;
    bool (*supported)();
};

constexpr candidate candidates[] = {
#ifdef HYBRIMOE_KERNELS_X86
    {&kernels_avx512, has_avx512},
    {&kernels_avxvnni, has_avxvnni},
    {&kernels_avx2, has_avx2},
#endif
    {&kernels_scalar, [] { return true; }},
};

} // namespace

int default_streams() {
#ifdef HYBRIMOE_KERNELS_X86
    return __builtin_cpu_is("intel") ? 4 : 1;
#else
    return 1;
#endif
}

const kernel_set * best_kernel_set() {
    for (const candidate & c : candidates) {
        if (c.supported()) {
            return c.set;
        }
    }
    return &kernels_scalar;
}

const kernel_set * find_kernel_set(const char * name) {
    for (const candidate & c : candidates) {
        if (strcmp(c.set->name, name) == 0) {
            return c.supported() ? c.set : nullptr;
        }
    }
    return nullptr;
}

const char * kernel_set_name(const kernel_set * ks) {
    return ks->name;
}

const char * const * available_kernel_sets() {
    struct name_list {
        const char * names[sizeof(candidates) / sizeof(candidates[0]) + 1] = {};
        name_list() {
            size_t n = 0;
            for (const candidate & c : candidates) {
                if (c.supported()) {
                    names[n++] = c.set->name;
                }
            }
        }
    };
    static const name_list list;
    return list.names;
}

const type_kernels * find_kernels(const kernel_set * ks, int32_t type) {
    for (const type_kernels * t = ks->types; t->type >= 0; ++t) {
        if (t->type == type) {
            return t;
        }
    }
    return nullptr;
}

} // namespace hybrimoe::kernels
