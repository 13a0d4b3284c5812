#include "accelerator/device_compute.h"

#include "ggml-alloc.h"
#include "running_ggml/tables.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <numeric>

namespace hybrimoe {

namespace {

constexpr size_t host_alignment  = 256;
constexpr size_t max_chunk_nodes = max_ffn_nodes + 8;

size_t round_up(size_t n, size_t step) {
    return (n + step - 1) / step * step;
}

context_ptr make_context(size_t n_tensors, size_t n_graph_nodes) {
    ggml_init_params params{};
    params.mem_size = n_tensors * ggml_tensor_overhead() +
                      (n_graph_nodes == 0 ? 0 : ggml_graph_overhead_custom(n_graph_nodes, false));
    params.no_alloc = true;
    context_ptr context(ggml_init(params));
    if (context == nullptr) {
        throw std::bad_alloc();
    }
    return context;
}

// Places every tensor of the graph that has no memory yet; views follow what they look at.
bool place_graph(device_port & port, device_arena & arena, ggml_cgraph * graph) {
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        ggml_tensor * node = ggml_graph_node(graph, i);
        if (node->view_src != nullptr) {
            if (node->buffer == nullptr && ggml_backend_view_init(node) != GGML_STATUS_SUCCESS) {
                return false;
            }
        } else if (node->data == nullptr && !arena.place(port, node)) {
            return false;
        }
    }
    return true;
}

uint64_t graph_key(const rows_request & r) {
    // A slot set lives as long as its layer; its address names the layer.
    return reinterpret_cast<uintptr_t>(r.slots) * 1024 + static_cast<uint64_t>(r.n);
}

} // namespace

void gallocr_deleter::operator()(ggml_gallocr * allocator) const {
    ggml_gallocr_free(allocator);
}

bool device_arena::reserve(device_port & port, size_t n_bytes) {
    if (n_bytes <= capacity()) {
        return true;
    }
    buffer_.reset();
    used_   = 0;
    buffer_ = port.allocate(n_bytes);
    return buffer_ != nullptr;
}

bool device_arena::place(const device_port & port, ggml_tensor * tensor) {
    const size_t size = port.alloc_size(tensor);
    if (used_ + size > capacity()) {
        return false;
    }
    char * at = static_cast<char *>(ggml_backend_buffer_get_base(buffer_.get())) + used_;
    used_ += size;
    return ggml_backend_tensor_alloc(buffer_.get(), tensor, at) == GGML_STATUS_SUCCESS;
}

void pair_list::clear() {
    tokens.clear();
    slots.clear();
    experts.clear();
}

void pair_list::add(int32_t token, int32_t slot, int32_t expert) {
    tokens.push_back(token);
    slots.push_back(slot);
    experts.push_back(expert);
}

device_compute::~device_compute() {
    synchronize();
}

// ---------------------------------------------------------------------------------------------------------------
// decode

// Inputs of a decode graph in one block, so that one upload carries them: x, scales, ids.
struct input_offsets {
    size_t x_bytes     = 0;
    size_t scale_at[3] = {};
    size_t ids_at      = 0;
    size_t n_bytes     = 0;

    input_offsets(const device_port & port, const expert_layout & layout, int n) {
        const size_t step    = port.alignment();
        const int64_t n_x    = layout.x_per_pair ? n : 1;
        x_bytes              = round_up(static_cast<size_t>(layout.n_embd * n_x) * sizeof(float), step);
        size_t at            = x_bytes;
        const float * have[] = {layout.scale_gate, layout.scale_up, layout.scale_down};
        for (int i = 0; i < 3; i++) {
            if (have[i] != nullptr) {
                scale_at[i] = at;
                at += round_up(static_cast<size_t>(n) * sizeof(float), step);
            }
        }
        ids_at  = at;
        n_bytes = at + round_up(static_cast<size_t>(n) * sizeof(int32_t), step);
    }
};

