#include "graph_front/graph_runner.h"

#include "graph_front/wrapper.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>

namespace hybrimoe {

namespace {

double now_us() {
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

} // namespace

// ---------------------------------------------------------------------------------------------------------------
// memory

void graph_runner::pinned::reserve(ggml_backend_dev_t device, size_t n_bytes) {
    used_ = 0;
    if (n_bytes <= size_) {
        return;
    }
    const size_t wanted             = std::max(n_bytes, size_ + size_ / 2);
    ggml_backend_buffer_type_t type = ggml_backend_dev_host_buffer_type(device);
    buffer_.reset();
    buffer_.reset(type == nullptr ? nullptr : ggml_backend_buft_alloc_buffer(type, wanted));
    if (buffer_ == nullptr) {
        buffer_.reset(ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), wanted));
    }
    if (buffer_ == nullptr) {
        size_ = 0;
        throw std::bad_alloc();
    }
    base_ = static_cast<char *>(ggml_backend_buffer_get_base(buffer_.get()));
    size_ = wanted;
}

char * graph_runner::pinned::take(size_t n_bytes) {
    char * at = base_ + used_;
    used_ += padded(n_bytes);
    return at;
}

graph_runner::graph_runner(ggml_backend_t backend)
    : inner_(backend), device_(ggml_backend_get_device(backend)),
      is_cpu_(ggml_backend_dev_type(device_) == GGML_BACKEND_DEVICE_TYPE_CPU) {}

graph_runner::~graph_runner() {
    ggml_backend_synchronize(inner_.get());
    if (core_ != nullptr) {
        std::lock_guard<std::mutex> lock(core_->mutex);
        if (core_->last == inner_.get()) {
            core_->last = nullptr;
        }
    }
}

void graph_runner::set_n_threads(int n_threads) {
    n_threads_ = n_threads;
    if (is_cpu_) { // a stand-in computes everything on the host's threads
        const auto set = reinterpret_cast<ggml_backend_set_n_threads_t>(
            ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device_), "ggml_backend_set_n_threads"));
        if (set != nullptr) {
            set(inner_.get(), n_threads);
        }
    }
}

void graph_runner::set_abort_callback(ggml_abort_callback callback, void * data) {
    callback_      = callback;
    callback_data_ = data;
}

// ---------------------------------------------------------------------------------------------------------------
// the graph

ggml_status graph_runner::compute(ggml_cgraph * graph) {
    graph_ = graph;
    nodes_ = ggml_graph_nodes(graph);
    at_    = 0;
    ours_.clear();
    gate_input_.clear();
    const int n_nodes  = ggml_graph_n_nodes(graph);
    const auto product = std::find_if(nodes_, nodes_ + n_nodes, is_cut_product);
    if (product == nodes_ + n_nodes) {
        return ggml_backend_graph_compute_async(inner_.get(), graph);
    }
    try {
        if (core_ == nullptr) {
            core_ = expert_core::find(device_, (*product)->src[0]->data);
        }
        std::lock_guard<std::mutex> lock(core_->mutex);
        const ggml_status status = run_cuts(n_nodes);
        put_back();
        return status;
    } catch (const std::bad_alloc &) {
        put_back();
        return GGML_STATUS_ALLOC_FAILED;
    } catch (const std::exception & error) {
        std::fprintf(stderr, "HybriMoE: %s\n", error.what());
        put_back();
        return GGML_STATUS_FAILED;
    }
}

ggml_status graph_runner::run_cuts(int n_nodes) {
    if (core_->last != nullptr && core_->last != inner_.get()) {
        ggml_backend_synchronize(core_->last); // it may still read slots
    }
    core_->last = inner_.get();
    core_->dispatch.set_n_threads(n_threads_);
    core_->dispatch.set_abort_callback(callback_, callback_data_);
    const uint64_t number = graph_number(graph_);
    if (number == 0 || number != cuts_of_) {
        cuts_of_ = 0;
        cuts_    = find_cuts(nodes_, n_nodes, is_expert_weight_of_ours, core_->copies);
        cuts_of_ = number;
        for (const expert_cut & cut : cuts_) {
            for (const int i : cut.products) {
                core_->experts.insert(nodes_[i]->src[0]->data);
            }
        }
    }
    for (const expert_cut & cut : cuts_) {
        const ggml_status status = run_cut(cut);
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
    }
    return run_to(n_nodes);
}

