// CPU expert kernels: the mixture-of-experts feed-forward of one layer in one parallel region.
//
// Knows no ggml: tensors are pointers, strides and a type number (equal to ggml_type). Weights stay in their
// standard layout, memory-mapped; nothing is repacked ahead of time. Thread-safe as long as every concurrent
// moe_forward has its own scratch.
//
// Use:
//   const kernel_set * ks   = best_kernel_set();               // or find_kernel_set("avx2")
//   moe_plan           plan = make_plan(ks, layer, max_tokens, top_k, n_threads);
//   ... allocate plan.scratch_bytes once, 64-byte aligned ...
//   every thread of a team: moe_forward(plan, layer, batch, scratch, team);
#pragma once

#include <cstddef>
#include <cstdint>

namespace hybrimoe::kernels {

// ---------------------------------------------------------------------------------------------------------------
// types

// Numbers as in ggml_type; any other number is a type the library does not know.
enum type_id : int32_t {
    type_f32    = 0,
    type_f16    = 1,
    type_q4_0   = 2,
    type_q4_1   = 3,
    type_q8_0   = 8,
    type_q4_k   = 12,
    type_q5_k   = 13,
    type_q6_k   = 14,
    type_iq4_nl = 20,
    type_iq4_xs = 23,
    type_bf16   = 30,
    type_mxfp4  = 39,
};

// How activations are stored while they meet a weight type.
enum class act_format : uint8_t {
    q8_32,    // int8, one scale per 32 values; rounding of ggml's Q8_0
    q8_256,   // int8, one scale per 256 values; rounding of ggml's Q8_K
    f32,      // unchanged
    external, // written by external_type::from_float
};

struct type_info {
    int32_t id;
    const char * name;    // as ggml prints it, e.g. "q4_K"
    int32_t block_values; // a row holds a multiple of this
    int32_t block_bytes;
    act_format act;
};

// nullptr when the library has no kernel of its own for this type (use external_type then).
const type_info * find_type(int32_t type);

// Dequantise n_values values (a multiple of block_values). The scalar reference of every kernel.
void dequantize_row(int32_t type, const void * row, float * out, int64_t n_values);

// Any other type, through somebody else's dot product (ggml_get_type_traits_cpu()). All members required.
struct external_type {
    // ggml_vec_dot_t: n values of one weight row times one activation row
    void (*vec_dot)(int n, float * s, size_t bs, const void * w, size_t bw, const void * x, size_t bx, int nrc);
    // ggml_from_float_t of vec_dot_type
    void (*from_float)(const float * x, void * y, int64_t n);
    size_t act_block_bytes; // of vec_dot_type
    int32_t act_block_values;
};

// ---------------------------------------------------------------------------------------------------------------
// kernel sets: one per instruction set, chosen at run time

struct kernel_set;

const kernel_set * best_kernel_set();
// "avx512", "avxvnni", "avx2", "scalar"; nullptr when unknown or when this CPU or this build lacks it.
const kernel_set * find_kernel_set(const char * name);
const char * kernel_set_name(const kernel_set * ks);
// Names this CPU and this build can run, fastest first, nullptr-terminated.
const char * const * available_kernel_sets();

// How many rows of weights a thread reads at once while it waits for memory: 1, or more than 1. Cores of Intel keep
// more cache lines in flight when several pages are read at once (one stream 20 GB/s, four 27 GB/s with two threads of
// family 6, model 167); on Zen 5 a second stream costs throughput, so there, and on unknown cores, it is one.
int default_streams();

// ---------------------------------------------------------------------------------------------------------------
// one layer

// Expert weights [n_in, n_out, n_expert]: expert e, output row r starts at data + e * expert_bytes + r * row_bytes.
// Result of a row: (w . x) * scale[e] + bias[e][r].
struct expert_matrix {
    const void * data              = nullptr;
    int32_t type                   = -1;
    size_t row_bytes               = 0;
    size_t expert_bytes            = 0;
    const float * bias             = nullptr; // optional, [n_out, n_expert]
    size_t bias_bytes              = 0;       // bytes from one expert's biases to the next one's
    const float * scale            = nullptr; // optional, [n_expert]
    const external_type * external = nullptr; // required where find_type(type) is nullptr, else ignored
};

// The first seven equal ggml_glu_op. Gated ops take gate (g) and up (u); ungated ops take up only.
enum class ffn_op : int32_t {
    reglu        = 0, // max(g, 0) u
    geglu        = 1, // gelu(g) u, tanh form
    swiglu       = 2, // silu(g) u
    swiglu_oai   = 3, // min(g, limit) sigmoid(alpha min(g, limit)) (clamp(u, limit) + 1)
    geglu_erf    = 4,
    geglu_quick  = 5,  // g sigmoid(1.702 g) u
    swiglu_clamp = 6,  // silu(min(g, limit)) clamp(u, limit)
    swiglu_limit = 32, // min(silu(g), limit) clamp(u, limit): the unfused clamp of llama.cpp's graphs
    situ         = 33, // alpha tanh(g / alpha) sigmoid(g) * (limit > 0 ? limit tanh(u / limit) : u)
    silu         = 64, // ungated from here on
    gelu         = 65,
    gelu_erf     = 66,
    gelu_quick   = 67,
    relu         = 68,
    relu_sqr     = 69,
};

constexpr bool is_gated(ffn_op op) {
    return static_cast<int32_t>(op) < 64;
}

struct moe_layer {
    int64_t n_embd   = 0; // input and output width
    int64_t n_ff     = 0; // hidden width of one expert
    int32_t n_expert = 0;

