#include "prefetcher.h"

namespace hybrimoe {
namespace {

class next_layer final : public prefetcher {
public:
    using prefetcher::prefetcher;
};

const param_info params[] = {
    {"horizon", 1, 1, max_lookahead, true, "layers ahead"},
    {"adaptive", 0, 0, 1, true, "1: the horizon adapts to stalls and over-fetch (ExpertFlow)"},
};

} // namespace

extern const policy_entry<prefetcher> next_layer_prefetch;
const policy_entry<prefetcher> next_layer_prefetch = {
    "next-layer",
    "The top-k of the look-ahead gate, best score first.",
    "HOBBIT, AdapMoE; HybriMoE's released code",
    {true, false, true},
    params,
    2,
    [](const model_shape &, const param_values & p) -> std::unique_ptr<prefetcher> {
        return std::make_unique<next_layer>(p.get_int("horizon"), p.get("adaptive") != 0.0);
    },
};

} // namespace hybrimoe
