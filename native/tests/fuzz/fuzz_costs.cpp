// The cost section of a calibration.
#include "hybrid/cost_source.h"
#include "toy_book.h"

#include <cmath>

std::vector<std::string> fuzz_seeds() {
    return {
        R"({"layer_class":[0,1],"classes":[{"expert_bytes":16384,"cpu":{"points":[[1,10],[8,40]]},"cpu_first_us":3,)"
        R"("gpu":[{"fixed_us":2,"per_token_us":0.5}]},{"expert_bytes":32768,"cpu":{"fixed_us":5,"per_token_us":5},)"
        R"("cpu_first_us":3,"gpu":[{"points":[[1,2],[64,40]]}]}],"cpu_step_us":4,"dram_bytes_per_us":20000,)"
        R"("devices":[{"latency_us":9,"bytes_per_us":24000,"step_us":30}]})",
        R"({"layer_class":[0,0],"classes":[{"expert_bytes":16384,"cpu":{"points":[[1,10]]},"cpu_first_us":0,)"
        R"("gpu":[{"points":[[1,1]]}]}],"cpu_step_us":0,"dram_bytes_per_us":null,)"
        R"("devices":[{"latency_us":0,"bytes_per_us":1,"step_us":0}]})",
    };
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static const toy_book book;
    const std::string text(reinterpret_cast<const char *>(data), size);
    hybrimoe::cost_model costs;
    if (!hybrimoe::calibrated_cost_model(text, book.get(), 1, costs).ok()) {
        return 0;
    }
    for (int layer = 0; layer < costs.n_layers(); layer++) {
        for (const int n_tokens : {1, 7, 4096}) {
            const hybrimoe::layer_class & one = costs.of_class(costs.class_of(layer));
            REQUIRE(one.cpu.at(n_tokens) >= 0.0 && one.gpu[0].at(n_tokens) >= 0.0);
        }
    }
    // What is recorded gives the same model again.
    const std::string described = hybrimoe::describe_costs(costs);
    hybrimoe::cost_model again;
    REQUIRE(hybrimoe::calibrated_cost_model(described, book.get(), 1, again).ok());
    REQUIRE(hybrimoe::describe_costs(again) == described);
    return 0;
}