    expert_matrix gate; // [n_embd, n_ff, n_expert]; data is nullptr for ungated ops
    expert_matrix up;   // [n_embd, n_ff, n_expert]
    expert_matrix down; // [n_ff, n_embd, n_expert]

    ffn_op op   = ffn_op::swiglu;
    float alpha = 0.0f;
    float limit = 0.0f;

    bool weights_on_input = false; // router weights multiply x instead of the experts' outputs (llama4)
};

// Merged gate_up tensors [n_embd, 2 n_ff, n_expert], gate rows first: both halves share strides, scale and type.
void split_gate_up(const expert_matrix & gate_up, int64_t n_ff, expert_matrix * gate, expert_matrix * up);

// nullptr when moe_forward can run this layer, else one English sentence saying why not.
const char * check_layer(const moe_layer & layer);

// ---------------------------------------------------------------------------------------------------------------
// one call

struct moe_batch {
    int64_t n_tokens = 0;
    int32_t top_k    = 0;

    const float * x      = nullptr; // [n_embd, n_tokens]
    size_t x_token_bytes = 0;
    // With weights_on_input: x is [n_embd, top_k, n_tokens], a token's rows contiguous and already weighted.
    bool x_is_weighted = false;

    const int32_t * ids    = nullptr; // [top_k, n_tokens]; out of range means: skip this pair
    size_t ids_token_bytes = 0;

    const float * weights      = nullptr; // [top_k, n_tokens]
    size_t weights_token_bytes = 0;

    const uint8_t * take = nullptr; // optional [top_k, n_tokens] contiguous: compute a pair only where non-zero

    float * y            = nullptr; // [n_embd, n_tokens]; the sum over the computed pairs, k ascending
    size_t y_token_bytes = 0;
    bool accumulate      = false; // add to y; otherwise tokens without a computed pair become zero
};

struct moe_plan {
    const kernel_set * kernels = nullptr;
    int64_t max_tokens         = 0;
    int32_t top_k              = 0;
    int32_t n_threads          = 0; // at most; a team may be smaller
    int64_t chunk_tokens       = 0; // tokens per pass, so that scratch stays below the limit
    size_t scratch_bytes       = 0;
    int n_streams              = 1; // make_plan: default_streams(); results do not depend on it
};

constexpr size_t default_scratch_limit_bytes = size_t{40} << 20;

// Scratch for up to max_tokens at once. Where the whole batch would need more than limit_bytes, moe_forward works
// through it in passes of chunk_tokens (at least 32 tokens a pass, whatever the limit).
moe_plan make_plan(const kernel_set * ks, const moe_layer & layer, int64_t max_tokens, int32_t top_k, int32_t n_threads,
                   size_t limit_bytes = default_scratch_limit_bytes);

struct team {
    int32_t index               = 0;
    int32_t count               = 1;
    void (*barrier)(void * ctx) = nullptr; // all threads of the team, full memory fence; may be nullptr if count is 1
    void * ctx                  = nullptr;
};

// Called by every thread of the team with equal arguments but team.index. Returns when y is complete (it ends with a
// barrier). Allocates nothing. Results are bitwise independent of team.count and of the order of work.
// The scratch needs no initialisation and may be shared by all layers with the largest plan.
// y may overlap x where the batch fits one pass (n_tokens <= plan.chunk_tokens): all of x is read before y is written.
// It may overlap nothing else: weights are read to the end.
void moe_forward(const moe_plan & plan, const moe_layer & layer, const moe_batch & batch, void * scratch,
                 const team & team);

// Rows [row_begin, row_end) of logits = w x for one float-typed (f32, f16, bf16) matrix [n_in, n_out]: routers. Split
// rows over the team as you like; a row's result depends on no other row.
void router_rows(const kernel_set * ks, int32_t type, const void * w, size_t row_bytes, int64_t n_in, const float * x,
                 float * logits, int64_t row_begin, int64_t row_end);

} // namespace hybrimoe::kernels
