// Byte layout of ggml's weight blocks, as facts (source: ggml/src/ggml-common.h of llama.cpp). Offsets instead of
// structs with 16-bit members: a file map only guarantees the alignment of the tensor's start, and MXFP4 blocks are
// odd.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace hybrimoe::kernels {

// 32 values a block
struct block_q4_0 {
    uint8_t d[2], qs[16]; // qs[i]: value i low, value 16 + i high; minus 8
};
struct block_q4_1 {
    uint8_t d[2], m[2], qs[16];
};
struct block_q8_0 {
    uint8_t d[2], qs[32]; // signed
};
struct block_iq4_nl {
    uint8_t d[2], qs[16]; // nibbles index iq4_values
};
struct block_mxfp4 {
    uint8_t e, qs[16]; // exponent E8M0; nibbles index mxfp4_values (doubled E2M1)
};

// 256 values a block
struct block_q4_k {
    uint8_t d[2], dmin[2], scales[12], qs[128]; // 32 bytes of qs hold group 2j low, 2j + 1 high
};
struct block_q5_k {
    uint8_t d[2], dmin[2], scales[12], qh[32], qs[128]; // bit g of qh[i] is the fifth bit of value i of group g
};
struct block_q6_k {
    uint8_t ql[128], qh[64], scales[16], d[2]; // scales signed, one per 16 values
};
struct block_iq4_xs {
    uint8_t d[2], scales_h[2], scales_l[4], qs[128];
};

static_assert(sizeof(block_q4_0) == 18, "ggml layout");
static_assert(sizeof(block_q4_1) == 20, "ggml layout");
static_assert(sizeof(block_q8_0) == 34, "ggml layout");
static_assert(sizeof(block_iq4_nl) == 18, "ggml layout");
static_assert(sizeof(block_mxfp4) == 17, "ggml layout");
static_assert(sizeof(block_q4_k) == 144, "ggml layout");
static_assert(sizeof(block_q5_k) == 176, "ggml layout");
static_assert(sizeof(block_q6_k) == 210, "ggml layout");
static_assert(sizeof(block_iq4_xs) == 136, "ggml layout");
static_assert(offsetof(block_q6_k, d) == 208 && offsetof(block_q5_k, qs) == 48, "ggml layout");

// Values of the non-linear 4-bit types (ggml-common.h) and of E2M1 doubled (OCP Microscaling Formats v1.0).
static constexpr int8_t iq4_values[16]   = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static constexpr int8_t mxfp4_values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// Static, not inline: every translation unit keeps its own copy, so that one compiled for a newer CPU is never picked
// by the linker for all.
static inline uint32_t load_u32(const void * p) {
    uint32_t v;
    memcpy(&v, p, sizeof(v));
    return v;
}

static inline uint16_t load_u16(const void * p) {
    uint16_t v;
    memcpy(&v, p, sizeof(v));
    return v;
}

static inline float bits_to_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof(f));
    return f;
}

static inline uint32_t float_to_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof(bits));
    return bits;
}

static inline float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
    const uint32_t rest = static_cast<uint32_t>(h & 0x7fffu);
    if (rest >= 0x7c00u) {
        return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    }
    // Shifting puts the half's exponent under a float's bias; the product is exact, denormals included.
    return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}

// 2^(e - 128): half of E8M0's value, as mxfp4_values are doubled. 255 is not treated as NaN, as in ggml.
static inline float e8m0_half_to_float(uint8_t e) {
    return bits_to_float(e < 2 ? 0x00200000u << e : static_cast<uint32_t>(e - 1) << 23);
}

// Six-bit scales and mins of Q4_K and Q5_K: 12 bytes to 8 + 8 bytes.
static inline void unpack_k_scales(const uint8_t * packed, uint8_t scales[8], uint8_t mins[8]) {
    const uint32_t s0     = load_u32(packed);
    const uint32_t s1     = load_u32(packed + 4);
    const uint32_t s2     = load_u32(packed + 8);
    const uint32_t out[4] = {
        s0 & 0x3f3f3f3fu,
        (s2 & 0x0f0f0f0fu) | ((s0 >> 6) & 0x03030303u) << 4,
        s1 & 0x3f3f3f3fu,
        ((s2 >> 4) & 0x0f0f0f0fu) | ((s1 >> 6) & 0x03030303u) << 4,
    };
    memcpy(scales, out, 8);
    memcpy(mins, out + 2, 8);
}

} // namespace hybrimoe::kernels