ggml_status graph_runner::run_to(int end) {
    if (at_ == end && ours_.empty()) {
        return GGML_STATUS_SUCCESS;
    }
    ggml_cgraph * slice = slice_.make(graph_, at_, end, ours_, salt_);
    at_                 = end;
    salt_               = 0;
    ours_.clear();
    return ggml_backend_graph_compute_async(inner_.get(), slice);
}

void graph_runner::put_back() {
    for (const replaced & one : replaced_) {
        one.node->src[0] = one.experts;
        one.node->src[2] = one.ids;
    }
    replaced_.clear();
}

ggml_status graph_runner::run_cut(const expert_cut & cut) {
    if (cut.described) {
        return run_block(cut);
    }
    if (cut.has_rows) {
        return run_products(cut);
    }
    for (const int product : cut.products) { // nothing is to be computed
        const ggml_status status = run_to(product);
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
        at_ = product + 1;
    }
    return GGML_STATUS_SUCCESS;
}

// ---------------------------------------------------------------------------------------------------------------
// a MoE block

// Everything that the host needs is queued behind the router, and waited for once.
remote_block graph_runner::fetch(const expert_cut & cut, const ggml_tensor * scores) {
    const described_block & described = *cut.described;
    const ggml_tensor * parts[]       = {cut.block.ids, described.x, described.weights, scores};
    size_t n_bytes                    = 0;
    for (const ggml_tensor * part : parts) {
        n_bytes += part == nullptr ? 0 : pinned::padded(ggml_nbytes(part));
    }
    down_.reserve(device_, n_bytes);
    const char * came[4] = {};
    for (size_t i = 0; i < 4; i++) {
        if (parts[i] == nullptr) {
            continue;
        }
        char * to = down_.take(ggml_nbytes(parts[i]));
        ggml_backend_tensor_get_async(inner_.get(), parts[i], to, 0, ggml_nbytes(parts[i]));
        came[i] = to;
    }
    if (!gate_input_.empty() && gate_tokens_ == cut.block.n_tokens()) {
        const size_t token_bytes = gate_input_.size() / static_cast<size_t>(gate_tokens_) * sizeof(float);
        core_->dispatch.look_ahead_from(described, gate_input_.data(), token_bytes, cut.block.n_tokens());
    }
    ggml_backend_synchronize(inner_.get());

    const auto top_k    = static_cast<size_t>(cut.block.top_k());
    const auto n_tokens = static_cast<size_t>(cut.block.n_tokens());
    ids_.resize(top_k * n_tokens);
    weights_.assign(top_k * n_tokens, 1.0f);
    for (size_t t = 0; t < n_tokens; t++) {
        std::memcpy(ids_.data() + t * top_k, came[0] + t * cut.block.ids->nb[1], top_k * sizeof(int32_t));
        if (came[2] != nullptr) {
            std::memcpy(weights_.data() + t * top_k, came[2] + t * described.weights->nb[2], top_k * sizeof(float));
        }
    }
    remote_block one;
    one.block         = &cut.block;
    one.described     = &described;
    one.x             = reinterpret_cast<const float *>(came[1]);
    one.x_token_bytes = described.x->nb[2];
    one.ids           = ids_.data();
    one.weights       = weights_.data();
    one.there         = {described.x, inner_.get()};
    if (came[3] != nullptr) {
        take_scores(cut.scores, reinterpret_cast<const float *>(came[3]), scores_);
        one.scores = scores_.data();
    }
    return one;
}