size_t device_compute::arena_bytes(const device_port & port, const expert_layout & layout, int n) {
    const size_t rows  = static_cast<size_t>(n);
    const size_t wide  = rows * static_cast<size_t>(layout.n_ff) * sizeof(float);
    const size_t embd  = rows * static_cast<size_t>(layout.n_embd) * sizeof(float);
    const size_t slack = max_ffn_nodes * port.alignment();
    // Products, scales, biases and activation: at most fifteen hidden-wide tensors (nine of them the activation of
    // situ) and three of the model's width. Some backends ask for more than a tensor's bytes.
    return input_offsets(port, layout, n).n_bytes + 2 * (15 * wide + 3 * embd) + slack;
}

bool device_compute::supports(const device_port & port, const expert_layout & layout) {
    const context_ptr context = make_context(max_ffn_nodes + 16, 0);
    ggml_tensor * x           = ggml_new_tensor_3d(context.get(), GGML_TYPE_F32, layout.n_embd, 1, 1);
    ggml_tensor * ids         = ggml_new_tensor_2d(context.get(), GGML_TYPE_I32, 1, 1);
    expert_tensors experts{};
    for (size_t i = 0; i < layout.parts.size(); i++) {
        const expert_part & part = layout.parts[i];
        experts[i] = part.is_matrix() ? ggml_new_tensor_3d(context.get(), part.type, part.n_in, part.n_out, 2)
                                      : ggml_new_tensor_2d(context.get(), part.type, part.n_in, 2);
    }
    build_ffn(context.get(), layout, experts, x, ids, {});
    for (ggml_tensor * t = ggml_get_first_tensor(context.get()); t != nullptr;
         t               = ggml_get_next_tensor(context.get(), t)) {
        if (t->op != GGML_OP_NONE && t->op != GGML_OP_VIEW && !port.supports(t)) {
            return false;
        }
    }
    return true;
}

bool device_compute::reserve(const std::vector<const expert_layout *> & layouts, int top_k) {
    size_t arena = 0;
    top_k_       = top_k;
    for (const expert_layout * layout : layouts) {
        arena        = std::max(arena, arena_bytes(port_, *layout, top_k));
        input_bytes_ = std::max(input_bytes_, input_offsets(port_, *layout, top_k).n_bytes);
        max_embd_    = std::max(max_embd_, layout->n_embd);
    }
    if (!arena_.reserve(port_, arena)) {
        return false;
    }
    const size_t input = round_up(input_bytes_, host_alignment);
    const size_t rows =
        round_up(static_cast<size_t>(max_embd_) * static_cast<size_t>(top_k) * sizeof(float), host_alignment);
    bool pinned = false;
    host_       = port_.allocate_host(n_lanes * (input + rows), pinned);
    if (host_ == nullptr) {
        return false;
    }
    char * at = static_cast<char *>(ggml_backend_buffer_get_base(host_.get()));
    for (lane_memory & one : lanes_) {
        one.input = at;
        one.rows  = reinterpret_cast<float *>(at + input);
        at += input + rows;
    }
    return true;
}

bool device_compute::build_rows(const rows_request & request, row_graph & out) {
    const expert_layout & layout = *request.layout;
    const int64_t n              = request.n;
    const input_offsets offsets(port_, layout, request.n);
    out            = {};
    out.context    = make_context(max_ffn_nodes + 16, max_ffn_nodes + 8);
    out.ids_at     = offsets.ids_at;
    out.x_bytes    = offsets.x_bytes;
    out.generation = request.slots->generation();
    std::copy(offsets.scale_at, offsets.scale_at + 3, out.scale_at);
    out.input_bytes        = offsets.ids_at + static_cast<size_t>(n) * sizeof(int32_t);
    ggml_context * context = out.context.get();
    out.input              = ggml_new_tensor_1d(context, GGML_TYPE_I8, static_cast<int64_t>(offsets.n_bytes));
    arena_.reset();
    if (!arena_.place(port_, out.input)) {
        return false;
    }
    char * base      = static_cast<char *>(out.input->data);
    const auto input = [&](ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, size_t at) {
        ggml_tensor * t = ggml_new_tensor_3d(context, type, ne0, ne1, ne2);
        return ggml_backend_tensor_alloc(out.input->buffer, t, base + at) == GGML_STATUS_SUCCESS ? t : nullptr;
    };
    ggml_tensor * x   = input(GGML_TYPE_F32, layout.n_embd, layout.x_per_pair ? n : 1, 1, 0);
    out.x             = x;
    ggml_tensor * ids = input(GGML_TYPE_I32, n, 1, 1, offsets.ids_at);
    ggml_tensor * scales[3]{};
    for (int i = 0; i < 3; i++) {
        scales[i] = offsets.scale_at[i] == 0 ? nullptr : input(GGML_TYPE_F32, 1, n, 1, offsets.scale_at[i]);
    }
    if (x == nullptr || ids == nullptr) {
        return false;
    }
    out.rows =
        build_ffn(context, layout, tensors_of(*request.slots, layout), x, ids, {scales[0], scales[1], scales[2]});
    out.graph = ggml_new_graph_custom(context, max_ffn_nodes + 8, false);
    ggml_build_forward_expand(out.graph, out.rows);
    return place_graph(port_, arena_, out.graph);
}

