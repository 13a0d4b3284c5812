// Blocks of a graph that a device computes: what is decided, and what the CPU computes of them.
#include "dispatch.h"

#include "accelerator/expert_layout.h"

#include <algorithm>
#include <chrono>

namespace hybrimoe {

namespace {

uint64_t now_ns() {
    const auto past = std::chrono::steady_clock::now().time_since_epoch();
    return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(past).count());
}

size_t n_pairs_of(const remote_block & one) {
    return static_cast<size_t>(one.block->n_tokens() * one.block->top_k());
}

// The layout of a layer whose last product's bias is somebody else's to add.
expert_layout without_down_bias(const expert_layout & layout) {
    expert_layout out = layout;
    out.parts.erase(std::remove_if(out.parts.begin(), out.parts.end(),
                                   [](const expert_part & part) { return part.role == part_role::down_bias; }),
                    out.parts.end());
    return out;
}

} // namespace

dispatcher::remote_shares dispatcher::begin_remote(const remote_block & one, bool may_share_graph) {
    begin_block(*one.block);
    is_finished_ = false;
    remote_shares shares;
    is_shared_ = hybrid_.prepare(*one.block, *one.described, kernels_ == nullptr, may_share_graph);
    if (!is_shared_) {
        return shares;
    }
    hybrid_.set_input(one.x, one.x_token_bytes, false, one.there);
    shares.cpu = hybrid_.route(one.ids, one.weights, one.scores);
    hybrid_.mark_router_end();
    if (hybrid_.slots_in_graph() != nullptr) {
        shares.cpu        = hybrid_.settle_in_graph();
        shares.slots      = hybrid_.slots_in_graph(); // none, when no copy came
        shares.is_watched = hybrid_.is_watched();
    }
    return shares;
}

// The CPU's pairs [top_k, n_tokens] (null: all of them) through our kernels or ggml's.
ggml_status dispatcher::compute_pairs(const remote_block & one, const uint8_t * cpu, bool with_down_bias, float * y,
                                      bool accumulate) {
    const described_block & described = *one.described;
    const auto top_k                  = static_cast<int32_t>(one.block->top_k());
    const int64_t n_embd              = described.layer.n_embd;
    if (kernels_ != nullptr) {
        kernels::moe_layer layer = described.layer;
        if (!with_down_bias) {
            layer.down.bias = nullptr;
        }
        kernels::moe_batch batch;
        batch.n_tokens        = one.block->n_tokens();
        batch.top_k           = top_k;
        batch.x               = one.x;
        batch.x_token_bytes   = one.x_token_bytes;
        batch.x_is_weighted   = layer.weights_on_input;
        batch.ids             = one.ids;
        batch.weights         = one.weights;
        batch.ids_token_bytes = batch.weights_token_bytes = static_cast<size_t>(top_k) * sizeof(float);
        batch.take                                        = cpu;
        batch.y                                           = y;
        batch.y_token_bytes                               = static_cast<size_t>(n_embd) * sizeof(float);
        batch.accumulate                                  = accumulate;
        return kernels_->run_experts(cpu_, layer, batch, n_threads_);
    }
    const known_layer * known = hybrid_.find_layer(described);
    std::optional<expert_layout> layout;
    if (known != nullptr) {
        layout = known->layout;
    } else {
        layout = make_layout(described.layer);
    }
    if (!layout) {
        return GGML_STATUS_FAILED;
    }
    routed_pairs pairs;
    pairs.n_tokens      = one.block->n_tokens();
    pairs.top_k         = top_k;
    pairs.ids           = one.ids;
    pairs.weights       = one.weights;
    pairs.x             = one.x;
    pairs.x_token_bytes = one.x_token_bytes;
    const ggml_status status =
        rows_.run(cpu_, with_down_bias ? *layout : without_down_bias(*layout), pairs, cpu, n_threads_, false);
    if (status != GGML_STATUS_SUCCESS) {
        return status;
    }
    for (int64_t t = 0; t < pairs.n_tokens; t++) {
        float * out = y + t * n_embd;
        if (!accumulate) {
            std::fill(out, out + n_embd, 0.0f);
        }
        for (int32_t k = 0; k < top_k; k++) {
            const auto p      = static_cast<size_t>(t * top_k + k);
            const float * row = rows_.row(p);
            for (int64_t i = 0; row != nullptr && i < n_embd; i++) {
                out[i] += row[i] * one.weights[p];
            }
        }
    }
    return GGML_STATUS_SUCCESS;
}

ggml_status dispatcher::compute_remote(const remote_block & one, const remote_shares & shares, float * y) {
    const bool in_graph     = shares.slots != nullptr;
    layer_counters & counts = counters_->layer(one.block->layer);
    const uint64_t begin    = now_ns();
    const bool has_device   = is_shared_ && shares.cpu != nullptr && !in_graph;
    ggml_status status      = compute_pairs(one, shares.cpu, !in_graph, y, false);
    add(counts.experts_ns, now_ns() - begin);
    if (!has_device) {
        return status;
    }
    hybrid_.mark_cpu_end();
    hybrid_.finish();
    is_finished_ = true;
    if (status == GGML_STATUS_SUCCESS && hybrid_.rest() != nullptr) {
        status = compute_pairs(one, hybrid_.rest(), true, y, true);
    }
    const uint64_t merge = now_ns();
    hybrid_.add_to(y, static_cast<size_t>(one.described->layer.n_embd) * sizeof(float));
    add(counts.merge_ns, now_ns() - merge);
    return status;
}

void dispatcher::end_remote(const remote_block & one, ggml_status status) {
    bool was_planned = false;
    if (is_shared_) {
        if (!is_finished_) {
            hybrid_.finish();
        }
        was_planned = hybrid_.was_planned();
        hybrid_.end_block();
    }
    if (status == GGML_STATUS_SUCCESS) {
        ids_.assign(one.ids, one.ids + n_pairs_of(one));
        count_block(*one.block, was_planned, ids_);
    }
    end_block(*one.block);
}

} // namespace hybrimoe