ggml_status graph_runner::run_block(const expert_cut & cut) {
    const ggml_tensor * scores = core_->dispatch.wants_scores() ? keep_scores(cut) : nullptr;
    ggml_status status         = run_to(cut.products.front());
    if (status != GGML_STATUS_SUCCESS) {
        return status;
    }
    const remote_block one = fetch(cut, scores);
    keep_gate_input(cut, one);
    const bool may_share      = cut.block.n_tokens() <= most_graph_tokens && reserve_device(cut);
    const auto shares         = core_->dispatch.begin_remote(one, may_share);
    const size_t result_bytes = static_cast<size_t>(cut.described->layer.n_embd * cut.block.n_tokens()) * sizeof(float);
    up_.reserve(device_, pinned::padded(result_bytes) + pinned::padded(ids_.size() * sizeof(int32_t)));
    status = shares.slots != nullptr && use_slots(cut, one, shares) ? run_in_graph(cut, one, shares)
                                                                    : run_on_host(cut, one, shares);
    core_->dispatch.end_remote(one, status);
    return status;
}

void graph_runner::keep_gate_input(const expert_cut & cut, const remote_block & one) {
    gate_input_.clear();
    if (!cut.shares_input || cut.block.n_tokens() > most_graph_tokens) {
        return;
    }
    gate_tokens_      = cut.block.n_tokens();
    const auto n_embd = static_cast<size_t>(cut.described->layer.n_embd);
    for (int64_t t = 0; t < cut.block.n_tokens(); t++) {
        const auto * row = reinterpret_cast<const float *>(reinterpret_cast<const char *>(one.x) +
                                                           static_cast<size_t>(t) * one.x_token_bytes);
        gate_input_.insert(gate_input_.end(), row, row + n_embd);
    }
}

// Hits stay in the graph. When the CPU has a share, its sum is added in front of what follows the block.
ggml_status graph_runner::run_in_graph(const expert_cut & cut, const remote_block & one,
                                       const dispatcher::remote_shares & shares) {
    const bool has_cpu = std::any_of(shares.cpu, shares.cpu + ids_.size(), [](uint8_t mine) { return mine != 0; });
    if (!has_cpu && !shares.is_watched) {
        return GGML_STATUS_SUCCESS; // with the next slice
    }
    const double begin_us = now_us();
    ggml_status status    = run_to(cut.sum + 1);
    if (is_cpu_) {
        core_->dispatch.add_inline_us(now_us() - begin_us);
    }
    if (shares.is_watched) {
        core_->dispatch.watch(inner_.get());
    }
    if (status == GGML_STATUS_SUCCESS && has_cpu) {
        const size_t n_values = static_cast<size_t>(ggml_nelements(cut.described->y));
        auto * sum            = reinterpret_cast<float *>(up_.take(n_values * sizeof(float)));
        status                = core_->dispatch.compute_remote(one, shares, sum);
        add_on_device(cut.block.layer, cut.described->y, sum);
    }
    return status;
}

// The block is computed off the graph, which goes on behind it.
ggml_status graph_runner::run_on_host(const expert_cut & cut, const remote_block & one,
                                      dispatcher::remote_shares shares) {
    if (shares.slots != nullptr) { // they do not fit the graph: the CPU does it all
        shares = {};
    }
    ggml_tensor * y          = cut.described->y;
    auto * result            = reinterpret_cast<float *>(up_.take(ggml_nbytes(y)));
    const ggml_status status = core_->dispatch.compute_remote(one, shares, result);
    ggml_backend_tensor_set_async(inner_.get(), y, result, 0, ggml_nbytes(y));
    at_ = cut.sum + 1;
    return status;
}

// Memory on the device for slot ids and the CPU's sum.
bool graph_runner::reserve_device(const expert_cut & cut) {
    const size_t ids_bytes = static_cast<size_t>(cut.block.top_k() * most_graph_tokens) * sizeof(int32_t);
    const size_t sum_bytes = static_cast<size_t>(cut.described->layer.n_embd * most_graph_tokens) * sizeof(float);
    if (device_memory_ != nullptr && ids_bytes <= ids_bytes_ && sum_bytes <= sum_bytes_) {
        return true;
    }
    ggml_backend_buffer_type_t type = ggml_backend_dev_buffer_type(device_);
    const size_t alignment          = ggml_backend_buft_get_alignment(type);
    ids_bytes_                      = (std::max(ids_bytes, ids_bytes_) + alignment - 1) / alignment * alignment;
    sum_bytes_                      = std::max(sum_bytes, sum_bytes_);
    for (auto & [layer, nodes] : added_) {
        nodes.cpu_sum = nodes.add = nullptr;
    }
    device_memory_.reset(); // the device is idle: fetch() has waited
    device_memory_.reset(ggml_backend_buft_alloc_buffer(type, ids_bytes_ + sum_bytes_));
    if (device_memory_ == nullptr) {
        ids_bytes_ = sum_bytes_ = 0;
        return false;
    }
    slot_ids_       = make_node("hybrimoe_slots", GGML_OP_NONE);
    slot_ids_->type = GGML_TYPE_I32;
    ggml_backend_tensor_alloc(device_memory_.get(), slot_ids_, ggml_backend_buffer_get_base(device_memory_.get()));
    return true;
}

