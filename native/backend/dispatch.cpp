#include "dispatch.h"

#include <algorithm>
#include <chrono>
#include <cstring>

namespace hybrimoe {

namespace {

// Below this much data one thread is done before a team has woken up and passed its barriers: a router of
// 64 experts x 2048 in F32 is 512 KiB, about 25 microseconds for one thread.
constexpr size_t min_parallel_bytes = 512 * 1024;

class stopwatch {
public:
    // Nanoseconds since the last call, or since construction.
    uint64_t lap_ns() {
        const auto now  = std::chrono::steady_clock::now();
        const auto past = std::chrono::duration_cast<std::chrono::nanoseconds>(now - last_).count();
        last_           = now;
        return static_cast<uint64_t>(past);
    }

private:
    std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

// Whether the router of the block reads the same rows as the experts.
bool shares_input(ggml_tensor ** nodes, const moe_block & block, const described_block & described) {
    if (described.layer.weights_on_input) {
        return false;
    }
    for (int i = block.begin; i < block.experts; i++) {
        if (nodes[i]->op == GGML_OP_MUL_MAT && nodes[i]->src[0] == block.router) {
            return nodes[i]->src[1]->data == described.x->data;
        }
    }
    return false;
}

} // namespace

dispatcher::dispatcher(const settings & config, std::shared_ptr<counters> data, ggml_backend_dev_t inner)
    : counters_(std::move(data)),
      kernels_(config.kernels == cpu_kernels::ggml ? nullptr : std::make_unique<kernel_executor>(config)),
      hybrid_(config, counters_, *this, kernels_ == nullptr ? kernels::best_kernel_set() : kernels_->set(), inner) {}

ggml_status dispatcher::compute(ggml_cgraph * graph, const std::vector<graph_input> & inputs) {
    inputs_              = &inputs;
    ggml_tensor ** nodes = ggml_graph_nodes(graph);
    find_segments(nodes, ggml_graph_n_nodes(graph), segments_);
    for (const segment & one : segments_) {
        const ggml_status status = one.is_block ? run_block(nodes, one.block) : run_delegated(nodes, one);
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
    }
    return GGML_STATUS_SUCCESS;
}

device_rows dispatcher::origin_of(const ggml_tensor * x) const {
    for (const graph_input & input : *inputs_) {
        if (input.data == x->data) {
            return input.there;
        }
    }
    return {};
}

int dispatcher::n_threads_for(size_t n_bytes) const {
    return n_bytes < min_parallel_bytes ? 1 : n_threads_;
}

instance_report dispatcher::report(unsigned parts) const {
    return reports_.ask(parts, [this](unsigned wanted) { return make_report(wanted); });
}

instance_report dispatcher::make_report(unsigned parts) const {
    instance_report made;
    if ((parts & report_state) != 0) {
        made.state = hybrid_.describe_state();
    }
    if ((parts & report_residency) != 0) {
        made.residency = hybrid_.describe_residency();
    }
    if ((parts & report_trace) != 0) {
        made.trace = hybrid_.describe_trace();
    }
    return made;
}

void dispatcher::begin_block(const moe_block & block) {
    layer_counters & counts = counters_->layer(block.layer);
    counts.n_experts.store(static_cast<int32_t>(block.n_expert), std::memory_order_relaxed);
    const int32_t top_k = counts.top_k.load(std::memory_order_relaxed);
    if (top_k == 0 || block.top_k() < top_k) {
        counts.top_k.store(static_cast<int32_t>(block.top_k()), std::memory_order_relaxed);
    }
    reports_.begin_work();
    meter_.begin_block(block.layer, block.n_tokens(), counters_->passes);
}

void dispatcher::end_block(const moe_block & block) {
    meter_.end_block(counters_->passes);
    reports_.answer([this](unsigned wanted) { return make_report(wanted); });
    if (block.layer == counters_->n_layers() - 1) {
        reports_.end_work();
    }
}

ggml_status dispatcher::run_block(ggml_tensor ** nodes, const moe_block & block) {
    begin_block(block);
    const ggml_status status = run_experts(nodes, block);
    end_block(block);
    return status;
}

ggml_status dispatcher::run_experts(ggml_tensor ** nodes, const moe_block & block) {
    const std::optional<described_block> described =
        kernels_ ? kernels_->accept(nodes, block) : describe(nodes, block, kernel_executor::external_of, nullptr);
    const bool is_shared = described && hybrid_.prepare(block, *described, kernels_ == nullptr);
    if (is_shared) {
        hybrid_.set_input(static_cast<const float *>(described->x->data), described->x->nb[2],
                          shares_input(nodes, block, *described), origin_of(described->x));
    }
    const ggml_status status = kernels_ && described ? run_with_kernels(nodes, block, *described, is_shared)
                                                     : run_with_ggml(nodes, block, is_shared ? &*described : nullptr);
    if (is_shared) {
        hybrid_.end_block();
    }
    if (status != GGML_STATUS_SUCCESS) {
        return status;
    }
    count_block(block, is_shared && hybrid_.was_planned(), kernels_ && described ? kernels_->ids() : ids_);
    return GGML_STATUS_SUCCESS;
}

void dispatcher::count_block(const moe_block & block, bool was_planned, const std::vector<int32_t> & ids) {
    const int n_active      = count_active(ids, block.n_expert);
    layer_counters & counts = counters_->layer(block.layer);
    add(counts.n_steps, 1);
    add(counts.n_tokens, static_cast<uint64_t>(block.n_tokens()));
    add(counts.n_blocks, 1);
    add(counts.n_experts_cpu, static_cast<uint64_t>(was_planned ? hybrid_.n_experts_cpu() : n_active));
    add(counts.n_experts_gpu, static_cast<uint64_t>(was_planned ? hybrid_.n_experts_gpu() : 0));
}

ggml_status dispatcher::run_with_kernels(ggml_tensor ** nodes, const moe_block & block,
                                         const described_block & described, bool is_shared) {
    const kernel_executor::result done =
        kernels_->run(cpu_, nodes, block, described, n_threads_, is_shared ? &hybrid_ : nullptr);
    if (is_shared) {
        hybrid_.mark_kernels(done);
    }
    layer_counters & counts = counters_->layer(block.layer);
    add(counts.router_ns, done.router_ns);
    add(counts.experts_ns, done.experts_ns);
    if (block.n_tokens() == 1 && !(is_shared && hybrid_.was_planned())) {
        add(counts.n_decode, 1);
        add(counts.decode_ns, done.experts_ns);
    }
    ggml_status status = done.status;
    if (is_shared) {
        stopwatch watch;
        hybrid_.finish();
        if (status == GGML_STATUS_SUCCESS && hybrid_.rest() != nullptr) {
            status = kernels_->run_rest(cpu_, hybrid_.rest(), n_threads_);
        }
        hybrid_.add_to(kernels_->y(), kernels_->y_token_bytes());
        add(counts.merge_ns, watch.lap_ns());
    }
    kernels_->store_result();
    return status == GGML_STATUS_SUCCESS ? run_tail(nodes, block, described) : status;
}

ggml_status dispatcher::run_tail(ggml_tensor ** nodes, const moe_block & block, const described_block & described) {
    if (described.tail == block.end) {
        return GGML_STATUS_SUCCESS;
    }
    stopwatch watch;
    const ggml_status status =
        cpu_.run(nodes + described.tail, block.end - described.tail, n_threads_for(ggml_nbytes(described.y)));
    add(counters_->layer(block.layer).merge_ns, watch.lap_ns());
    return status;
}

ggml_status dispatcher::run_router(ggml_tensor ** nodes, const moe_block & block, bool with_scores) {
    const size_t n_tokens     = static_cast<size_t>(block.n_tokens());
    const size_t router_bytes = block.router == nullptr ? 0 : ggml_nbytes(block.router) * ((n_tokens + 3) / 4);
    const int n_threads       = n_threads_for(router_bytes);
    const router_scores at    = with_scores ? find_scores(nodes, block) : router_scores{};
    int begin                 = block.begin;
    scores_.clear();
    if (at.tensor != nullptr) {
        const ggml_status status = cpu_.run(nodes + begin, at.node + 1 - begin, n_threads);
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
        take_scores(at, scores_);
        begin = at.node + 1;
    }
    return cpu_.run(nodes + begin, block.experts - begin, n_threads);
}

ggml_status dispatcher::run_with_ggml(ggml_tensor ** nodes, const moe_block & block, const described_block * shared) {
    layer_counters & counts = counters_->layer(block.layer);
    stopwatch watch;
    ggml_status status = run_router(nodes, block, shared != nullptr && hybrid_.wants_scores());
    if (status != GGML_STATUS_SUCCESS) {
        return status;
    }
    take_routing(block, shared);
    add(counts.router_ns, watch.lap_ns());
    if (shared != nullptr) {
        hybrid_.mark_router_end();
    }

    if (shared != nullptr && hybrid_.only_records()) {
        hybrid_.route(ids_.data(), weights_.data(), scores_.empty() ? nullptr : scores_.data());
    } else if (shared != nullptr) {
        status = run_shared(block, *shared);
        add(counts.experts_ns, watch.lap_ns());
        return status == GGML_STATUS_SUCCESS ? run_tail(nodes, block, *shared) : status;
    }
    status = cpu_.run(nodes + block.experts, block.merge - block.experts, n_threads_);
    if (status != GGML_STATUS_SUCCESS) {
        return status;
    }
    add(counts.experts_ns, watch.lap_ns());
    if (shared != nullptr) {
        hybrid_.mark_cpu_end();
    }

    const size_t merge_bytes = ggml_nbytes(nodes[block.merge - 1]);
    status                   = cpu_.run(nodes + block.merge, block.end - block.merge, n_threads_for(merge_bytes));
    add(counts.merge_ns, watch.lap_ns());
    return status;
}

// Copies of what the router said: ggml may place the block's later tensors over it.
void dispatcher::take_routing(const moe_block & block, const described_block * described) {
    const auto top_k    = static_cast<size_t>(block.top_k());
    const auto n_tokens = static_cast<size_t>(block.n_tokens());
    ids_.resize(top_k * n_tokens);
    weights_.resize(top_k * n_tokens);
    for (size_t token = 0; token < n_tokens; token++) {
        std::memcpy(ids_.data() + token * top_k, static_cast<const char *>(block.ids->data) + token * block.ids->nb[1],
                    top_k * sizeof(int32_t));
        if (described != nullptr) {
            described->take_weights(static_cast<int64_t>(token), static_cast<int32_t>(top_k),
                                    weights_.data() + token * top_k);
        }
    }
}

// The block's pairs through ggml's kernels, some of them on accelerators, summed in ggml's order: the same bits as
// plain llama.cpp where the kernels are the same.
ggml_status dispatcher::run_shared(const moe_block & block, const described_block & described) {
    const expert_layout & layout = hybrid_.layout();
    const size_t row             = static_cast<size_t>(layout.n_embd * described.x_rows_per_token());
    // The result may lie over x.
    x_.resize(row * static_cast<size_t>(block.n_tokens()));
    for (int64_t t = 0; t < block.n_tokens(); t++) {
        std::memcpy(x_.data() + static_cast<size_t>(t) * row,
                    static_cast<const char *>(described.x->data) + static_cast<size_t>(t) * described.x->nb[2],
                    row * sizeof(float));
    }
    hybrid_.set_input(x_.data(), row * sizeof(float), false, origin_of(described.x));
    const uint8_t * take = hybrid_.route(ids_.data(), weights_.data(), scores_.empty() ? nullptr : scores_.data());
    routed_pairs pairs   = hybrid_.pairs();
    pairs.ids            = ids_.data();
    pairs.weights        = weights_.data();
    ggml_status status   = rows_.run(cpu_, layout, pairs, take, n_threads_, false);
    hybrid_.mark_cpu_end();
    hybrid_.finish();
    if (status == GGML_STATUS_SUCCESS && hybrid_.rest() != nullptr) {
        status = rows_.run(cpu_, layout, pairs, hybrid_.rest(), n_threads_, true);
    }
    if (status == GGML_STATUS_SUCCESS) {
        sum_rows(described);
    }
    return status;
}

void dispatcher::sum_rows(const described_block & described) const {
    const routed_pairs & pairs = hybrid_.pairs();
    const int64_t n_embd       = hybrid_.layout().n_embd;
    for (int64_t t = 0; t < pairs.n_tokens; t++) {
        auto * y = reinterpret_cast<float *>(static_cast<char *>(described.y->data) +
                                             static_cast<size_t>(t) * described.y_token_bytes);
        for (int32_t k = 0; k < pairs.top_k; k++) {
            const auto p       = static_cast<size_t>(t * pairs.top_k + k);
            const float * mine = rows_.row(p);
            const float * in   = mine != nullptr ? mine : hybrid_.row(t, k);
            const float w      = weights_[p];
            for (int64_t i = 0; i < n_embd; i++) {
                const float part = in[i] * w;
                y[i]             = k == 0 ? part : y[i] + part;
            }
        }
    }
}

int dispatcher::count_active(const std::vector<int32_t> & ids, int64_t n_expert) {
    is_active_.assign(static_cast<size_t>(n_expert), 0);
    for (const int32_t id : ids) {
        if (id >= 0 && id < n_expert) {
            is_active_[static_cast<size_t>(id)] = 1;
        }
    }
    return static_cast<int>(std::count(is_active_.begin(), is_active_.end(), 1));
}

double dispatcher::time_us(const known_layer & layer, const std::vector<int32_t> & experts, int n_tokens) {
    const expert_layout & layout = layer.layout;
    const auto n_embd            = static_cast<size_t>(layout.n_embd);
    const auto n_experts         = static_cast<int32_t>(experts.size());
    const size_t x_token         = n_embd * (layout.x_per_pair ? experts.size() : 1);
    std::vector<float> x(x_token * static_cast<size_t>(n_tokens), 0.01f);
    std::vector<float> y(n_embd * static_cast<size_t>(n_tokens));
    std::vector<int32_t> ids;
    for (int t = 0; t < n_tokens; t++) {
        ids.insert(ids.end(), experts.begin(), experts.end());
    }
    const std::vector<float> weights(ids.size(), 1.0f);
    routed_pairs pairs;
    pairs.n_tokens      = n_tokens;
    pairs.top_k         = n_experts;
    pairs.ids           = ids.data();
    pairs.weights       = weights.data();
    pairs.x             = x.data();
    pairs.x_token_bytes = x_token * sizeof(float);
    stopwatch watch;
    if (kernels_ == nullptr) {
        rows_.run(cpu_, layout, pairs, nullptr, n_threads_, false);
        return static_cast<double>(watch.lap_ns()) * 1e-3;
    }
    kernels::moe_batch batch;
    batch.n_tokens            = n_tokens;
    batch.top_k               = n_experts;
    batch.x                   = x.data();
    batch.x_token_bytes       = pairs.x_token_bytes;
    batch.x_is_weighted       = layout.x_per_pair;
    batch.ids                 = ids.data();
    batch.weights             = weights.data();
    batch.ids_token_bytes     = experts.size() * sizeof(int32_t);
    batch.weights_token_bytes = experts.size() * sizeof(float);
    batch.y                   = y.data();
    batch.y_token_bytes       = n_embd * sizeof(float);
    kernels_->run_experts(cpu_, layer.kernel_layer, batch, n_threads_);
    return static_cast<double>(watch.lap_ns()) * 1e-3;
}

// Nodes outside any block that is recognised; `layer`: whose experts are among them, -1: nobody's.
void dispatcher::count_delegated(int layer, uint64_t n_nodes) {
    if (layer >= 0) {
        layer_counters & counts = counters_->layer(layer);
        add(counts.n_steps, 1);
        add(counts.n_blocks_delegated, 1);
    }
    add(counters_->n_nodes_delegated, n_nodes);
}

ggml_status dispatcher::run_delegated(ggml_tensor ** nodes, const segment & rest) {
    const int n_nodes = rest.block.end - rest.block.begin;
    count_delegated(rest.has_experts ? rest.block.layer : -1, static_cast<uint64_t>(n_nodes));
    return cpu_.run(nodes + rest.block.begin, n_nodes, n_threads_);
}

} // namespace hybrimoe
