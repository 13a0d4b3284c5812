#include "observer/routing_heat.h"

#include "trace_recorder.h"

#include <algorithm>
#include <cmath>

namespace hybrimoe {

namespace {

constexpr int32_t most_layers = 512, most_experts = 1 << 16; // beyond: a damaged pass
constexpr double most_weight = 1e100;

} // namespace

void routing_heat::add(const hybrimoe_trace_pass & pass) {
    const auto * events = reinterpret_cast<const hybrimoe_trace_event *>(&pass + 1);
    const auto * ids    = reinterpret_cast<const int32_t *>(events + pass.n_events);
    int32_t n_tokens    = 0;
    for (int64_t i = 0; i < pass.n_events; i++) {
        const hybrimoe_trace_event & e = events[i];
        const bool is_routing =
            e.type == static_cast<int32_t>(trace_kind::layer) || e.type == static_cast<int32_t>(trace_kind::routed);
        if (!is_routing || e.layer < 0 || e.layer >= most_layers || e.offset < 0) {
            continue;
        }
        const auto layer = static_cast<size_t>(e.layer);
        counts_.resize(std::max(counts_.size(), layer + 1));
        std::vector<double> & counts = counts_[layer];
        const int64_t end            = std::min(pass.n_ids, e.offset + int64_t{e.n_rows} * e.a);
        for (int64_t at = e.offset; at < end; at++) {
            const int32_t expert = ids[at];
            if (expert < 0 || expert >= most_experts) {
                continue;
            }
            counts.resize(std::max(counts.size(), static_cast<size_t>(expert) + 1));
            counts[static_cast<size_t>(expert)] += weight_;
        }
        n_tokens = std::max(n_tokens, e.n_rows);
    }
    weight_ *= std::exp2(n_tokens / half_life_tokens);
    if (weight_ > most_weight) {
        for (std::vector<double> & counts : counts_) {
            for (double & one : counts) {
                one /= weight_;
            }
        }
        weight_ = 1.0;
    }
}

std::vector<std::vector<double>> routing_heat::shares() const {
    size_t n_experts = 0;
    for (const std::vector<double> & counts : counts_) {
        n_experts = std::max(n_experts, counts.size());
    }
    std::vector<std::vector<double>> out = counts_;
    for (std::vector<double> & row : out) {
        row.resize(n_experts, 0.0);
        double sum = 0.0;
        for (const double one : row) {
            sum += one;
        }
        for (double & one : row) {
            one = sum > 0.0 ? one / sum : 0.0;
        }
    }
    return out;
}

} // namespace hybrimoe