// Slots and slot ids take the place of experts and ids in the block's products.
bool graph_runner::use_slots(const expert_cut & cut, const remote_block & one,
                             const dispatcher::remote_shares & shares) {
    const expert_layout & layout = core_->dispatch.shared_layout();
    std::vector<ggml_tensor *> banks;
    for (const int product : cut.products) {
        const auto part = std::find_if(layout.parts.begin(), layout.parts.end(), [&](const expert_part & p) {
            return p.is_matrix() && p.host == nodes_[product]->src[0]->data;
        });
        if (part == layout.parts.end()) {
            return false;
        }
        banks.push_back(shares.slots->part(static_cast<size_t>(part - layout.parts.begin())));
    }
    auto * slots = reinterpret_cast<int32_t *>(up_.take(ids_.size() * sizeof(int32_t)));
    for (size_t p = 0; p < ids_.size(); p++) {
        const int slot = shares.cpu[p] != 0 ? -1 : core_->dispatch.slot_in_graph(one.ids[p]);
        slots[p]       = slot < 0 ? shares.slots->zero_slot() : slot;
    }
    slot_ids_->ne[0] = cut.block.top_k();
    slot_ids_->ne[1] = cut.block.n_tokens();
    slot_ids_->nb[1] = static_cast<size_t>(slot_ids_->ne[0]) * sizeof(int32_t);
    slot_ids_->nb[2] = slot_ids_->nb[3] = slot_ids_->nb[1] * static_cast<size_t>(slot_ids_->ne[1]);
    ggml_backend_tensor_set_async(inner_.get(), slot_ids_, slots, 0, ids_.size() * sizeof(int32_t));
    for (size_t i = 0; i < banks.size(); i++) {
        ggml_tensor * node = nodes_[cut.products[i]];
        replaced_.push_back({node, node->src[0], node->src[2]});
        node->src[0] = banks[i];
        node->src[2] = slot_ids_;
    }
    salt_ = shares.slots->generation();
    return true;
}

// Where the block's scores can be fetched in front of its products: a node of ours copies them where llama.cpp's graph
// uses their memory again.
const ggml_tensor * graph_runner::keep_scores(const expert_cut & cut) {
    if (cut.scores.tensor == nullptr || cut.scores_are_kept || cut.scores.node < at_) {
        return cut.scores_are_kept ? cut.scores.tensor : nullptr;
    }
    const ggml_tensor * from = cut.scores.tensor;
    const size_t n_bytes     = ggml_nbytes(from);
    if (scores_memory_ == nullptr || ggml_backend_buffer_get_size(scores_memory_.get()) < n_bytes) {
        ggml_backend_synchronize(inner_.get());
        scores_memory_.reset();
        scores_memory_.reset(ggml_backend_buft_alloc_buffer(ggml_backend_dev_buffer_type(device_), n_bytes));
        for (auto & [layer, nodes] : added_) {
            nodes.scores = nullptr;
        }
        if (scores_memory_ == nullptr) {
            return nullptr; // policies do without
        }
    }
    layer_nodes & nodes = added_[cut.block.layer];
    if (nodes.scores == nullptr) {
        nodes.scores = make_node("hybrimoe_scores", GGML_OP_CONT);
        ggml_backend_tensor_alloc(scores_memory_.get(), nodes.scores,
                                  ggml_backend_buffer_get_base(scores_memory_.get()));
    }
    std::copy(from->ne, from->ne + GGML_MAX_DIMS, nodes.scores->ne);
    std::copy(from->nb, from->nb + GGML_MAX_DIMS, nodes.scores->nb);
    nodes.scores->src[0] = const_cast<ggml_tensor *>(from);
    ours_.push_back({cut.scores.node + 1, nodes.scores});
    return nodes.scores;
}