device_compute::row_graph * device_compute::find_graph(const rows_request & request) {
    row_graph & found = graphs_[graph_key(request)];
    if (found.graph == nullptr || found.generation != request.slots->generation()) {
        if (!build_rows(request, found)) {
            found = {};
            return nullptr;
        }
    }
    return &found;
}

bool device_compute::take_over(const device_rows & rows, ggml_tensor * to) const {
    if (rows.tensor == nullptr || !ggml_are_same_shape(rows.tensor, to)) {
        return false;
    }
    const ggml_tensor * owner = rows.tensor->view_src == nullptr ? rows.tensor : rows.tensor->view_src;
    const auto copy           = tables::of(port_.compute())->iface.cpy_tensor_async;
    return owner->buffer != nullptr && copy != nullptr &&
           ggml_backend_buft_get_device(ggml_backend_buffer_get_type(owner->buffer)) == port_.device() &&
           copy(rows.source, port_.compute(), rows.tensor, to);
}

bool device_compute::launch_rows(const rows_request & request) {
    if (request.n < 1 || request.n > top_k_) {
        return false;
    }
    row_graph * graph = find_graph(request);
    if (graph == nullptr) {
        return false;
    }
    const expert_layout & layout = *request.layout;
    lane_memory & out            = lanes_[request.lane];
    const auto width             = static_cast<size_t>(layout.n_embd);
    for (int k = 0; k < (layout.x_per_pair ? request.n : 1); k++) {
        const size_t row = request.x_rows == nullptr ? 0 : static_cast<size_t>(request.x_rows[k]);
        std::memcpy(out.input + static_cast<size_t>(k) * width * sizeof(float), request.x + row * width,
                    width * sizeof(float));
    }
    const float * scales[] = {layout.scale_gate, layout.scale_up, layout.scale_down};
    for (int i = 0; i < 3; i++) {
        if (scales[i] == nullptr) {
            continue;
        }
        auto * values = reinterpret_cast<float *>(out.input + graph->scale_at[i]);
        for (int k = 0; k < request.n; k++) {
            values[k] = scales[i][request.experts[k]];
        }
    }
    std::memcpy(out.input + graph->ids_at, request.slot_ids, static_cast<size_t>(request.n) * sizeof(int32_t));
    // What lies on the device already is not sent again.
    const size_t begin = !layout.x_per_pair && take_over(request.x_there, graph->x) ? graph->x_bytes : 0;
    ggml_backend_tensor_set_async(port_.compute(), graph->input, out.input + begin, begin, graph->input_bytes - begin);
    if (ggml_backend_graph_compute_async(port_.compute(), graph->graph) != GGML_STATUS_SUCCESS) {
        return false;
    }
    ggml_backend_tensor_get_async(port_.compute(), graph->rows, out.rows, 0,
                                  static_cast<size_t>(request.n) * static_cast<size_t>(layout.n_embd) * sizeof(float));
    return true;
}

// ---------------------------------------------------------------------------------------------------------------
// prefill

