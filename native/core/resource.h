// What can compute or move an expert, and so has costs that are followed and tried.
#pragma once

#include "types.h"

namespace hybrimoe {

enum class resource_kind : uint8_t { cpu, gpu, link };

struct resource {
    resource_kind kind = resource_kind::cpu;
    int device         = cpu_device; // of gpu and link
};

inline const char * resource_name(resource_kind kind) {
    return kind == resource_kind::cpu ? "cpu" : kind == resource_kind::gpu ? "gpu" : "link";
}

} // namespace hybrimoe
