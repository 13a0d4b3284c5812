#include "prefetcher.h"

namespace hybrimoe {
namespace {

class none final : public prefetcher {
public:
    none() : prefetcher(0, false) {}
    void propose(const prefetch_view &, proposal_list &) const override {}
};

} // namespace

extern const policy_entry<prefetcher> none_prefetch;
const policy_entry<prefetcher> none_prefetch = {
    "none",
    "No prefetch.",
    "",
    {},
    nullptr,
    0,
    [](const model_shape &, const param_values &) -> std::unique_ptr<prefetcher> { return std::make_unique<none>(); },
};

} // namespace hybrimoe
