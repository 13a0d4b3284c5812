#include "device_probe.h"

#include "cpu_probe.h"
#include "random_weights.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace hybrimoe::probe {

namespace {

constexpr size_t most_copy_bytes = size_t{64} << 20;

struct tensor_context {
    explicit tensor_context(int n_tensors) {
        ggml_init_params params{};
        params.mem_size = static_cast<size_t>(n_tensors) * ggml_tensor_overhead() + ggml_graph_overhead();
        params.no_alloc = true;
        context         = ggml_init(params);
        if (context == nullptr) {
            throw std::bad_alloc();
        }
    }
    ~tensor_context() { ggml_free(context); }
    tensor_context(const tensor_context &)             = delete;
    tensor_context & operator=(const tensor_context &) = delete;

    ggml_context * context = nullptr;
};

} // namespace

// One batch's graph, on the device once and for all.
struct device_probe::graph {
    graph() : tensors(16) {}
    ~graph() { ggml_gallocr_free(allocator); }
    graph(const graph &)             = delete;
    graph & operator=(const graph &) = delete;

    tensor_context tensors;
    ggml_gallocr_t allocator = nullptr;
    ggml_cgraph * nodes      = nullptr;
    ggml_tensor *x = nullptr, *ids = nullptr, *rows = nullptr;
};

device_probe::device_probe(int device, const hybrimoe_ffn_shape & shape) : shape_(shape) {
    if (device < 0 || static_cast<size_t>(device) >= ggml_backend_dev_count()) {
        throw std::invalid_argument("ggml has no device " + std::to_string(device));
    }
    if (shape.n_experts < 1 || shape.n_ff < 1 || shape.n_embd < 1) {
        throw std::invalid_argument("the shape of an expert to probe is out of range");
    }
    device_  = ggml_backend_dev_get(static_cast<size_t>(device));
    compute_ = ggml_backend_dev_init(device_, nullptr);
    copies_  = compute_ == nullptr ? nullptr : ggml_backend_dev_init(device_, nullptr);
    if (copies_ == nullptr) {
        ggml_backend_free(compute_);
        throw std::runtime_error(std::string("the device ") + ggml_backend_dev_name(device_) + " cannot be started");
    }
    try {
        ggml_init_params params{};
        params.mem_size = 8 * ggml_tensor_overhead();
        params.no_alloc = true;
        context_        = ggml_init(params);
        gate_           = slot_tensor(static_cast<ggml_type>(shape.gate_type), shape.n_embd, shape.n_ff);
        up_             = slot_tensor(static_cast<ggml_type>(shape.gate_type), shape.n_embd, shape.n_ff);
        down_           = slot_tensor(static_cast<ggml_type>(shape.down_type), shape.n_ff, shape.n_embd);
        slots_          = ggml_backend_alloc_ctx_tensors_from_buft(context_, ggml_backend_dev_buffer_type(device_));
        if (slots_ == nullptr) {
            throw std::runtime_error(std::string("the device ") + ggml_backend_dev_name(device_) +
                                     " has too little memory for the experts to probe");
        }
        fill(gate_);
        fill(up_);
        fill(down_);
        n_copy_bytes_                     = std::min(ggml_nbytes(gate_), most_copy_bytes);
        ggml_backend_buffer_type_t pinned = ggml_backend_dev_host_buffer_type(device_);
        pinned_ = pinned == nullptr ? nullptr : ggml_backend_buft_alloc_buffer(pinned, n_copy_bytes_);
        pageable_.assign(n_copy_bytes_, 1);
    } catch (...) {
        ggml_backend_buffer_free(slots_);
        ggml_free(context_);
        ggml_backend_free(copies_);
        ggml_backend_free(compute_);
        throw;
    }
}

device_probe::~device_probe() {
    ggml_backend_buffer_free(pinned_);
    ggml_backend_buffer_free(slots_);
    ggml_free(context_);
    ggml_backend_free(copies_);
    ggml_backend_free(compute_);
}