// Rows begin at aligned addresses: a multiple of this many rows is one.
int64_t device_compute::round_row(int64_t row) const {
    const size_t row_bytes = static_cast<size_t>(n_embd_) * sizeof(float);
    const auto step        = static_cast<int64_t>(port_.alignment() / std::gcd(port_.alignment(), row_bytes));
    return (row + step - 1) / step * step;
}

size_t device_compute::batch_bytes(const expert_layout & layout, int64_t n_tokens, int top_k) {
    const auto tokens = static_cast<size_t>(n_tokens);
    const auto pairs  = tokens * static_cast<size_t>(top_k);
    const auto embd   = static_cast<size_t>(layout.n_embd) * sizeof(float);
    const auto wide   = static_cast<size_t>(layout.n_ff) * sizeof(float);
    // x, rows, result; a chunk's gathered x, hidden values and the gathered rows of the sum.
    return embd * (tokens + (layout.x_per_pair ? pairs : tokens) + pairs) + pairs * (2 * embd + 3 * wide);
}

bool device_compute::reserve_batch(size_t device_bytes, size_t host_bytes) {
    if (batch_host_ == nullptr || ggml_backend_buffer_get_size(batch_host_.get()) < host_bytes) {
        bool pinned = false;
        batch_host_.reset();
        batch_host_ = port_.allocate_host(host_bytes, pinned);
    }
    return batch_host_ != nullptr && batch_arena_.reserve(port_, device_bytes);
}

char * device_compute::stage(const void * data, size_t n_bytes) {
    const size_t size = round_up(n_bytes, host_alignment);
    if (batch_staged_ + size > ggml_backend_buffer_get_size(batch_host_.get())) {
        return nullptr;
    }
    char * at = static_cast<char *>(ggml_backend_buffer_get_base(batch_host_.get())) + batch_staged_;
    batch_staged_ += size;
    if (data != nullptr) {
        std::memcpy(at, data, n_bytes);
    }
    return at;
}

bool device_compute::upload(ggml_tensor * tensor, const void * data, size_t n_bytes) {
    const char * at = stage(data, n_bytes);
    if (at == nullptr) {
        return false;
    }
    ggml_backend_tensor_set_async(port_.compute(), tensor, at, 0, n_bytes);
    return true;
}

bool device_compute::begin_batch(const expert_layout & layout, const float * x, size_t x_token_bytes,
                                 const device_rows & x_there, int64_t n_tokens, int64_t max_pairs, int n_chunks,
                                 int n_x_rows) {
    synchronize(); // what an abandoned step left behind
    batch_contexts_.clear();
    n_tokens_               = n_tokens;
    n_embd_                 = layout.n_embd;
    const size_t row_bytes  = static_cast<size_t>(n_embd_) * sizeof(float);
    const int64_t n_rows    = round_row(1) + max_pairs + (n_chunks + 1) * round_row(1);
    const auto tokens       = static_cast<size_t>(n_tokens);
    const size_t x_bytes    = static_cast<size_t>(n_x_rows) * row_bytes; // of one token
    const size_t inputs     = (static_cast<size_t>(max_pairs) * 6 + tokens) * sizeof(float);
    const size_t per_tensor = 2 * std::max(port_.alignment(), host_alignment);
    const size_t n_inputs   = static_cast<size_t>(n_chunks) * 6 + 8;
    const size_t host =
        tokens * (x_bytes + row_bytes) + static_cast<size_t>(n_rows) * row_bytes + inputs + n_inputs * per_tensor;
    const size_t device =
        tokens * x_bytes + static_cast<size_t>(n_rows) * row_bytes + 2 * inputs + n_inputs * per_tensor;
    if (!reserve_batch(device, host)) {
        return false;
    }
    batch_arena_.reset();
    batch_staged_ = 0;
    batch_contexts_.push_back(make_context(4, 0));
    ggml_context * context = batch_contexts_.back().get();
    batch_x_               = ggml_new_tensor_2d(context, GGML_TYPE_F32, n_embd_, n_tokens * n_x_rows);
    batch_rows_            = ggml_new_tensor_2d(context, GGML_TYPE_F32, n_embd_, n_rows);
    if (!batch_arena_.place(port_, batch_x_) || !batch_arena_.place(port_, batch_rows_)) {
        return false;
    }
    if (!take_over(x_there, batch_x_)) {
        char * staged = stage(nullptr, tokens * x_bytes);
        if (staged == nullptr) {
            return false;
        }
        for (size_t t = 0; t < tokens; t++) {
            std::memcpy(staged + t * x_bytes, reinterpret_cast<const char *>(x) + t * x_token_bytes, x_bytes);
        }
        ggml_backend_tensor_set_async(port_.compute(), batch_x_, staged, 0, tokens * x_bytes);
    }
    char * zeros = stage(nullptr, row_bytes);
    std::memset(zeros, 0, row_bytes);
    ggml_backend_tensor_set_async(port_.compute(), batch_rows_, zeros, 0, row_bytes);
    next_row_ = round_row(1);
    return true;
}

