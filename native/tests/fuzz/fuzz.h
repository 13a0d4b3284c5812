// What a fuzz target gives: one function that reads bytes as the plug-in would, and sound inputs to begin with.
// libFuzzer drives it where clang is there (HYBRIMOE_FUZZ); standalone.cpp, seeded, everywhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size);

std::vector<std::string> fuzz_seeds();

// Not assert(): it must hold in every build.
#define REQUIRE(condition)                                                                                             \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            std::fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition);                        \
            std::abort();                                                                                              \
        }                                                                                                              \
    } while (false)