ggml_tensor * graph_runner::make_node(const char * name, ggml_op op) {
    ggml_init_params params{};
    params.mem_size = ggml_tensor_overhead();
    params.no_alloc = true;
    contexts_.emplace_back(ggml_init(params));
    if (contexts_.back() == nullptr) {
        throw std::bad_alloc();
    }
    ggml_tensor * made = ggml_new_tensor_1d(contexts_.back().get(), GGML_TYPE_F32, 1);
    made->op           = op;
    made->flags |= GGML_TENSOR_FLAG_COMPUTE;
    ggml_set_name(made, name);
    return made;
}

void graph_runner::add_on_device(int layer, ggml_tensor * y, const float * cpu_sum) {
    layer_nodes & nodes = added_[layer];
    if (nodes.add == nullptr) {
        nodes.cpu_sum = make_node("hybrimoe_cpu_sum", GGML_OP_NONE);
        nodes.add     = make_node("hybrimoe_add", GGML_OP_ADD);
        auto * base   = static_cast<char *>(ggml_backend_buffer_get_base(device_memory_.get()));
        ggml_backend_tensor_alloc(device_memory_.get(), nodes.cpu_sum, base + ids_bytes_);
        nodes.add->src[1] = nodes.cpu_sum;
    }
    for (ggml_tensor * one : {nodes.cpu_sum, nodes.add}) {
        std::copy(y->ne, y->ne + GGML_MAX_DIMS, one->ne);
        std::copy(y->nb, y->nb + GGML_MAX_DIMS, one->nb);
    }
    nodes.add->src[0]    = y;
    nodes.add->data      = y->data;
    nodes.add->buffer    = y->buffer;
    nodes.add->view_src  = y->view_src != nullptr ? y->view_src : y;
    nodes.add->view_offs = y->view_offs;
    ggml_backend_tensor_set_async(inner_.get(), nodes.cpu_sum, cpu_sum, 0, ggml_nbytes(y));
    ours_.push_back({at_, nodes.add});
}

// ---------------------------------------------------------------------------------------------------------------
// anything else: an adapter on the experts, a piece of a block, an architecture that the kernels do not know

ggml_status graph_runner::run_products(const expert_cut & cut) {
    for (const int product : cut.products) {
        ggml_status status = run_to(product);
        if (status == GGML_STATUS_SUCCESS) {
            status = run_product(nodes_[product]);
        }
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
        at_ = product + 1;
    }
    core_->dispatch.count_delegated(cut.block.layer, cut.products.size());
    return GGML_STATUS_SUCCESS;
}

// One product on the CPU, from and to the device.
ggml_status graph_runner::run_product(ggml_tensor * node) {
    ggml_tensor x = *node->src[1], ids = *node->src[2], out = *node;
    down_.reserve(device_, pinned::padded(ggml_nbytes(&x)) + pinned::padded(ggml_nbytes(&ids)));
    for (ggml_tensor * one : {&x, &ids}) {
        char * to = down_.take(ggml_nbytes(one));
        ggml_backend_tensor_get_async(inner_.get(), one, to, 0, ggml_nbytes(one));
        one->data     = to;
        one->buffer   = nullptr;
        one->view_src = nullptr;
        one->op       = GGML_OP_NONE;
    }
    ggml_backend_synchronize(inner_.get());
    up_.reserve(device_, ggml_nbytes(node));
    out.data             = up_.take(ggml_nbytes(node));
    out.buffer           = nullptr;
    out.view_src         = nullptr;
    out.src[1]           = &x;
    out.src[2]           = &ids;
    ggml_tensor * one[]  = {&out};
    const auto n_threads = core_->dispatch.n_threads();
    const auto status    = core_->dispatch.cpu().run(one, 1, n_threads);
    ggml_backend_tensor_set_async(inner_.get(), node, out.data, 0, ggml_nbytes(node));
    return status;
}

} // namespace hybrimoe