ggml_tensor * device_compute::batch_input(ggml_context * context, ggml_type type, int64_t ne0, int64_t ne1,
                                          int64_t ne2) {
    ggml_tensor * t = ggml_new_tensor_3d(context, type, ne0, ne1, ne2);
    return batch_arena_.place(port_, t) ? t : nullptr;
}

ggml_tensor * device_compute::chunk_scale(ggml_context * context, const float * scale, const pair_list & pairs) {
    ggml_tensor * t = batch_input(context, GGML_TYPE_F32, 1, 1, pairs.size());
    if (t == nullptr) {
        return nullptr;
    }
    scale_values_.resize(pairs.experts.size());
    for (size_t i = 0; i < pairs.experts.size(); i++) {
        scale_values_[i] = scale[pairs.experts[i]];
    }
    return upload(t, scale_values_.data(), scale_values_.size() * sizeof(float)) ? t : nullptr;
}

bool device_compute::run_batch_graph(ggml_context * context, ggml_tensor * last, size_t n_nodes) {
    ggml_cgraph * graph = ggml_new_graph_custom(context, n_nodes, false);
    ggml_build_forward_expand(graph, last);
    if (batch_allocator_ == nullptr) {
        batch_allocator_.reset(ggml_gallocr_new(ggml_backend_dev_buffer_type(port_.device())));
        batch_measure_.reset(ggml_gallocr_new(ggml_backend_dev_buffer_type(port_.device())));
    }
    // Measured by an allocator of its own: measuring frees a buffer that is too small.
    size_t needed = 0;
    ggml_gallocr_reserve_n_size(batch_measure_.get(), graph, nullptr, nullptr, &needed);
    if (needed > batch_allocated_) {
        synchronize(); // the allocator frees what earlier chunks may still use
        // ggml's allocator does not always survive a failure: ask first.
        if (port_.allocate(needed) == nullptr || !ggml_gallocr_reserve(batch_allocator_.get(), graph)) {
            batch_allocator_.reset();
            batch_allocated_ = 0;
            return false;
        }
        batch_allocated_ = needed;
    }
    return ggml_gallocr_alloc_graph(batch_allocator_.get(), graph) &&
           ggml_backend_graph_compute_async(port_.compute(), graph) == GGML_STATUS_SUCCESS;
}

