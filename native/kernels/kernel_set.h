// Inside of the library: what one instruction set provides to moe_forward.
#pragma once

#include "moe_kernels.h"

namespace hybrimoe::kernels {

// ---------------------------------------------------------------------------------------------------------------
// activation rows, for the row-stream dot. q is the int8 value, d its scale, sum the sum of q (exact in a float).

// 32 values in natural order
struct row_block32 {
    int8_t q[32];
    float d;
    float sum;
};

// Four blocks of 32, halves apart, so that 16-byte pieces of four weight blocks meet them in one 512-bit register:
// lane b of lo holds values 0-15 of block b, lane b of hi values 16-31. d is repeated over its lane; sum stands in
// the first element of its lane, zeros in the others. Rows are padded to whole units with zeros.
struct alignas(64) row_unit128 {
    int8_t lo[64];
    int8_t hi[64];
    float d[16];
    float sum[16];
};

// 256 values in natural order, one scale
struct alignas(64) row_block256 {
    int8_t q[256];
    float sum16[16];
    float sum32[8];
    float d;
    float pad[7];
};

static_assert(sizeof(row_block32) == 40 && sizeof(row_unit128) == 256 && sizeof(row_block256) == 384, "layout");

// ---------------------------------------------------------------------------------------------------------------
// panels: up to 8 tokens interleaved by 4 values, for the packed tile. Missing tokens are zero.

constexpr int panel_tokens = 8;
constexpr int tile_rows    = 16;

struct alignas(32) panel_group32 {
    int8_t q[8][panel_tokens][4];
    // Accumulator starts, -offset sum(q): of weights packed with an offset of 128, and of q4_0, whose offset is the
    // set's
    int32_t start[panel_tokens];
    int32_t start_q4_0[panel_tokens];
    float d[panel_tokens];
    float d_sum[panel_tokens]; // d sum(q)
};

struct alignas(32) panel_group256 {
    int8_t q[8][panel_tokens][4];
    int32_t start_q6_k[2][panel_tokens]; // of the two halves of 16; the offset is the set's
    int32_t start[panel_tokens];         // offset 128
    float sum[panel_tokens];
};

struct alignas(32) panel_block256 {
    float d[panel_tokens];
    panel_group256 group[8];
};

// f32 panels are float[n][panel_tokens].

// ---------------------------------------------------------------------------------------------------------------
// packed weights: 16 rows by 32 values, bytes in VNNI order. w = a (q - offset) + b, see tile_kind.

struct alignas(64) packed_group {
    uint8_t q[8][tile_rows][4];
    float a[tile_rows];
    float b[tile_rows]; // min, or the scale of the second half for q6_k
};

static_assert(sizeof(panel_group32) == 384 && sizeof(panel_group256) == 384 && sizeof(packed_group) == 640, "layout");

// f32 tiles are float[n][tile_rows].

// Values of a row packed at a time: small enough that tile and panel stay in a 32 KiB L1 cache.
constexpr int64_t pack_values_int8  = 1024;
constexpr int64_t pack_values_float = 256;
constexpr size_t pack_bytes         = (pack_values_int8 / 32) * sizeof(packed_group);
static_assert(pack_bytes >= pack_values_float * tile_rows * sizeof(float), "one buffer serves both");

// ---------------------------------------------------------------------------------------------------------------
// kernels

struct dot_args {
    const uint8_t * rows; // first row
    size_t row_bytes;
    int64_t n_rows;
    int64_t n_values;  // per row
    const void * x[8]; // activation rows, n_x of them, at most kernel_set::dot_tokens
    int n_x;
    float * out[8];       // one per activation row, n_rows values each
    const uint8_t * next; // where the stream goes on after the last row (for the prefetch); may be nullptr
    int n_streams;        // 1, or more: the rows are read as several sequential streams at once
};

struct tile_source {
    const uint8_t * rows; // first row of the tile
    size_t row_bytes;
    int n_rows; // 1 to 16; missing rows repeat the last one
};

struct type_kernels {
    int32_t type;
    void (*dot)(const dot_args & args);

    // nullptr where this instruction set has no tile for the type: the dot serves any number of tokens
    void (*pack)(const tile_source & tile, int64_t first_value, int64_t n_values, void * packed);
    // c[t * c_stride + row], n_tokens in 1..8; adds to c unless `first`
    void (*gemm)(const void * packed, const void * panel, int64_t n_values, int n_tokens, float * c, int64_t c_stride,
                 bool first);
};

struct kernel_set {
    const char * name;
    int dot_tokens;     // most tokens of one dot call
    int gemm_tokens;    // fewest tokens of an expert that are worth packing (measured with bench_kernels)
    bool rows_in_units; // q8_32 rows are row_unit128, else row_block32

    // row: row_unit128 / row_block32 / row_block256, n a multiple of 32 / 256
    void (*quantize_32)(const float * x, int64_t n, void * row);
    void (*quantize_256)(const float * x, int64_t n, void * row);
    // rows[0..n_rows) to one panel
    void (*panel_32)(const void * const * rows, int n_rows, int64_t n, void * panel);
    void (*panel_256)(const void * const * rows, int n_rows, int64_t n, void * panel);
    void (*panel_f32)(const void * const * rows, int n_rows, int64_t n, void * panel);

    // out[i] = act(gate[i], up[i]); gate is ignored for ungated ops; out may equal gate or up
    void (*glu)(ffn_op op, float alpha, float limit, const float * gate, const float * up, float * out, int64_t n);
    // y = (first ? 0 : y) + w x
    void (*add_scaled)(float * y, const float * x, float w, int64_t n, bool first);

    const type_kernels * types; // ends with type -1
};

const type_kernels * find_kernels(const kernel_set * ks, int32_t type);

extern const kernel_set kernels_scalar;
#ifdef HYBRIMOE_KERNELS_X86
extern const kernel_set kernels_avx2;
extern const kernel_set kernels_avxvnni;
extern const kernel_set kernels_avx512;
#endif

// Scalar pieces used by more than one set
struct group32 {
    int16_t q[32];
    float a[2]; // of the two halves
    float b;    // w = a q + b
};

// Group `group` of 32 values of a quantised row.
void unpack_group(int32_t type, const uint8_t * row, int64_t group, group32 * out);
void glu_scalar(ffn_op op, float alpha, float limit, const float * gate, const float * up, float * out, int64_t n);

} // namespace hybrimoe::kernels
