#include "kernel_executor.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>

namespace hybrimoe {

namespace {

// Spins before a waiting thread starts to give its processor away, about 50 microseconds: a processor that another
// program wants must not be held for the length of a phase, and yielding costs nothing when nobody wants it.
constexpr int max_spins = 1000;

uint64_t now_ns() {
    const auto past = std::chrono::steady_clock::now().time_since_epoch();
    return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(past).count());
}

void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

struct span {
    const char * begin;
    const char * end;
};

span memory_of(const ggml_tensor * t) {
    const char * data = static_cast<const char *>(t->data);
    return {data, data + ggml_nbytes(t)};
}

bool overlap(const ggml_tensor * a, const ggml_tensor * b) {
    const span left  = memory_of(a);
    const span right = memory_of(b);
    return left.begin < right.end && right.begin < left.end;
}

const kernels::kernel_set * choose_set(const settings & config) {
    if (config.kernels == cpu_kernels::best) {
        return kernels::best_kernel_set();
    }
    const kernels::kernel_set * set = kernels::find_kernel_set(config.kernel_set.c_str());
    if (set == nullptr) {
        throw std::invalid_argument("this CPU or build has no kernels for \"" + config.kernel_set + "\"");
    }
    return set;
}

} // namespace

void spin_barrier::wait(int n_threads) {
    if (n_threads == 1) {
        return;
    }
    const int generation = generation_.load(std::memory_order_relaxed);
    if (n_arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == n_threads) {
        n_arrived_.store(0, std::memory_order_relaxed);
        generation_.store(generation + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; spins++) {
        if (spins < max_spins) {
            relax();
        } else {
            std::this_thread::yield();
        }
    }
}

kernel_executor::kernel_executor(const settings & config)
    : set_(choose_set(config)), pins_(config.pin_threads), scratch_(nullptr, std::free) {
    ggml_init_params params{};
    params.mem_size = 4 * ggml_tensor_overhead();
    params.no_alloc = true;
    context_        = ggml_init(params);
    if (context_ == nullptr) {
        throw std::bad_alloc();
    }
    node_ = ggml_custom_4d(context_, GGML_TYPE_F32, 1, 1, 1, 1, nullptr, 0, callback, GGML_N_TASKS_MAX, this);
    node_->flags |= GGML_TENSOR_FLAG_COMPUTE;
    ggml_set_name(node_, "hybrimoe_experts");
    scores_node_ = ggml_custom_4d(context_, GGML_TYPE_F32, 1, 1, 1, 1, nullptr, 0, keep_scores, 1, this);
    scores_node_->flags |= GGML_TENSOR_FLAG_COMPUTE;
    ggml_set_name(scores_node_, "hybrimoe_scores");
}

kernel_executor::~kernel_executor() {
    ggml_free(context_);
}

std::optional<described_block> kernel_executor::accept(ggml_tensor ** nodes, const moe_block & block) {
    return describe(nodes, block, external_of, nullptr);
}

const kernels::external_type * kernel_executor::external_of(ggml_type type, void *) {
    static std::mutex mutex;
    static std::unordered_map<int32_t, kernels::external_type> known; // entries stay where they are
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(type);
    if (found != known.end()) {
        return &found->second;
    }
    const ggml_type_traits_cpu * traits = find_type_traits(type);
    if (traits == nullptr || traits->vec_dot == nullptr) {
        return nullptr;
    }
    const ggml_type_traits_cpu * of_input = find_type_traits(traits->vec_dot_type);
    if (of_input == nullptr || of_input->from_float == nullptr) {
        return nullptr;
    }
    kernels::external_type made{};
    made.vec_dot          = traits->vec_dot;
    made.from_float       = of_input->from_float;
    made.act_block_bytes  = ggml_type_size(traits->vec_dot_type);
    made.act_block_values = static_cast<int32_t>(ggml_blck_size(traits->vec_dot_type));
    return &known.emplace(type, made).first->second;
}

void kernel_executor::reserve(size_t n_bytes) {
    if (n_bytes <= scratch_bytes_) {
        return;
    }
    constexpr size_t alignment = 64;
    const size_t rounded       = (n_bytes + alignment - 1) / alignment * alignment;
    scratch_.reset();
    scratch_bytes_ = 0;
    scratch_.reset(static_cast<uint8_t *>(std::aligned_alloc(alignment, rounded)));
    if (scratch_ == nullptr) {
        throw std::bad_alloc();
    }
    scratch_bytes_ = rounded;
}

void kernel_executor::prepare(const kernels::moe_layer & layer, int64_t n_tokens, int32_t top_k, int n_threads) {
    layer_ = &layer;
    plan_  = kernels::make_plan(set_, layer, n_tokens, top_k, n_threads);
    reserve(plan_.scratch_bytes);
}

kernel_executor::result kernel_executor::run(cpu_executor & cpu, ggml_tensor ** nodes, const moe_block & block,
                                             const described_block & described, int n_threads, block_share * share) {
    block_     = &block;
    described_ = &described;
    share_     = share;
    prepare(described.layer, block.n_tokens(), static_cast<int32_t>(block.top_k()), n_threads);
    const size_t n_pairs = static_cast<size_t>(block.n_tokens() * block.top_k());
    ids_.resize(n_pairs);
    weights_.resize(n_pairs);

    const ggml_tensor * x  = described.x;
    ggml_tensor * y        = described.y;
    batch_                 = {};
    batch_.n_tokens        = block.n_tokens();
    batch_.top_k           = static_cast<int32_t>(block.top_k());
    batch_.x               = static_cast<const float *>(x->data);
    batch_.x_token_bytes   = x->nb[2];
    batch_.x_is_weighted   = described.layer.weights_on_input;
    batch_.ids             = ids_.data();
    batch_.weights         = weights_.data();
    batch_.ids_token_bytes = batch_.weights_token_bytes = static_cast<size_t>(block.top_k()) * sizeof(float);
    batch_.y                                            = static_cast<float *>(y->data);
    batch_.y_token_bytes                                = described.y_token_bytes;
    // With a share, x is wanted after the block's first pass over y: for pairs that come back, and by devices.
    const bool y_apart = overlap(x, y);
    if (y_apart) {
        y_copy_.resize(static_cast<size_t>(ggml_nelements(y)));
        batch_.y             = y_copy_.data();
        batch_.y_token_bytes = static_cast<size_t>(y->ne[0]) * sizeof(float);
    }

    graph_.assign(nodes + block.begin, nodes + block.experts);
    scores_at_ = {};
    if (share != nullptr && share->wants_scores()) {
        scores_at_ = find_scores(nodes, block);
        if (scores_at_.tensor != nullptr) {
            graph_.insert(graph_.begin() + (scores_at_.node - block.begin) + 1, scores_node_);
        }
    }
    graph_.push_back(node_);
    result out;
    const uint64_t start = now_ns();
    experts_start_ns_    = start; // stays so when an abort callback ends the graph before our node
    out.status           = cpu.run(graph_.data(), static_cast<int>(graph_.size()), n_threads);
    const uint64_t end   = now_ns();
    out.router_ns        = experts_start_ns_ - start;
    out.experts_ns       = end - experts_start_ns_;
    out.begin_ns         = start;
    return out;
}

void kernel_executor::store_result() {
    ggml_tensor * y = described_->y;
    if (batch_.y == y->data) {
        return;
    }
    for (int64_t token = 0; token < batch_.n_tokens; token++) {
        std::memcpy(static_cast<char *>(y->data) + static_cast<size_t>(token) * described_->y_token_bytes,
                    reinterpret_cast<char *>(batch_.y) + static_cast<size_t>(token) * batch_.y_token_bytes,
                    static_cast<size_t>(y->ne[0]) * sizeof(float));
    }
}

ggml_status kernel_executor::run_rest(cpu_executor & cpu, const uint8_t * pairs, int n_threads) {
    block_            = nullptr;
    batch_.take       = pairs;
    batch_.accumulate = true;
    return cpu.run(&node_, 1, n_threads);
}

ggml_status kernel_executor::run_experts(cpu_executor & cpu, const kernels::moe_layer & layer,
                                         const kernels::moe_batch & batch, int n_threads) {
    prepare(layer, batch.n_tokens, batch.top_k, n_threads);
    block_ = nullptr;
    batch_ = batch;
    return cpu.run(&node_, 1, n_threads);
}

void kernel_executor::callback(ggml_tensor *, int thread, int n_threads, void * self) {
    auto * me = static_cast<kernel_executor *>(self);
    me->pins_.apply(thread);
    me->work(thread, n_threads);
}

// ggml may place the block's output over the router's results, which are dead by then in its own order: copy them
// first.
void kernel_executor::take_inputs() {
    const size_t n_tokens = static_cast<size_t>(block_->n_tokens());
    const size_t row      = static_cast<size_t>(block_->top_k()) * sizeof(float);
    const auto * ids      = static_cast<const char *>(block_->ids->data);
    for (size_t token = 0; token < n_tokens; token++) {
        std::memcpy(reinterpret_cast<char *>(ids_.data()) + token * row, ids + token * block_->ids->nb[1], row);
        described_->take_weights(static_cast<int64_t>(token), batch_.top_k,
                                 weights_.data() + token * static_cast<size_t>(batch_.top_k));
    }
}

void kernel_executor::keep_scores(ggml_tensor *, int thread, int, void * self) {
    auto * me = static_cast<kernel_executor *>(self);
    if (thread == 0) {
        take_scores(me->scores_at_, me->scores_);
    }
}

// Only thread 0 decides; what it decided is read by all after the barrier.
void kernel_executor::share_out(int thread, int n_threads) {
    share_->look_ahead(thread, n_threads);
    barrier_.wait(n_threads);
    if (thread == 0) {
        batch_.take =
            share_->route(ids_.data(), weights_.data(), scores_at_.tensor == nullptr ? nullptr : scores_.data());
    }
}

void kernel_executor::work(int thread, int n_threads) {
    struct meeting {
        spin_barrier * barrier;
        int n_threads;
    } here{&barrier_, n_threads};

    if (block_ != nullptr) {
        if (thread == 0) {
            experts_start_ns_ = now_ns();
            take_inputs();
        }
        if (share_ != nullptr) {
            share_out(thread, n_threads);
        }
    }
    barrier_.wait(n_threads);
    kernels::team team;
    team.index   = thread;
    team.count   = n_threads;
    team.ctx     = &here;
    team.barrier = [](void * context) {
        auto * met = static_cast<meeting *>(context);
        met->barrier->wait(met->n_threads);
    };
    kernels::moe_forward(plan_, *layer_, batch_, scratch_.get(), team);
}

} // namespace hybrimoe