ggml_tensor * device_probe::slot_tensor(ggml_type type, int64_t n_in, int64_t n_out) {
    if (type < 0 || type >= GGML_TYPE_COUNT || ggml_blck_size(type) <= 0 || n_in % ggml_blck_size(type) != 0) {
        throw std::invalid_argument("the shape of an expert to probe does not fit its type");
    }
    return ggml_new_tensor_3d(context_, type, n_in, n_out, shape_.n_experts);
}

void device_probe::fill(ggml_tensor * tensor) {
    const auto rows = random_rows(tensor->type, tensor->ne[0], tensor->ne[1]);
    ggml_backend_buffer_clear(tensor->buffer, 0); // padding of rows must not hold NaN
    for (int64_t e = 0; e < tensor->ne[2]; ++e) {
        ggml_backend_tensor_set(tensor, rows.data(), static_cast<size_t>(e) * tensor->nb[2], rows.size());
    }
}

bool device_probe::has(int kind) const {
    return kind == HYBRIMOE_H2D_PAGEABLE || pinned_ != nullptr;
}

void device_probe::copy(int kind, size_t n_bytes, int n_runs, double * us) {
    if (kind < HYBRIMOE_H2D_PINNED || kind > HYBRIMOE_D2H_PINNED || !has(kind) || n_bytes == 0 ||
        n_bytes > n_copy_bytes_ || n_runs < 1) {
        throw std::invalid_argument("the copy to probe is out of range");
    }
    void * host = kind == HYBRIMOE_H2D_PAGEABLE ? pageable_.data() : ggml_backend_buffer_get_base(pinned_);
    ggml_backend_synchronize(copies_);
    for (int i = 0; i < n_runs; ++i) {
        const double start = now_us();
        if (kind == HYBRIMOE_D2H_PINNED) {
            ggml_backend_tensor_get_async(copies_, gate_, host, 0, n_bytes);
        } else {
            ggml_backend_tensor_set_async(copies_, gate_, host, 0, n_bytes);
        }
        ggml_backend_synchronize(copies_);
        us[i] = now_us() - start;
    }
}

std::unique_ptr<device_probe::graph> device_probe::make_graph(int n_active, int n_tokens) {
    auto made             = std::make_unique<graph>();
    ggml_context * c      = made->tensors.context;
    const int64_t n_pairs = static_cast<int64_t>(n_active) * n_tokens;
    // Few pairs of one token keep the vector kernels; ragged batches are pairs of their own.
    const bool one_token = n_tokens == 1;
    made->x              = ggml_new_tensor_3d(c, GGML_TYPE_F32, shape_.n_embd, 1, one_token ? 1 : n_pairs);
    made->ids            = ggml_new_tensor_2d(c, GGML_TYPE_I32, one_token ? n_pairs : 1, one_token ? 1 : n_pairs);
    ggml_set_input(made->x);
    ggml_set_input(made->ids);
    ggml_tensor * g = ggml_mul_mat_id(c, gate_, made->x, made->ids);
    ggml_tensor * u = ggml_mul_mat_id(c, up_, made->x, made->ids);
    ggml_tensor * h = shape_.op == GGML_GLU_OP_SWIGLU_OAI
                          ? ggml_swiglu_oai(c, g, u, 1.702f, 7.0f)
                          : ggml_glu_split(c, g, u, static_cast<ggml_glu_op>(shape_.op));
    made->rows      = ggml_mul_mat_id(c, down_, h, made->ids);
    ggml_set_output(made->rows);
    made->nodes = ggml_new_graph(c);
    ggml_build_forward_expand(made->nodes, made->rows);
    for (int i = 0; i < ggml_graph_n_nodes(made->nodes); ++i) {
        if (!ggml_backend_dev_supports_op(device_, ggml_graph_node(made->nodes, i))) {
            throw std::runtime_error(std::string("the device ") + ggml_backend_dev_name(device_) + " lacks " +
                                     ggml_op_name(ggml_graph_node(made->nodes, i)->op) + " for these experts");
        }
    }
    made->allocator = ggml_gallocr_new(ggml_backend_dev_buffer_type(device_));
    if (!ggml_gallocr_alloc_graph(made->allocator, made->nodes)) {
        throw std::runtime_error("the device has too little memory for the batch to probe");
    }
    return made;
}

