#include "cpu_probe.h"

#include "random_weights.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>

namespace hybrimoe::probe {

namespace {

constexpr int max_tokens          = 4096;
constexpr size_t alignment        = 64;
constexpr int max_n_experts       = 1024;
constexpr size_t least_read_bytes = size_t{1} << 18; // of a thread

kernels::expert_matrix matrix_of(const std::vector<uint8_t> & data, int32_t type, int64_t n_in, int64_t n_out) {
    kernels::expert_matrix m;
    m.data         = data.data();
    m.type         = type;
    m.row_bytes    = ggml_row_size(static_cast<ggml_type>(type), n_in);
    m.expert_bytes = m.row_bytes * static_cast<size_t>(n_out);
    return m;
}

} // namespace

double now_us() {
    const auto past = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double, std::micro>(past).count();
}

cpu_probe::cpu_probe(const hybrimoe_ffn_shape & shape) {
    if (shape.n_experts < 1 || shape.n_experts > max_n_experts || shape.n_ff < 1 || shape.n_embd < 1) {
        throw std::invalid_argument("the shape of an expert to probe is out of range");
    }
    const auto gate_type = static_cast<ggml_type>(shape.gate_type);
    const auto down_type = static_cast<ggml_type>(shape.down_type);
    if (kernels::find_type(gate_type) == nullptr || kernels::find_type(down_type) == nullptr) {
        throw std::invalid_argument(std::string("there are no kernels of our own for ") + ggml_type_name(gate_type) +
                                    " and " + ggml_type_name(down_type));
    }
    gate_           = random_rows(gate_type, shape.n_embd, shape.n_ff * shape.n_experts);
    up_             = gate_;
    down_           = random_rows(down_type, shape.n_ff, shape.n_embd * shape.n_experts);
    layer_.n_embd   = shape.n_embd;
    layer_.n_ff     = shape.n_ff;
    layer_.n_expert = shape.n_experts;
    layer_.op       = static_cast<kernels::ffn_op>(shape.op);
    layer_.alpha    = 1.702f;
    layer_.limit    = 7.0f;
    layer_.gate     = matrix_of(gate_, shape.gate_type, shape.n_embd, shape.n_ff);
    layer_.up       = matrix_of(up_, shape.gate_type, shape.n_embd, shape.n_ff);
    layer_.down     = matrix_of(down_, shape.down_type, shape.n_ff, shape.n_embd);
    if (const char * problem = kernels::check_layer(layer_)) {
        throw std::invalid_argument(problem);
    }
    ggml_init_params params{};
    params.mem_size = 2 * ggml_tensor_overhead();
    params.no_alloc = true;
    context_        = ggml_init(params);
    if (context_ == nullptr) {
        throw std::bad_alloc();
    }
    node_ = ggml_custom_4d(context_, GGML_TYPE_F32, 1, 1, 1, 1, nullptr, 0, callback, GGML_N_TASKS_MAX, this);
    node_->flags |= GGML_TENSOR_FLAG_COMPUTE;
}

cpu_probe::~cpu_probe() {
    ggml_free(context_);
}

void cpu_probe::callback(ggml_tensor *, int thread, int n_threads, void * self) {
    static_cast<cpu_probe *>(self)->work(thread, n_threads);
}

void cpu_probe::work(int thread, int n_threads) {
    struct meeting {
        spin_barrier * barrier;
        int n_threads;
    } here{&barrier_, n_threads};
    kernels::team team;
    team.index   = thread;
    team.count   = n_threads;
    team.ctx     = &here;
    team.barrier = [](void * context) {
        auto * met = static_cast<meeting *>(context);
        met->barrier->wait(met->n_threads);
    };
    barrier_.wait(n_threads);
    void * scratch = scratch_.data();
    size_t room    = scratch_.size();
    std::align(alignment, plan_.scratch_bytes, scratch, room);
    kernels::moe_forward(plan_, layer_, batch_, scratch, team);
}

void cpu_probe::run(int n_active, int n_tokens, int n_threads, int n_runs, double * us) {
    if (n_active < 0 || n_active > layer_.n_expert || n_tokens < 1 || n_tokens > max_tokens || n_threads < 1 ||
        n_runs < 1) {
        throw std::invalid_argument("the batch to probe is out of range");
    }
    const int top_k = std::max(n_active, 1);
    const auto n    = static_cast<size_t>(n_tokens);
    plan_           = kernels::make_plan(kernels::best_kernel_set(), layer_, n_tokens, top_k, n_threads);
    scratch_.resize(plan_.scratch_bytes + alignment);
    if (x_.size() < n * static_cast<size_t>(layer_.n_embd)) {
        x_ = random_values(n * static_cast<size_t>(layer_.n_embd), 1.0f);
        y_.resize(x_.size());
    }
    ids_.assign(n * static_cast<size_t>(top_k), -1);
    weights_.assign(ids_.size(), 1.0f / static_cast<float>(top_k));
    batch_               = {};
    batch_.n_tokens      = n_tokens;
    batch_.top_k         = top_k;
    batch_.x             = x_.data();
    batch_.y             = y_.data();
    batch_.x_token_bytes = batch_.y_token_bytes = static_cast<size_t>(layer_.n_embd) * sizeof(float);
    batch_.ids                                  = ids_.data();
    batch_.weights                              = weights_.data();
    batch_.ids_token_bytes = batch_.weights_token_bytes = static_cast<size_t>(top_k) * sizeof(float);
    for (int i = 0; i < n_runs; ++i) {
        for (int a = 0; a < n_active; ++a, next_expert_ = (next_expert_ + 1) % layer_.n_expert) {
            for (size_t t = 0; t < n; ++t) {
                ids_[t * static_cast<size_t>(top_k) + static_cast<size_t>(a)] = next_expert_;
            }
        }
        const double start = now_us();
        if (cpu_.run(&node_, 1, n_threads) != GGML_STATUS_SUCCESS) {
            throw std::runtime_error("ggml's CPU backend could not compute");
        }
        us[i] = now_us() - start;
    }
}

void cpu_probe::run_nodes(int n_nodes, int n_threads, int n_runs, double * us) {
    if (n_nodes < 1 || n_nodes > max_tokens || n_threads < 1 || n_runs < 1) {
        throw std::invalid_argument("the nodes to probe are out of range");
    }
    const auto n_embd = static_cast<size_t>(layer_.n_embd);
    ggml_init_params params{};
    params.mem_size = static_cast<size_t>(n_nodes + 1) * (ggml_tensor_overhead() + n_embd * sizeof(float) + alignment);
    const std::unique_ptr<ggml_context, void (*)(ggml_context *)> tensors(ggml_init(params), ggml_free);
    if (tensors == nullptr) {
        throw std::bad_alloc();
    }
    ggml_tensor * last = ggml_new_tensor_1d(tensors.get(), GGML_TYPE_F32, layer_.n_embd);
    std::fill_n(static_cast<float *>(last->data), n_embd, 1.0f);
    std::vector<ggml_tensor *> nodes;
    for (int i = 0; i < n_nodes; ++i) {
        // Norms and sums alternate, as they do between the matrix products of a layer.
        last = i % 2 == 0 ? ggml_rms_norm(tensors.get(), last, 1e-5f) : ggml_add(tensors.get(), last, last);
        last->flags |= GGML_TENSOR_FLAG_COMPUTE;
        nodes.push_back(last);
    }
    for (int i = 0; i < n_runs; ++i) {
        const double start = now_us();
        if (cpu_.run(nodes.data(), n_nodes, n_threads) != GGML_STATUS_SUCCESS) {
            throw std::runtime_error("ggml's CPU backend could not compute");
        }
        us[i] = now_us() - start;
    }
}

void cpu_probe::run_dense(int n_experts, int n_threads, int n_runs, double * us) {
    if (n_experts < 1 || n_experts > layer_.n_expert || n_threads < 1 || n_runs < 1) {
        throw std::invalid_argument("the dense product to probe is out of range");
    }
    const int64_t n_out = layer_.n_ff * n_experts;
    // ggml's backends plan their work memory themselves; only x and y are ours.
    ggml_init_params params{};
    params.mem_size = 8 * ggml_tensor_overhead() + static_cast<size_t>(layer_.n_embd + n_out) * sizeof(float) + 1024;
    const std::unique_ptr<ggml_context, void (*)(ggml_context *)> tensors(ggml_init(params), ggml_free);
    if (tensors == nullptr) {
        throw std::bad_alloc();
    }
    ggml_tensor * x = ggml_new_tensor_1d(tensors.get(), GGML_TYPE_F32, layer_.n_embd);
    std::fill_n(static_cast<float *>(x->data), static_cast<size_t>(layer_.n_embd), 0.5f);
    ggml_set_no_alloc(tensors.get(), true);
    const auto type = static_cast<ggml_type>(layer_.gate.type);
    ggml_tensor * w = ggml_new_tensor_2d(tensors.get(), type, layer_.n_embd, n_out);
    ggml_set_no_alloc(tensors.get(), false);
    w->data         = gate_.data();
    ggml_tensor * y = ggml_mul_mat(tensors.get(), w, x);
    y->flags |= GGML_TENSOR_FLAG_COMPUTE;
    int first = 0;
    for (int i = 0; i < n_runs; ++i) {
        w->data            = gate_.data() + static_cast<size_t>(first) * layer_.gate.expert_bytes;
        first              = first + 2 * n_experts <= layer_.n_expert ? first + n_experts : 0;
        const double start = now_us();
        if (cpu_.run(&y, 1, n_threads) != GGML_STATUS_SUCCESS) {
            throw std::runtime_error("ggml's CPU backend could not compute");
        }
        us[i] = now_us() - start;
    }
}

struct reader_team::threads {
    std::vector<std::thread> all;
    std::atomic<int> state{0}; // 0 wait, 1 read, 2 leave
    std::atomic<uint64_t> n_bytes{0};
    std::atomic<uint64_t> sum{0}; // keeps the reads alive
};

reader_team::reader_team(int n_threads, size_t n_bytes)
    : n_threads_(n_threads),
      memory_(std::max(n_bytes, static_cast<size_t>(n_threads) * least_read_bytes) / sizeof(uint64_t), 1),
      threads_(new threads) {
    const size_t slice = memory_.size() / static_cast<size_t>(n_threads);
    for (int i = 0; i < n_threads; ++i) {
        const uint64_t * begin = memory_.data() + static_cast<size_t>(i) * slice;
        threads_->all.emplace_back([this, begin, slice]() {
            // Several streams a thread: some cores leave a third of the bandwidth unused with one.
            constexpr size_t n_streams = 4, line = 8, chunk = 512 * line; // words
            const size_t stream = slice / n_streams / chunk * chunk;
            while (threads_->state.load(std::memory_order_acquire) == 0) {
                std::this_thread::yield();
            }
            for (size_t at = 0; threads_->state.load(std::memory_order_relaxed) == 1;
                 at        = at + chunk < stream ? at + chunk : 0) {
                uint64_t sum = 0;
                for (size_t k = at; k < at + chunk; k += line) {
                    for (size_t s = 0; s < n_streams; ++s) {
                        const uint64_t * words = begin + s * stream + k;
#if defined(__GNUC__)
                        __builtin_prefetch(words + 32 * line);
#endif
                        for (size_t w = 0; w < line; ++w) {
                            sum += words[w];
                        }
                    }
                }
                threads_->sum.fetch_add(sum, std::memory_order_relaxed);
                threads_->n_bytes.fetch_add(n_streams * chunk * sizeof(uint64_t), std::memory_order_relaxed);
            }
        });
    }
}

reader_team::~reader_team() {
    threads_->state.store(2, std::memory_order_release);
    for (std::thread & thread : threads_->all) {
        thread.join();
    }
}

double reader_team::begin() {
    threads_->state.store(1, std::memory_order_release);
    return now_us();
}

double reader_team::end(double start_us) {
    const double passed = now_us() - start_us;
    const auto read     = static_cast<double>(threads_->n_bytes.load());
    threads_->state.store(2, std::memory_order_release);
    return passed > 0.0 ? read / passed : 0.0;
}

} // namespace hybrimoe::probe
