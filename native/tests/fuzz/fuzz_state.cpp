// The file that keeps which experts were resident.
#include "hybrid/state_file.h"
#include "memory_file.h"
#include "toy_book.h"

std::vector<std::string> fuzz_seeds() {
    return {
        R"({"version":1,"layers":[[8,16384],[16,32768]],"resident":[[0,3,7],[15,1]]})",
        R"({"version":1,"layers":[[8,16384],[16,32768]],"resident":[[],[]]})",
        R"({"version":2,"layers":[[8,16384],[16,32768]],"resident":[[8],[1,1]]})",
    };
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static const toy_book book;
    const memory_file file(data, size);
    std::vector<std::vector<int32_t>> experts;
    std::string problem;
    if (!hybrimoe::read_state(file.path(), book.get(), experts, problem)) {
        REQUIRE(!problem.empty() && experts.empty());
        return 0;
    }
    REQUIRE(experts.size() == 2);
    for (size_t layer = 0; layer < experts.size(); layer++) {
        for (const int32_t e : experts[layer]) {
            REQUIRE(e >= 0 && e < book.get().layer(static_cast<int>(layer)).layout.n_expert);
        }
    }
    return 0;
}