void device_probe::run(int n_active, int n_tokens, int n_runs, double * us) {
    if (n_active < 1 || n_active > shape_.n_experts || n_tokens < 1 || n_runs < 1) {
        throw std::invalid_argument("the batch to probe is out of range");
    }
    const auto work = make_graph(n_active, n_tokens);
    const auto x    = random_values(static_cast<size_t>(ggml_nelements(work->x)), 1.0f);
    std::vector<float> rows(static_cast<size_t>(ggml_nelements(work->rows)));
    std::vector<int32_t> ids(static_cast<size_t>(ggml_nelements(work->ids)));
    for (int i = 0; i < n_runs; ++i) {
        for (size_t p = 0; p < ids.size(); ++p) {
            ids[p] = static_cast<int32_t>((static_cast<size_t>(next_slot_) + p / static_cast<size_t>(n_tokens)) %
                                          static_cast<size_t>(shape_.n_experts));
        }
        next_slot_         = (next_slot_ + n_active) % shape_.n_experts;
        const double start = now_us();
        ggml_backend_tensor_set_async(compute_, work->x, x.data(), 0, ggml_nbytes(work->x));
        ggml_backend_tensor_set_async(compute_, work->ids, ids.data(), 0, ggml_nbytes(work->ids));
        if (ggml_backend_graph_compute_async(compute_, work->nodes) != GGML_STATUS_SUCCESS) {
            throw std::runtime_error(std::string("the device ") + ggml_backend_dev_name(device_) +
                                     " could not compute");
        }
        ggml_backend_tensor_get_async(compute_, work->rows, rows.data(), 0, ggml_nbytes(work->rows));
        ggml_backend_synchronize(compute_);
        us[i] = now_us() - start;
    }
}

void device_probe::sync(int n_runs, double * us) {
    tensor_context tensors(4);
    ggml_tensor * x = ggml_new_tensor_1d(tensors.context, GGML_TYPE_F32, 32);
    ggml_tensor * y = ggml_add(tensors.context, x, x);
    ggml_backend_buffer_t room =
        ggml_backend_alloc_ctx_tensors_from_buft(tensors.context, ggml_backend_dev_buffer_type(device_));
    if (room == nullptr) {
        throw std::runtime_error("the device has no memory left");
    }
    ggml_cgraph * nodes = ggml_new_graph(tensors.context);
    ggml_build_forward_expand(nodes, y);
    bool ok = true;
    for (int i = 0; i < n_runs && ok; ++i) {
        const double start = now_us();
        ok                 = ggml_backend_graph_compute_async(compute_, nodes) == GGML_STATUS_SUCCESS;
        ggml_backend_synchronize(compute_);
        us[i] = now_us() - start;
    }
    ggml_backend_buffer_free(room);
    if (!ok) {
        throw std::runtime_error(std::string("the device ") + ggml_backend_dev_name(device_) + " could not compute");
    }
}

double device_probe::together(int n_threads, size_t n_bytes, double seconds, double * copied) {
    if (n_threads < 1 || n_bytes < (1 << 20) || !(seconds > 0.0) || seconds > 60.0) {
        throw std::invalid_argument("the reads to probe are out of range");
    }
    void * host = pinned_ == nullptr ? pageable_.data() : ggml_backend_buffer_get_base(pinned_);
    reader_team team(n_threads, n_bytes);
    double n_copied    = 0.0;
    const double start = now_us();
    const double rate  = team.run(seconds, [&]() {
        ggml_backend_tensor_set_async(copies_, gate_, host, 0, n_copy_bytes_);
        ggml_backend_synchronize(copies_);
        n_copied += static_cast<double>(n_copy_bytes_);
    });
    *copied            = n_copied / (now_us() - start);
    return rate;
}

} // namespace hybrimoe::probe
