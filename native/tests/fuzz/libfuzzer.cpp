// With HYBRIMOE_FUZZ_SEEDS a fuzzer first writes its seeds into that folder, which is then its corpus.
#include "fuzz.h"

#include <fstream>

extern "C" int LLVMFuzzerInitialize(int *, char ***);

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    if (const char * const folder = std::getenv("HYBRIMOE_FUZZ_SEEDS")) {
        int number = 0;
        for (const std::string & seed : fuzz_seeds()) {
            std::ofstream(folder + ("/seed-" + std::to_string(number++)), std::ios::binary) << seed;
        }
    }
    return 0;
}