bool device_compute::launch_chunk(const expert_layout & layout, const slot_set & slots, const pair_list & pairs,
                                  int64_t & first_row) {
    const int64_t n = pairs.size();
    batch_contexts_.push_back(make_context(max_ffn_nodes + 24, max_chunk_nodes));
    ggml_context * context = batch_contexts_.back().get();
    ggml_tensor * tokens   = batch_input(context, GGML_TYPE_I32, n, 1, 1);
    ggml_tensor * ids      = batch_input(context, GGML_TYPE_I32, 1, n, 1);
    if (tokens == nullptr || ids == nullptr ||
        !upload(tokens, pairs.tokens.data(), pairs.tokens.size() * sizeof(int32_t)) ||
        !upload(ids, pairs.slots.data(), pairs.slots.size() * sizeof(int32_t))) {
        return false;
    }
    const float * have[] = {layout.scale_gate, layout.scale_up, layout.scale_down};
    ggml_tensor * scales[3]{};
    for (int i = 0; i < 3; i++) {
        if (have[i] != nullptr && (scales[i] = chunk_scale(context, have[i], pairs)) == nullptr) {
            return false;
        }
    }
    ggml_tensor * x = ggml_reshape_3d(context, ggml_get_rows(context, batch_x_, tokens), n_embd_, 1, n);
    ggml_tensor * rows =
        build_ffn(context, layout, tensors_of(slots, layout), x, ids, {scales[0], scales[1], scales[2]});
    // The last product writes straight to its place among the batch's rows.
    first_row = next_row_;
    char * at = static_cast<char *>(batch_rows_->data) + static_cast<size_t>(first_row) * batch_rows_->nb[1];
    if (rows->view_src != nullptr || ggml_backend_tensor_alloc(batch_rows_->buffer, rows, at) != GGML_STATUS_SUCCESS ||
        !run_batch_graph(context, rows, max_chunk_nodes)) {
        return false;
    }
    next_row_ = round_row(first_row + n);
    return true;
}

bool device_compute::end_batch_with_sum(const int32_t * pos, const float * weights, int64_t n_k) {
    const auto nodes = static_cast<size_t>(8 * n_k) + 16;
    batch_contexts_.push_back(make_context(nodes, nodes));
    ggml_context * context = batch_contexts_.back().get();
    // One row for each k, of a length that keeps the views of them aligned.
    const auto step   = static_cast<int64_t>(port_.alignment() / sizeof(float));
    const int64_t row = (n_tokens_ + step - 1) / step * step;
    row_of_.assign(static_cast<size_t>(row * n_k), 0); // row 0 is zero
    weight_of_.assign(static_cast<size_t>(row * n_k), 0.0f);
    for (int64_t k = 0; k < n_k; k++) {
        for (int64_t t = 0; t < n_tokens_; t++) {
            const auto from = static_cast<size_t>(t * n_k + k);
            const auto to   = static_cast<size_t>(k * row + t);
            row_of_[to]     = std::max(pos[from], 0);
            weight_of_[to]  = pos[from] < 0 ? 0.0f : weights[from];
        }
    }
    ggml_tensor * rows_in   = batch_input(context, GGML_TYPE_I32, row, n_k, 1);
    ggml_tensor * weight_in = batch_input(context, GGML_TYPE_F32, row, n_k, 1);
    if (rows_in == nullptr || weight_in == nullptr ||
        !upload(rows_in, row_of_.data(), row_of_.size() * sizeof(int32_t)) ||
        !upload(weight_in, weight_of_.data(), weight_of_.size() * sizeof(float))) {
        return false;
    }
    ggml_tensor * sum = nullptr;
    for (int64_t k = 0; k < n_k; k++) {
        const auto offset   = static_cast<size_t>(k * row) * sizeof(float);
        ggml_tensor * index = ggml_view_1d(context, rows_in, n_tokens_, offset);
        ggml_tensor * w     = ggml_view_2d(context, weight_in, 1, n_tokens_, sizeof(float), offset);
        ggml_tensor * part  = ggml_mul(context, ggml_get_rows(context, batch_rows_, index), w);
        sum                 = sum == nullptr ? part : ggml_add(context, sum, part);
    }
    if (!run_batch_graph(context, sum, nodes)) {
        return false;
    }
    const size_t bytes = static_cast<size_t>(n_tokens_ * n_embd_) * sizeof(float);
    batch_result_      = reinterpret_cast<float *>(stage(nullptr, bytes));
    if (batch_result_ == nullptr) {
        return false;
    }
    ggml_backend_tensor_get_async(port_.compute(), sum, batch_result_, 0, bytes);
    return true;
}

bool device_compute::end_batch_with_rows() {
    const size_t bytes = static_cast<size_t>(next_row_ * n_embd_) * sizeof(float);
    batch_result_      = reinterpret_cast<float *>(stage(nullptr, bytes));
    if (batch_result_ == nullptr) {
        return false;
    }
    ggml_backend_tensor_get_async(port_.compute(), batch_rows_, batch_result_, 0, bytes);
    return true;
}

} // namespace hybrimoe
