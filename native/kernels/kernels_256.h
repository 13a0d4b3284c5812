// 256-bit kernels, included by two translation units: kernels_avx2.cpp and kernels_avxvnni.cpp, which differ in how
// bytes are multiplied. Everything has internal linkage: nothing compiled with these flags may be shared by the linker.
//
// Without VNNI, maddubs multiplies unsigned by signed bytes into saturating 16-bit pairs. Types of at most 6 bits fit
// as they are; wider ones ("wide") are kept signed, and the sign moves to the activation.
#include <immintrin.h>

#include "block_layout.h"
#include "kernel_set.h"
#include "row_streams.h"

namespace hybrimoe::kernels {

namespace {

#ifdef __AVXVNNI__
constexpr bool has_vnni = true;
#else
constexpr bool has_vnni = false;
#endif

constexpr float smallest_amax = 1e-36f;
constexpr float largest_float = 3.402823466e+38f;

inline __m128i load128(const void * p) {
    return _mm_loadu_si128(static_cast<const __m128i *>(p));
}
inline __m256i load256(const void * p) {
    return _mm256_loadu_si256(static_cast<const __m256i *>(p));
}
inline __m256i set128(__m128i low, __m128i high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}
inline float half_at(const uint8_t * p) {
    return _cvtsh_ss(load_u16(p));
}

inline __m256i low_nibbles(__m256i v) {
    return _mm256_and_si256(v, _mm256_set1_epi8(15));
}
inline __m256i high_nibbles(__m256i v) {
    return _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15));
}

inline __m256i table_of(const int8_t * values) {
    return _mm256_broadcastsi128_si256(load128(values));
}

// The 16 bytes of a 4-bit block as 32 values in order
inline __m256i nibbles(const uint8_t * p) {
    const __m128i v = load128(p);
    return low_nibbles(set128(v, _mm_srli_epi16(v, 4)));
}

// Signed bytes of a wide type as this instruction set wants them; wide_zero is what was added.
constexpr float wide_zero = has_vnni ? 128.0f : 0.0f;
inline __m256i wide(__m256i v) {
    return has_vnni ? _mm256_xor_si256(v, _mm256_set1_epi8(-128)) : v;
}

inline __m256i widen_pairs(__m256i pairs) {
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

// Sums of four products
template <bool is_wide> inline __m256i products(__m256i w, __m256i x) {
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), w, x);
#else
    if (is_wide) {
        return widen_pairs(_mm256_maddubs_epi16(_mm256_sign_epi8(w, w), _mm256_sign_epi8(x, w)));
    }
    return widen_pairs(_mm256_maddubs_epi16(w, x));
#endif
}

inline float sum_of(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s        = _mm_add_ps(s, _mm_movehl_ps(s, s));
    s        = _mm_add_ss(s, _mm_movehdup_ps(s));
    return _mm_cvtss_f32(s);
}

template <int bytes> inline void prefetch(const uint8_t * p) {
    for (int i = 0; i < bytes; i += 64) {
        _mm_prefetch(reinterpret_cast<const char *>(p + i), _MM_HINT_T0);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// row-stream dot, 32 values a block: w = d (q - zero) + min

struct unit_q4_0 {
    static constexpr int bytes    = sizeof(block_q4_0);
    static constexpr float zero   = 8.0f;
    static constexpr bool is_wide = false, has_min = false;
    static __m256i q(const uint8_t * p) { return nibbles(p + 2); }
    static float d(const uint8_t * p) { return half_at(p); }
    static float min(const uint8_t *) { return 0.0f; }
};

struct unit_q4_1 {
    static constexpr int bytes    = sizeof(block_q4_1);
    static constexpr float zero   = 0.0f;
    static constexpr bool is_wide = false, has_min = true;
    static __m256i q(const uint8_t * p) { return nibbles(p + 4); }
    static float d(const uint8_t * p) { return half_at(p); }
    static float min(const uint8_t * p) { return half_at(p + 2); }
};

struct unit_q8_0 {
    static constexpr int bytes    = sizeof(block_q8_0);
    static constexpr float zero   = wide_zero;
    static constexpr bool is_wide = true, has_min = false;
    static __m256i q(const uint8_t * p) { return wide(load256(p + 2)); }
    static float d(const uint8_t * p) { return half_at(p); }
    static float min(const uint8_t *) { return 0.0f; }
};

struct unit_iq4_nl {
    static constexpr int bytes    = sizeof(block_iq4_nl);
    static constexpr float zero   = wide_zero;
    static constexpr bool is_wide = true, has_min = false;
    static __m256i q(const uint8_t * p) { return wide(_mm256_shuffle_epi8(table_of(iq4_values), nibbles(p + 2))); }
    static float d(const uint8_t * p) { return half_at(p); }
    static float min(const uint8_t *) { return 0.0f; }
};

struct unit_mxfp4 {
    static constexpr int bytes    = sizeof(block_mxfp4);
    static constexpr float zero   = 12.0f;
    static constexpr bool is_wide = false, has_min = false;
    static __m256i q(const uint8_t * p) {
        return _mm256_add_epi8(_mm256_shuffle_epi8(table_of(mxfp4_values), nibbles(p + 1)), _mm256_set1_epi8(12));
    }
    static float d(const uint8_t * p) { return e8m0_half_to_float(p[0]); }
    static float min(const uint8_t *) { return 0.0f; }
};

template <class unit, int n_x>
inline void add_unit(const uint8_t * p, const row_block32 * const * x, int64_t b, __m256 * sum, float * offset) {
    const __m256i q = unit::q(p);
    const float d   = unit::d(p);
    for (int t = 0; t < n_x; ++t) {
        const row_block32 & xb = x[t][b];
        const float s          = d * xb.d;
        const __m256i v        = products<unit::is_wide>(q, load256(xb.q));
        sum[t]                 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(v), _mm256_set1_ps(s), sum[t]);
        offset[t] += (unit::has_min ? unit::min(p) * xb.d : s) * xb.sum;
    }
}

template <class unit, int n_x> struct units_dot {
    static constexpr int streams = n_x == 1 ? 4 : 2;

    template <int n, class rows> static void add(const dot_args & args, const rows & at) {
        const int64_t n_blocks = args.n_values / 32;
        const row_block32 * x[n_x];
        for (int t = 0; t < n_x; ++t) {
            x[t] = static_cast<const row_block32 *>(args.x[t]);
        }
        __m256 sum[n][n_x];
        float offset[n][n_x] = {};
        for (int i = 0; i < n; ++i) {
            for (int t = 0; t < n_x; ++t) {
                sum[i][t] = _mm256_setzero_ps();
            }
        }
        int64_t b   = 0;
        size_t byte = 0;
        for (; b + 4 <= n_blocks; b += 4, byte += 4 * unit::bytes) {
            each<n>([&](auto i) {
                prefetch<4 * unit::bytes>(at.fetch[i] + byte);
                for (int j = 0; j < 4; ++j) {
                    add_unit<unit, n_x>(at.row[i] + byte + j * unit::bytes, x, b + j, sum[i], offset[i]);
                }
            });
        }
        for (; b < n_blocks; ++b, byte += unit::bytes) {
            each<n>([&](auto i) { add_unit<unit, n_x>(at.row[i] + byte, x, b, sum[i], offset[i]); });
        }
        for (int i = 0; i < n; ++i) {
            for (int t = 0; t < n_x; ++t) {
                const float q            = sum_of(sum[i][t]);
                args.out[t][at.index[i]] = unit::has_min ? q + offset[i][t] : q - unit::zero * offset[i][t];
            }
        }
    }
};

template <class unit> void dot_32(const dot_args & args) {
    args.n_x == 1 ? walk_rows<units_dot<unit, 1>>(args) : walk_rows<units_dot<unit, 2>>(args);
}

// ---------------------------------------------------------------------------------------------------------------
// row-stream dot, 256 values a block. unpack: q of the eight groups; scales: of groups (or of halves of groups), times
// d; offsets: what the sums of the activations are multiplied with, per group (or half).

struct unpacked_256 {
    __m256i q[8];
    alignas(32) float scale[16];
    alignas(32) float offset[16];
};

inline void store_bytes_as_floats(const uint8_t * bytes, float factor, float * out) {
    const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(bytes));
    _mm256_store_ps(out, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(v)), _mm256_set1_ps(factor)));
}

template <class block_q45, bool fifth_bit> struct block_dot_q45_k {
    static constexpr int bytes    = sizeof(block_q45);
    static constexpr bool is_wide = false, halves = false;
    static void unpack(const uint8_t * p, unpacked_256 & u) {
        uint8_t scales[8];
        uint8_t mins[8];
        unpack_k_scales(p + 4, scales, mins);
        store_bytes_as_floats(scales, half_at(p), u.scale);
        store_bytes_as_floats(mins, -half_at(p + 2), u.offset);
        const uint8_t * qs = p + (fifth_bit ? 48 : 16);
        for (int j = 0; j < 4; ++j) {
            const __m256i v = load256(qs + 32 * j);
            u.q[2 * j]      = low_nibbles(v);
            u.q[2 * j + 1]  = high_nibbles(v);
        }
        if (fifth_bit) {
            const __m256i qh = load256(p + 16);
            for (int g = 0; g < 8; ++g) {
                const __m256i bit = _mm256_set1_epi8(static_cast<char>(1 << g));
                const __m256i is  = _mm256_cmpeq_epi8(_mm256_and_si256(qh, bit), bit);
                u.q[g]            = _mm256_or_si256(u.q[g], _mm256_and_si256(is, _mm256_set1_epi8(16)));
            }
        }
    }
};

struct dot_q6_k {
    static constexpr int bytes    = sizeof(block_q6_k);
    static constexpr bool is_wide = false, halves = true;
    static void unpack(const uint8_t * p, unpacked_256 & u) {
        const __m128i scales = load128(p + 192);
        const __m256 d       = _mm256_set1_ps(half_at(p + 208));
        const __m256 s0      = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(scales)), d);
        const __m256 s1      = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(scales, 8))), d);
        _mm256_store_ps(u.scale, s0);
        _mm256_store_ps(u.scale + 8, s1);
        _mm256_store_ps(u.offset, _mm256_mul_ps(s0, _mm256_set1_ps(-32.0f)));
        _mm256_store_ps(u.offset + 8, _mm256_mul_ps(s1, _mm256_set1_ps(-32.0f)));
        const __m256i top = _mm256_set1_epi8(0x30);
        for (int half = 0; half < 2; ++half) {
            const __m256i l0 = load256(p + 64 * half);
            const __m256i l1 = load256(p + 64 * half + 32);
            const __m256i h  = load256(p + 128 + 32 * half);
            __m256i * q      = u.q + 4 * half;
            q[0]             = _mm256_or_si256(low_nibbles(l0), _mm256_and_si256(_mm256_slli_epi16(h, 4), top));
            q[1]             = _mm256_or_si256(low_nibbles(l1), _mm256_and_si256(_mm256_slli_epi16(h, 2), top));
            q[2]             = _mm256_or_si256(high_nibbles(l0), _mm256_and_si256(h, top));
            q[3]             = _mm256_or_si256(high_nibbles(l1), _mm256_and_si256(_mm256_srli_epi16(h, 2), top));
        }
    }
};

inline void iq4_xs_scales(const uint8_t * p, float * scale) {
    const uint32_t high = load_u16(p + 2);
    const float d       = half_at(p);
    for (int g = 0; g < 8; ++g) {
        const auto low = static_cast<uint32_t>(p[4 + g / 2] >> (4 * (g % 2)) & 15);
        scale[g]       = d * static_cast<float>(static_cast<int>(low | (high >> (2 * g) & 3) << 4) - 32);
    }
}

struct dot_iq4_xs {
    static constexpr int bytes    = sizeof(block_iq4_xs);
    static constexpr bool is_wide = true, halves = false;
    static void unpack(const uint8_t * p, unpacked_256 & u) {
        iq4_xs_scales(p, u.scale);
        for (int g = 0; g < 8; ++g) {
            u.offset[g] = -wide_zero * u.scale[g];
            u.q[g]      = wide(_mm256_shuffle_epi8(table_of(iq4_values), nibbles(p + 8 + 16 * g)));
        }
    }
};

// Scale g over a register, or scales 2g and 2g + 1 over its halves
template <bool halves> inline __m256 scale_of(const float * scale, int g) {
    if (halves) {
        return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_set1_ps(scale[2 * g])), _mm_set1_ps(scale[2 * g + 1]),
                                    1);
    }
    return _mm256_set1_ps(scale[g]);
}

template <class block, int n_x>
inline void add_block(const uint8_t * p, const row_block256 * const * x, int64_t b, __m256 * sum) {
    unpacked_256 u;
    block::unpack(p, u);
    for (int t = 0; t < n_x; ++t) {
        const row_block256 & xb = x[t][b];
        __m256 part = _mm256_mul_ps(_mm256_load_ps(u.offset), _mm256_load_ps(block::halves ? xb.sum16 : xb.sum32));
        if (block::halves) {
            part = _mm256_fmadd_ps(_mm256_load_ps(u.offset + 8), _mm256_load_ps(xb.sum16 + 8), part);
        }
        for (int g = 0; g < 8; ++g) {
            const __m256i v = products<block::is_wide>(u.q[g], load256(xb.q + 32 * g));
            part            = _mm256_fmadd_ps(_mm256_cvtepi32_ps(v), scale_of<block::halves>(u.scale, g), part);
        }
        sum[t] = _mm256_fmadd_ps(part, _mm256_set1_ps(xb.d), sum[t]);
    }
}

template <class block, int n_x> struct blocks_dot {
    static constexpr int streams = n_x == 1 ? 4 : 2;

    template <int n, class rows> static void add(const dot_args & args, const rows & at) {
        const row_block256 * x[n_x];
        for (int t = 0; t < n_x; ++t) {
            x[t] = static_cast<const row_block256 *>(args.x[t]);
        }
        __m256 sum[n][n_x];
        for (int i = 0; i < n; ++i) {
            for (int t = 0; t < n_x; ++t) {
                sum[i][t] = _mm256_setzero_ps();
            }
        }
        size_t byte = 0;
        for (int64_t b = 0; b < args.n_values / 256; ++b, byte += block::bytes) {
            each<n>([&](auto i) {
                prefetch<block::bytes>(at.fetch[i] + byte);
                add_block<block, n_x>(at.row[i] + byte, x, b, sum[i]);
            });
        }
        for (int i = 0; i < n; ++i) {
            for (int t = 0; t < n_x; ++t) {
                args.out[t][at.index[i]] = sum_of(sum[i][t]);
            }
        }
    }
};

template <class block> void dot_256(const dot_args & args) {
    args.n_x == 1 ? walk_rows<blocks_dot<block, 1>>(args) : walk_rows<blocks_dot<block, 2>>(args);
}

// ---------------------------------------------------------------------------------------------------------------
// row-stream dot, float types

constexpr int float_bytes(int type) {
    return type == type_f32 ? 4 : 2;
}

template <int type> inline __m256 load_floats(const uint8_t * row, int64_t i) {
    if constexpr (type == type_f32) {
        return _mm256_loadu_ps(reinterpret_cast<const float *>(row + 4 * i));
    } else if constexpr (type == type_f16) {
        return _mm256_cvtph_ps(load128(row + 2 * i));
    } else {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(row + 2 * i)), 16));
    }
}

template <int type> inline float load_float(const uint8_t * row, int64_t i) {
    if constexpr (type == type_f32) {
        return bits_to_float(load_u32(row + 4 * i));
    } else if constexpr (type == type_f16) {
        return half_at(row + 2 * i);
    } else {
        return bits_to_float(static_cast<uint32_t>(load_u16(row + 2 * i)) << 16);
    }
}

template <int type, int n_x> struct floats_dot {
    static constexpr int streams = 2;

    template <int n, class rows> static void add(const dot_args & args, const rows & at) {
        __m256 sum[n][n_x][4];
        for (int i = 0; i < n; ++i) {
            for (int t = 0; t < n_x; ++t) {
                sum[i][t][0] = sum[i][t][1] = sum[i][t][2] = sum[i][t][3] = _mm256_setzero_ps();
            }
        }
        const auto x_at = [&args](int t, int64_t k) { return static_cast<const float *>(args.x[t]) + k; };
        int64_t k       = 0;
        for (; k + 32 <= args.n_values; k += 32) {
            each<n>([&](auto i) {
                prefetch<32 * float_bytes(type)>(at.fetch[i] + k * float_bytes(type));
                each<4>([&](auto j) {
                    const __m256 w = load_floats<type>(at.row[i], k + 8 * j);
                    for (int t = 0; t < n_x; ++t) {
                        sum[i][t][j] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x_at(t, k + 8 * j)), sum[i][t][j]);
                    }
                });
            });
        }
        for (int i = 0; i < n; ++i) {
            for (int t = 0; t < n_x; ++t) {
                const __m256 * part = sum[i][t];
                float total = sum_of(_mm256_add_ps(_mm256_add_ps(part[0], part[1]), _mm256_add_ps(part[2], part[3])));
                for (int64_t last = k; last < args.n_values; ++last) {
                    total += load_float<type>(at.row[i], last) * *x_at(t, last);
                }
                args.out[t][at.index[i]] = total;
            }
        }
    }
};

template <int type> void dot_float(const dot_args & args) {
    args.n_x == 1 ? walk_rows<floats_dot<type, 1>>(args) : walk_rows<floats_dot<type, 2>>(args);
}

// ---------------------------------------------------------------------------------------------------------------
// packing a tile: 8 rows a register, two registers

struct tile {
    const uint8_t * row[16];

    explicit tile(const tile_source & source) {
        for (int r = 0; r < 16; ++r) {
            const int present = r < source.n_rows ? r : source.n_rows - 1;
            row[r]            = source.rows + static_cast<size_t>(present) * source.row_bytes;
        }
    }

    // 16 bytes at `at` of rows 8 half .. 8 half + 7: out[c] holds dword c of the rows
    void transpose16(int64_t at, int half, __m256i out[4]) const {
        const uint8_t * const * p = row + 8 * half;
        const __m256i a           = set128(load128(p[0] + at), load128(p[4] + at));
        const __m256i b           = set128(load128(p[1] + at), load128(p[5] + at));
        const __m256i c           = set128(load128(p[2] + at), load128(p[6] + at));
        const __m256i d           = set128(load128(p[3] + at), load128(p[7] + at));
        const __m256i ab0         = _mm256_unpacklo_epi32(a, b);
        const __m256i ab1         = _mm256_unpackhi_epi32(a, b);
        const __m256i cd0         = _mm256_unpacklo_epi32(c, d);
        const __m256i cd1         = _mm256_unpackhi_epi32(c, d);
        out[0]                    = _mm256_unpacklo_epi64(ab0, cd0);
        out[1]                    = _mm256_unpackhi_epi64(ab0, cd0);
        out[2]                    = _mm256_unpacklo_epi64(ab1, cd1);
        out[3]                    = _mm256_unpackhi_epi64(ab1, cd1);
    }

    // The two bytes at `at` of 8 rows, as floats
    __m256 halves(int64_t at, int half) const {
        const uint8_t * const * p = row + 8 * half;
        alignas(16) uint16_t h[8];
        for (int r = 0; r < 8; ++r) {
            h[r] = load_u16(p[r] + at);
        }
        return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i *>(h)));
    }
};

inline void store_q(packed_group * out, int c, int half, __m256i v) {
    _mm256_store_si256(reinterpret_cast<__m256i *>(out->q[c][8 * half]), v);
}

template <class to_byte_fn>
inline void pack_nibbles(const tile & w, int64_t at, packed_group * out, to_byte_fn to_byte) {
    for (int half = 0; half < 2; ++half) {
        __m256i v[4];
        w.transpose16(at, half, v);
        for (int c = 0; c < 4; ++c) {
            store_q(out, c, half, to_byte(low_nibbles(v[c])));
            store_q(out, 4 + c, half, to_byte(high_nibbles(v[c])));
        }
    }
}

inline void store_halves(const tile & w, int64_t at, float * out) {
    _mm256_store_ps(out, w.halves(at, 0));
    _mm256_store_ps(out + 8, w.halves(at, 1));
}

void pack_q4_0(const tile_source & source, int64_t first_value, int64_t n_values, void * packed) {
    const tile w(source);
    auto * out = static_cast<packed_group *>(packed);
    for (int64_t g = 0; g < n_values / 32; ++g) {
        const int64_t at = (first_value / 32 + g) * static_cast<int64_t>(sizeof(block_q4_0));
        pack_nibbles(w, at + 2, out + g, [](__m256i v) { return v; });
        store_halves(w, at, out[g].a);
    }
}

void pack_q4_1(const tile_source & source, int64_t first_value, int64_t n_values, void * packed) {
    const tile w(source);
    auto * out = static_cast<packed_group *>(packed);
    for (int64_t g = 0; g < n_values / 32; ++g) {
        const int64_t at = (first_value / 32 + g) * static_cast<int64_t>(sizeof(block_q4_1));
        pack_nibbles(w, at + 4, out + g, [](__m256i v) { return v; });
        store_halves(w, at, out[g].a);
        store_halves(w, at + 2, out[g].b);
    }
}

void pack_iq4_nl(const tile_source & source, int64_t first_value, int64_t n_values, void * packed) {
    const tile w(source);
    const __m256i table = table_of(iq4_values);
    auto * out          = static_cast<packed_group *>(packed);
    for (int64_t g = 0; g < n_values / 32; ++g) {
        const int64_t at = (first_value / 32 + g) * static_cast<int64_t>(sizeof(block_iq4_nl));
        pack_nibbles(w, at + 2, out + g, [table](__m256i v) { return wide(_mm256_shuffle_epi8(table, v)); });
        store_halves(w, at, out[g].a);
    }
}

void pack_mxfp4(const tile_source & source, int64_t first_value, int64_t n_values, void * packed) {
    const tile w(source);
    const __m256i table = _mm256_add_epi8(table_of(mxfp4_values), _mm256_set1_epi8(16));
    auto * out          = static_cast<packed_group *>(packed);
    for (int64_t g = 0; g < n_values / 32; ++g) {
        const int64_t at = (first_value / 32 + g) * static_cast<int64_t>(sizeof(block_mxfp4));
        pack_nibbles(w, at + 1, out + g, [table](__m256i v) { return _mm256_shuffle_epi8(table, v); });
        for (int r = 0; r < 16; ++r) {
            out[g].a[r] = e8m0_half_to_float(w.row[r][at]);
        }
    }
}

void pack_q8_0(const tile_source & source, int64_t first_value, int64_t n_values, void * packed) {
    const tile w(source);
    auto * out = static_cast<packed_group *>(packed);
    for (int64_t g = 0; g < n_values / 32; ++g) {
        const int64_t at = (first_value / 32 + g) * static_cast<int64_t>(sizeof(block_q8_0));
        for (int half = 0; half < 2; ++half) {
            for (int part = 0; part < 2; ++part) {
                __m256i v[4];
                w.transpose16(at + 2 + 16 * part, half, v);
                for (int c = 0; c < 4; ++c) {
                    store_q(out + g, 4 * part + c, half, wide(v[c]));
                }
            }
        }
        store_halves(w, at, out[g].a);
    }
}

inline __m256 byte_as_float(__m256i v, int i) {
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srl_epi32(v, _mm_cvtsi32_si128(8 * i)), _mm256_set1_epi32(255)));
}

inline __m256 signed_byte_as_float(__m256i v, int i) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_sll_epi32(v, _mm_cvtsi32_si128(24 - 8 * i)), 24));
}

// a = d scale, b = -dmin min, of the eight groups of one Q4_K or Q5_K block
inline void pack_k_scales(const tile & w, int64_t at, int half, packed_group * out) {
    __m256i v[4];
    w.transpose16(at, half, v);
    const __m256i m6 = _mm256_set1_epi32(0x3f3f3f3f);
    const __m256i m4 = _mm256_set1_epi32(0x0f0f0f0f);
    const __m256i m2 = _mm256_set1_epi32(0x03030303);
    const auto top2  = [m2](__m256i x) { return _mm256_slli_epi32(_mm256_and_si256(_mm256_srli_epi32(x, 6), m2), 4); };
    const __m256i scales[2] = {_mm256_and_si256(v[1], m6), _mm256_or_si256(_mm256_and_si256(v[3], m4), top2(v[1]))};
    const __m256i mins[2]   = {_mm256_and_si256(v[2], m6),
                               _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(v[3], 4), m4), top2(v[2]))};
    const __m256 d          = w.halves(at, half);
    const __m256 minus_dmin = _mm256_sub_ps(_mm256_setzero_ps(), w.halves(at + 2, half));
    for (int g = 0; g < 8; ++g) {
        _mm256_store_ps(out[g].a + 8 * half, _mm256_mul_ps(d, byte_as_float(scales[g / 4], g % 4)));
        _mm256_store_ps(out[g].b + 8 * half, _mm256_mul_ps(minus_dmin, byte_as_float(mins[g / 4], g % 4)));
    }
}

template <class block_q45, bool fifth_bit>
void pack_q45_k(const tile_source & source, int64_t first_value, int64_t n_values, void * packed) {
    const tile w(source);
    const __m256i bit5 = _mm256_set1_epi8(16);
    auto * out         = static_cast<packed_group *>(packed);
    for (int64_t i = 0; i < n_values / 128; ++i) {
        const int64_t at     = (first_value / 256 + i / 2) * static_cast<int64_t>(sizeof(block_q45));
        const int half       = static_cast<int>(i % 2);
        packed_group * group = out + i / 2 * 8;
        pack_k_scales(w, at, half, group);
        __m256i qh[8];
        if (fifth_bit) {
            w.transpose16(at + 16, half, qh);
            w.transpose16(at + 32, half, qh + 4);
        }
        const int64_t qs = at + (fifth_bit ? 48 : 16);
        for (int j = 0; j < 8; ++j) {
            __m256i v[4];
            w.transpose16(qs + 16 * j, half, v);
            for (int c = 0; c < 4; ++c) {
                __m256i lo  = low_nibbles(v[c]);
                __m256i hi  = high_nibbles(v[c]);
                const int k = 4 * (j % 2) + c;
                if (fifth_bit) {
                    const __m256i h = _mm256_srl_epi16(qh[k], _mm_cvtsi32_si128(j / 2 * 2));
                    lo              = _mm256_or_si256(lo, _mm256_and_si256(_mm256_slli_epi16(h, 4), bit5));
                    hi              = _mm256_or_si256(hi, _mm256_and_si256(_mm256_slli_epi16(h, 3), bit5));
                }
                store_q(group + j / 2 * 2, k, half, lo);
                store_q(group + j / 2 * 2 + 1, k, half, hi);
            }
        }
    }
}

void pack_q6_k(const tile_source & source, int64_t first_value, int64_t n_values, void * packed) {
    const tile w(source);
    const __m256i top = _mm256_set1_epi8(0x30);
    auto * out        = static_cast<packed_group *>(packed);
    for (int64_t i = 0; i < n_values / 128; ++i) {
        const int64_t at = (first_value / 256 + i / 2) * static_cast<int64_t>(sizeof(block_q6_k));
        const int half   = static_cast<int>(i % 2);
        __m256i scales[4];
        w.transpose16(at + 192, half, scales);
        const __m256 d = w.halves(at + 208, half);
        for (int g = 0; g < 8; ++g) {
            packed_group & group = out[i / 2 * 8 + g];
            _mm256_store_ps(group.a + 8 * half, _mm256_mul_ps(d, signed_byte_as_float(scales[g / 2], 2 * (g % 2))));
            _mm256_store_ps(group.b + 8 * half, _mm256_mul_ps(d, signed_byte_as_float(scales[g / 2], 2 * (g % 2) + 1)));
        }
        for (int j = 0; j < 4; ++j) {
            packed_group * group = out + i / 2 * 8 + j / 2 * 4;
            const int64_t ql     = at + 64 * (j / 2) + 16 * (j % 2);
            __m256i l0[4];
            __m256i l1[4];
            __m256i h[4];
            w.transpose16(ql, half, l0);
            w.transpose16(ql + 32, half, l1);
            w.transpose16(at + 128 + 16 * j, half, h);
            for (int c = 0; c < 4; ++c) {
                const int k      = 4 * (j % 2) + c;
                const __m256i h0 = _mm256_and_si256(_mm256_slli_epi16(h[c], 4), top);
                const __m256i h1 = _mm256_and_si256(_mm256_slli_epi16(h[c], 2), top);
                const __m256i h2 = _mm256_and_si256(h[c], top);
                const __m256i h3 = _mm256_and_si256(_mm256_srli_epi16(h[c], 2), top);
                store_q(group, k, half, _mm256_or_si256(low_nibbles(l0[c]), h0));
                store_q(group + 1, k, half, _mm256_or_si256(low_nibbles(l1[c]), h1));
                store_q(group + 2, k, half, _mm256_or_si256(high_nibbles(l0[c]), h2));
                store_q(group + 3, k, half, _mm256_or_si256(high_nibbles(l1[c]), h3));
            }
        }
    }
}

void pack_iq4_xs(const tile_source & source, int64_t first_value, int64_t n_values, void * packed) {
    const tile w(source);
    const __m256i table = table_of(iq4_values);
    auto * out          = static_cast<packed_group *>(packed);
    for (int64_t b = 0; b < n_values / 256; ++b, out += 8) {
        const int64_t at = (first_value / 256 + b) * static_cast<int64_t>(sizeof(block_iq4_xs));
        for (int r = 0; r < 16; ++r) {
            float scale[8];
            iq4_xs_scales(w.row[r] + at, scale);
            for (int g = 0; g < 8; ++g) {
                out[g].a[r] = scale[g];
            }
        }
        for (int g = 0; g < 8; ++g) {
            pack_nibbles(w, at + 8 + 16 * g, out + g,
                         [table](__m256i v) { return wide(_mm256_shuffle_epi8(table, v)); });
        }
    }
}

template <int type> void pack_float(const tile_source & source, int64_t first_value, int64_t n_values, void * packed) {
    const tile w(source);
    auto * out = static_cast<float *>(packed);
    int64_t i  = 0;
    for (; i + 8 <= n_values; i += 8) {
        for (int q = 0; q < 4; ++q) {
            // rows 4q..4q+3, values i..i+7: 4 x 4 transposes in both lanes
            const __m256 v0   = load_floats<type>(w.row[4 * q], first_value + i);
            const __m256 v1   = load_floats<type>(w.row[4 * q + 1], first_value + i);
            const __m256 v2   = load_floats<type>(w.row[4 * q + 2], first_value + i);
            const __m256 v3   = load_floats<type>(w.row[4 * q + 3], first_value + i);
            const __m256d a   = _mm256_castps_pd(_mm256_unpacklo_ps(v0, v1));
            const __m256d b   = _mm256_castps_pd(_mm256_unpackhi_ps(v0, v1));
            const __m256d c   = _mm256_castps_pd(_mm256_unpacklo_ps(v2, v3));
            const __m256d d   = _mm256_castps_pd(_mm256_unpackhi_ps(v2, v3));
            const __m256 t[4] = {_mm256_castpd_ps(_mm256_unpacklo_pd(a, c)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, c)),
                                 _mm256_castpd_ps(_mm256_unpacklo_pd(b, d)),
                                 _mm256_castpd_ps(_mm256_unpackhi_pd(b, d))};
            for (int j = 0; j < 4; ++j) {
                float * to = out + (i + j) * tile_rows + 4 * q;
                _mm_store_ps(to, _mm256_castps256_ps128(t[j]));
                _mm_store_ps(to + 4 * tile_rows, _mm256_extractf128_ps(t[j], 1));
            }
        }
    }
    for (; i < n_values; ++i) {
        for (int r = 0; r < 16; ++r) {
            out[i * tile_rows + r] = load_float<type>(w.row[r], first_value + i);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// the 16 x 4 tile: two registers of rows, four tokens at a time

// steps: how many 16-bit pairs of products may be added before they are widened. zero_shift: accumulators start from
// the panel's value shifted right by so much; -1: from zero.
template <bool is_wide_, int steps_, int zero_shift_, bool q4_0_ = false> struct byte_kind {
    static constexpr bool q4_0      = q4_0_;
    static constexpr bool is_wide   = is_wide_;
    static constexpr int steps      = steps_;
    static constexpr int zero_shift = zero_shift_;
};
using kind_4_bit = byte_kind<false, 8, -1>; // 15 * 127 * 2 * 8 < 32768
using kind_q4_0  = byte_kind<false, 8, 0, true>;
using kind_5_bit = byte_kind<false, 4, -1>; // 31 * 127 * 2 * 4
using kind_mxfp4 = byte_kind<false, 4, 3>;
using kind_q6_k  = byte_kind<false, 2, 0>; // 63 * 127 * 2 * 2
using kind_wide  = byte_kind<true, 1, has_vnni ? 0 : -1>;

template <int n_t> struct accumulators {
    __m256i v[n_t][2];
};

template <class kind, int n_t> inline void tile_start(const int32_t * start, accumulators<n_t> & acc) {
    for (int t = 0; t < n_t; ++t) {
        // -128 sum is a multiple of every power of two up to 128: the shift is exact
        const __m256i v = _mm256_set1_epi32(start[t]);
        acc.v[t][0] = acc.v[t][1] = kind::zero_shift < 0 ? _mm256_setzero_si256()
                                    : kind::zero_shift == 0
                                        ? v
                                        : _mm256_srai_epi32(v, kind::zero_shift < 0 ? 0 : kind::zero_shift);
    }
}

template <class kind, int n_t, int first, int last>
inline void tile_products(const packed_group & w, const int8_t (&x)[8][panel_tokens][4], int t0,
                          accumulators<n_t> & acc) {
#ifdef __AVXVNNI__
#pragma GCC unroll 8
    for (int k = first; k < last; ++k) {
        const __m256i w0 = load256(w.q[k][0]);
        const __m256i w1 = load256(w.q[k][8]);
#pragma GCC unroll 4
        for (int t = 0; t < n_t; ++t) {
            const __m256i xt = _mm256_set1_epi32(static_cast<int>(load_u32(x[k][t0 + t])));
            acc.v[t][0]      = _mm256_dpbusd_avx_epi32(acc.v[t][0], w0, xt);
            acc.v[t][1]      = _mm256_dpbusd_avx_epi32(acc.v[t][1], w1, xt);
        }
    }
#else
#pragma GCC unroll 8
    for (int k0 = first; k0 < last; k0 += kind::steps) {
        __m256i pairs[n_t][2];
        for (int k = k0; k < k0 + kind::steps && k < last; ++k) {
            const __m256i w0 = load256(w.q[k][0]);
            const __m256i w1 = load256(w.q[k][8]);
            const __m256i u0 = kind::is_wide ? _mm256_sign_epi8(w0, w0) : w0;
            const __m256i u1 = kind::is_wide ? _mm256_sign_epi8(w1, w1) : w1;
#pragma GCC unroll 4
            for (int t = 0; t < n_t; ++t) {
                const __m256i xt = _mm256_set1_epi32(static_cast<int>(load_u32(x[k][t0 + t])));
                const __m256i p0 = _mm256_maddubs_epi16(u0, kind::is_wide ? _mm256_sign_epi8(xt, w0) : xt);
                const __m256i p1 = _mm256_maddubs_epi16(u1, kind::is_wide ? _mm256_sign_epi8(xt, w1) : xt);
                pairs[t][0]      = k == k0 ? p0 : _mm256_add_epi16(pairs[t][0], p0);
                pairs[t][1]      = k == k0 ? p1 : _mm256_add_epi16(pairs[t][1], p1);
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < n_t; ++t) {
            acc.v[t][0] = _mm256_add_epi32(acc.v[t][0], widen_pairs(pairs[t][0]));
            acc.v[t][1] = _mm256_add_epi32(acc.v[t][1], widen_pairs(pairs[t][1]));
        }
    }
#endif
}

struct gemm_args {
    const void * packed;
    const void * panel;
    int64_t n_values;
    int t0; // first token of the panel
    float * c;
    int64_t c_stride;
    bool first;
};

template <int n_t> struct tile_sums {
    __m256 v[n_t][2];

    void load(const gemm_args & args) {
        for (int t = 0; t < n_t; ++t) {
            for (int h = 0; h < 2; ++h) {
                v[t][h] =
                    args.first ? _mm256_setzero_ps() : _mm256_loadu_ps(args.c + (args.t0 + t) * args.c_stride + 8 * h);
            }
        }
    }
    void store(const gemm_args & args) const {
        for (int t = 0; t < n_t; ++t) {
            for (int h = 0; h < 2; ++h) {
                _mm256_storeu_ps(args.c + (args.t0 + t) * args.c_stride + 8 * h, v[t][h]);
            }
        }
    }
    void clear() {
        for (int t = 0; t < n_t; ++t) {
            v[t][0] = v[t][1] = _mm256_setzero_ps();
        }
    }
    // v += acc * a * x
    void add(const accumulators<n_t> & acc, const float * a, const float * x) {
        for (int h = 0; h < 2; ++h) {
            const __m256 scale = _mm256_load_ps(a + 8 * h);
            for (int t = 0; t < n_t; ++t) {
                const __m256 s = x != nullptr ? _mm256_mul_ps(scale, _mm256_set1_ps(x[t])) : scale;
                v[t][h]        = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc.v[t][h]), s, v[t][h]);
            }
        }
    }
    // v += b * x
    void add_min(const float * b, const float * x) {
        for (int h = 0; h < 2; ++h) {
            const __m256 m = _mm256_load_ps(b + 8 * h);
            for (int t = 0; t < n_t; ++t) {
                v[t][h] = _mm256_fmadd_ps(m, _mm256_set1_ps(x[t]), v[t][h]);
            }
        }
    }
};

template <class kind, bool has_min> struct gemm_32 {
    template <int n_t> static void run(const gemm_args & args) {
        const auto * w = static_cast<const packed_group *>(args.packed);
        const auto * x = static_cast<const panel_group32 *>(args.panel);
        tile_sums<n_t> sum;
        sum.load(args);
        for (int64_t g = 0; g < args.n_values / 32; ++g, ++w, ++x) {
            accumulators<n_t> acc;
            tile_start<kind>((kind::q4_0 ? x->start_q4_0 : x->start) + args.t0, acc);
            tile_products<kind, n_t, 0, 8>(*w, x->q, args.t0, acc);
            sum.add(acc, w->a, x->d + args.t0);
            if (has_min) {
                sum.add_min(w->b, x->d_sum + args.t0);
            }
        }
        sum.store(args);
    }
};

template <class kind, bool has_min, bool two_scales> struct gemm_256 {
    template <int n_t> static void run(const gemm_args & args) {
        const auto * w = static_cast<const packed_group *>(args.packed);
        const auto * x = static_cast<const panel_block256 *>(args.panel);
        tile_sums<n_t> sum;
        sum.load(args);
        for (int64_t b = 0; b < args.n_values / 256; ++b, ++x) {
            tile_sums<n_t> part;
            part.clear();
            for (int g = 0; g < 8; ++g, ++w) {
                const panel_group256 & xg = x->group[g];
                accumulators<n_t> acc;
                if (two_scales) {
                    tile_start<kind>(xg.start_q6_k[0] + args.t0, acc);
                    tile_products<kind, n_t, 0, 4>(*w, xg.q, args.t0, acc);
                    part.add(acc, w->a, nullptr);
                    tile_start<kind>(xg.start_q6_k[1] + args.t0, acc);
                    tile_products<kind, n_t, 4, 8>(*w, xg.q, args.t0, acc);
                    part.add(acc, w->b, nullptr);
                } else {
                    tile_start<kind>(xg.start + args.t0, acc);
                    tile_products<kind, n_t, 0, 8>(*w, xg.q, args.t0, acc);
                    part.add(acc, w->a, nullptr);
                    if (has_min) {
                        part.add_min(w->b, xg.sum + args.t0);
                    }
                }
            }
            for (int t = 0; t < n_t; ++t) {
                const __m256 d = _mm256_set1_ps(x->d[args.t0 + t]);
                sum.v[t][0]    = _mm256_fmadd_ps(part.v[t][0], d, sum.v[t][0]);
                sum.v[t][1]    = _mm256_fmadd_ps(part.v[t][1], d, sum.v[t][1]);
            }
        }
        sum.store(args);
    }
};

struct gemm_float {
    template <int n_t> static void run(const gemm_args & args) {
        const auto * w = static_cast<const float *>(args.packed);
        const auto * x = static_cast<const float *>(args.panel) + args.t0;
        tile_sums<n_t> sum;
        sum.load(args);
        for (int64_t k = 0; k < args.n_values; ++k, w += tile_rows, x += panel_tokens) {
            const __m256 w0 = _mm256_load_ps(w);
            const __m256 w1 = _mm256_load_ps(w + 8);
#pragma GCC unroll 4
            for (int t = 0; t < n_t; ++t) {
                const __m256 xt = _mm256_set1_ps(x[t]);
                sum.v[t][0]     = _mm256_fmadd_ps(w0, xt, sum.v[t][0]);
                sum.v[t][1]     = _mm256_fmadd_ps(w1, xt, sum.v[t][1]);
            }
        }
        sum.store(args);
    }
};

template <class kernel>
void gemm(const void * packed, const void * panel, int64_t n_values, int n_tokens, float * c, int64_t c_stride,
          bool first) {
    for (int t0 = 0; t0 < n_tokens; t0 += 4) {
        const gemm_args args = {packed, panel, n_values, t0, c, c_stride, first};
        switch (n_tokens - t0) {
        case 1:
            kernel::template run<1>(args);
            break;
        case 2:
            kernel::template run<2>(args);
            break;
        case 3:
            kernel::template run<3>(args);
            break;
        default:
            kernel::template run<4>(args);
            break;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// activations

inline __m256i magnitude_bits(__m256 x) {
    return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
}

// Largest of eight non-negative integers. As integers, NaN is above infinity: a non-finite value always reaches the
// scale.
inline int32_t largest_of(__m256i v) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m         = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m         = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    return _mm_cvtsi128_si32(m);
}

inline __m256i quantize_8(const float * x, __m256 scale) {
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), scale));
}

// 32 values to bytes
inline __m256i quantize_group(const float * x, __m256 scale) {
    const __m256i a     = _mm256_packs_epi32(quantize_8(x, scale), quantize_8(x + 8, scale));
    const __m256i b     = _mm256_packs_epi32(quantize_8(x + 16, scale), quantize_8(x + 24, scale));
    const __m256i bytes = _mm256_packs_epi16(a, b);
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

inline int sum_of_4(__m128i v) {
    v = _mm_add_epi32(v, _mm_shuffle_epi32(v, 0x4e));
    v = _mm_add_epi32(v, _mm_shuffle_epi32(v, 0xb1));
    return _mm_cvtsi128_si32(v);
}

inline __m256i sums_of_4_bytes(__m256i q) {
    return widen_pairs(_mm256_maddubs_epi16(_mm256_set1_epi8(1), q));
}

void quantize_32(const float * x, int64_t n, void * row) {
    auto * out = static_cast<row_block32 *>(row);
    for (int64_t b = 0; b < n / 32; ++b, x += 32) {
        __m256i largest = magnitude_bits(_mm256_loadu_ps(x));
        for (int i = 8; i < 32; i += 8) {
            largest = _mm256_max_epi32(largest, magnitude_bits(_mm256_loadu_ps(x + i)));
        }
        const float amax  = bits_to_float(static_cast<uint32_t>(largest_of(largest)));
        const bool normal = amax >= smallest_amax && amax <= largest_float;
        const __m256i q   = quantize_group(x, _mm256_set1_ps(normal ? 127.0f / amax : 0.0f));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(out[b].q), q);
        const __m256i sums = sums_of_4_bytes(q);
        out[b].sum         = static_cast<float>(
            sum_of_4(_mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1))));
        out[b].d = amax < smallest_amax ? 0.0f : amax / 127.0f;
    }
}

// The scale takes the sign of the first value of largest magnitude, as ggml's Q8_K does.
void quantize_256(const float * x, int64_t n, void * row) {
    auto * out = static_cast<row_block256 *>(row);
    for (int64_t b = 0; b < n / 256; ++b, x += 256, ++out) {
        __m256i largest = _mm256_setzero_si256();
        for (int i = 0; i < 256; i += 8) {
            largest = _mm256_max_epi32(largest, magnitude_bits(_mm256_loadu_ps(x + i)));
        }
        const int32_t bits = largest_of(largest);
        const float amax   = bits_to_float(static_cast<uint32_t>(bits));
        const bool normal  = amax >= smallest_amax && amax <= largest_float;
        float max          = amax;
        for (int i = 0; i < 256; i += 8) {
            const __m256i at = _mm256_cmpeq_epi32(magnitude_bits(_mm256_loadu_ps(x + i)), _mm256_set1_epi32(bits));
            const int mask   = _mm256_movemask_ps(_mm256_castsi256_ps(at));
            if (mask != 0) {
                max = x[i + __builtin_ctz(static_cast<unsigned>(mask))];
                break;
            }
        }
        const float inverse = normal ? -127.0f / max : 0.0f;
        for (int g = 0; g < 8; ++g) {
            const __m256i q = quantize_group(x + 32 * g, _mm256_set1_ps(inverse));
            _mm256_store_si256(reinterpret_cast<__m256i *>(out->q + 32 * g), q);
            const __m256i sums    = sums_of_4_bytes(q);
            out->sum16[2 * g]     = static_cast<float>(sum_of_4(_mm256_castsi256_si128(sums)));
            out->sum16[2 * g + 1] = static_cast<float>(sum_of_4(_mm256_extracti128_si256(sums, 1)));
            out->sum32[g]         = out->sum16[2 * g] + out->sum16[2 * g + 1];
        }
        out->d = normal ? 1.0f / inverse : (amax < smallest_amax ? 0.0f : amax);
    }
}

// 32 values of 8 tokens: [token][8 dwords] to [8 dwords][token]
inline void transpose_group(const __m256i * v, int8_t (&out)[8][panel_tokens][4]) {
    __m256i a[8];
    __m256i b[8];
    for (int i = 0; i < 4; ++i) {
        a[2 * i]     = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        b[4 * i]     = _mm256_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm256_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm256_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm256_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        _mm256_store_si256(reinterpret_cast<__m256i *>(out[i]), _mm256_permute2x128_si256(b[i], b[4 + i], 0x20));
        _mm256_store_si256(reinterpret_cast<__m256i *>(out[4 + i]), _mm256_permute2x128_si256(b[i], b[4 + i], 0x31));
    }
}

void panel_32(const void * const * rows, int n_rows, int64_t n, void * panel) {
    auto * out = static_cast<panel_group32 *>(panel);
    for (int64_t g = 0; g < n / 32; ++g, ++out) {
        __m256i v[panel_tokens];
        for (int t = 0; t < panel_tokens; ++t) {
            const row_block32 none    = {};
            const row_block32 & block = t < n_rows ? static_cast<const row_block32 *>(rows[t])[g] : none;
            v[t]                      = load256(block.q);
            out->start[t]             = -128 * static_cast<int32_t>(block.sum);
            out->start_q4_0[t]        = -8 * static_cast<int32_t>(block.sum);
            out->d[t]                 = block.d;
            out->d_sum[t]             = block.d * block.sum;
        }
        transpose_group(v, out->q);
    }
}

void panel_256(const void * const * rows, int n_rows, int64_t n, void * panel) {
    static constexpr row_block256 none = {};
    auto * out                         = static_cast<panel_block256 *>(panel);
    for (int64_t b = 0; b < n / 256; ++b, ++out) {
        for (int g = 0; g < 8; ++g) {
            panel_group256 & group = out->group[g];
            __m256i v[panel_tokens];
            for (int t = 0; t < panel_tokens; ++t) {
                const row_block256 & block = t < n_rows ? static_cast<const row_block256 *>(rows[t])[b] : none;
                v[t]                       = load256(block.q + 32 * g);
                group.start_q6_k[0][t]     = -32 * static_cast<int32_t>(block.sum16[2 * g]);
                group.start_q6_k[1][t]     = -32 * static_cast<int32_t>(block.sum16[2 * g + 1]);
                group.start[t]             = -128 * static_cast<int32_t>(block.sum32[g]);
                group.sum[t]               = block.sum32[g];
                out->d[t]                  = block.d;
            }
            transpose_group(v, group.q);
        }
    }
}

void panel_f32(const void * const * rows, int n_rows, int64_t n, void * panel) {
    auto * out = static_cast<float *>(panel);
    for (int64_t k = 0; k < n; ++k, out += panel_tokens) {
        for (int t = 0; t < panel_tokens; ++t) {
            out[t] = t < n_rows ? static_cast<const float *>(rows[t])[k] : 0.0f;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// activation functions

// e^x to about 2 units in the last place; Cephes' expf coefficients. NaN stays, +-infinity saturates.
inline __m256 exp_ps(__m256 x) {
    // min and max return their second operand when one is NaN
    x              = _mm256_max_ps(_mm256_set1_ps(-105.0f), _mm256_min_ps(_mm256_set1_ps(89.0f), x));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r       = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r              = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 p       = _mm256_set1_ps(1.9875691500e-4f);
    p              = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
    p              = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
    p              = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
    p              = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
    p              = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
    p              = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
    // 2^n in two factors: n reaches beyond the exponents of a float
    const __m256i ni    = _mm256_cvtps_epi32(n);
    const __m256i half  = _mm256_srai_epi32(ni, 1);
    const __m256i other = _mm256_sub_epi32(ni, half);
    const auto power    = [](__m256i e) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
    };
    return _mm256_mul_ps(_mm256_mul_ps(p, power(half)), power(other));
}

// x sigmoid(a x)
inline __m256 swish(__m256 x, __m256 ax) {
    return _mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1.0f), exp_ps(_mm256_sub_ps(_mm256_setzero_ps(), ax))));
}

inline __m256 gelu(__m256 x) {
    // 0.5 (1 + tanh(z)) = sigmoid(2 z)
    const __m256 cubic = _mm256_fmadd_ps(_mm256_mul_ps(x, x), _mm256_set1_ps(0.044715f), _mm256_set1_ps(1.0f));
    const __m256 z     = _mm256_mul_ps(_mm256_mul_ps(x, _mm256_set1_ps(2.0f * 0.79788456080286535588f)), cubic);
    __m256 y           = swish(x, z);
    y                  = _mm256_blendv_ps(y, _mm256_setzero_ps(), _mm256_cmp_ps(x, _mm256_set1_ps(-10.0f), _CMP_LE_OQ));
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(x, _mm256_set1_ps(10.0f), _CMP_GE_OQ));
}

inline __m256 at_most(__m256 x, __m256 limit) {
    return _mm256_min_ps(limit, x);
}
inline __m256 clamp(__m256 x, __m256 limit) {
    return _mm256_max_ps(_mm256_sub_ps(_mm256_setzero_ps(), limit), _mm256_min_ps(limit, x));
}

template <ffn_op op> inline __m256 glu_8(__m256 g, __m256 u, __m256 alpha, __m256 limit) {
    if constexpr (op == ffn_op::swiglu) {
        return _mm256_mul_ps(swish(g, g), u);
    } else if constexpr (op == ffn_op::geglu) {
        return _mm256_mul_ps(gelu(g), u);
    } else if constexpr (op == ffn_op::geglu_quick) {
        return _mm256_mul_ps(swish(g, _mm256_mul_ps(g, _mm256_set1_ps(1.702f))), u);
    } else if constexpr (op == ffn_op::swiglu_oai) {
        const __m256 x = at_most(g, limit);
        return _mm256_mul_ps(swish(x, _mm256_mul_ps(x, alpha)), _mm256_add_ps(clamp(u, limit), _mm256_set1_ps(1.0f)));
    } else if constexpr (op == ffn_op::swiglu_clamp) {
        const __m256 x = at_most(g, limit);
        return _mm256_mul_ps(swish(x, x), clamp(u, limit));
    } else if constexpr (op == ffn_op::swiglu_limit) {
        return _mm256_mul_ps(at_most(swish(g, g), limit), clamp(u, limit));
    } else if constexpr (op == ffn_op::silu) {
        return swish(u, u);
    } else if constexpr (op == ffn_op::gelu) {
        return gelu(u);
    } else {
        static_assert(op == ffn_op::gelu_quick, "no vector form");
        return swish(u, _mm256_mul_ps(u, _mm256_set1_ps(1.702f)));
    }
}

template <ffn_op op>
void glu_vector(float alpha, float limit, const float * gate, const float * up, float * out, int64_t n) {
    const __m256 va = _mm256_set1_ps(alpha);
    const __m256 vl = _mm256_set1_ps(limit);
    const float * g = is_gated(op) ? gate : up;
    int64_t i       = 0;
    for (; i + 8 <= n; i += 8) {
        _mm256_storeu_ps(out + i, glu_8<op>(_mm256_loadu_ps(g + i), _mm256_loadu_ps(up + i), va, vl));
    }
    if (i < n) {
        // the rest through the same arithmetic
        float gs[8] = {};
        float us[8] = {};
        memcpy(gs, g + i, static_cast<size_t>(n - i) * sizeof(float));
        memcpy(us, up + i, static_cast<size_t>(n - i) * sizeof(float));
        _mm256_storeu_ps(us, glu_8<op>(_mm256_loadu_ps(gs), _mm256_loadu_ps(us), va, vl));
        memcpy(out + i, us, static_cast<size_t>(n - i) * sizeof(float));
    }
}

void glu(ffn_op op, float alpha, float limit, const float * gate, const float * up, float * out, int64_t n) {
    switch (op) {
    case ffn_op::swiglu:
        return glu_vector<ffn_op::swiglu>(alpha, limit, gate, up, out, n);
    case ffn_op::geglu:
        return glu_vector<ffn_op::geglu>(alpha, limit, gate, up, out, n);
    case ffn_op::geglu_quick:
        return glu_vector<ffn_op::geglu_quick>(alpha, limit, gate, up, out, n);
    case ffn_op::swiglu_oai:
        return glu_vector<ffn_op::swiglu_oai>(alpha, limit, gate, up, out, n);
    case ffn_op::swiglu_clamp:
        return glu_vector<ffn_op::swiglu_clamp>(alpha, limit, gate, up, out, n);
    case ffn_op::swiglu_limit:
        return glu_vector<ffn_op::swiglu_limit>(alpha, limit, gate, up, out, n);
    case ffn_op::silu:
        return glu_vector<ffn_op::silu>(alpha, limit, gate, up, out, n);
    case ffn_op::gelu:
        return glu_vector<ffn_op::gelu>(alpha, limit, gate, up, out, n);
    case ffn_op::gelu_quick:
        return glu_vector<ffn_op::gelu_quick>(alpha, limit, gate, up, out, n);
    default:
        return glu_scalar(op, alpha, limit, gate, up, out, n);
    }
}

void add_scaled(float * y, const float * x, float w, int64_t n, bool first) {
    const __m256 vw = _mm256_set1_ps(w);
    int64_t i       = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 wx = _mm256_mul_ps(vw, _mm256_loadu_ps(x + i));
        _mm256_storeu_ps(y + i, first ? wx : _mm256_add_ps(_mm256_loadu_ps(y + i), wx));
    }
    for (; i < n; ++i) {
        // one element through the same two roundings
        const __m128 wx = _mm_mul_ss(_mm_set_ss(w), _mm_set_ss(x[i]));
        y[i]            = _mm_cvtss_f32(first ? wx : _mm_add_ss(_mm_set_ss(y[i]), wx));
    }
}

constexpr type_kernels types[] = {
    {type_f32, dot_float<type_f32>, pack_float<type_f32>, gemm<gemm_float>},
    {type_f16, dot_float<type_f16>, pack_float<type_f16>, gemm<gemm_float>},
    {type_bf16, dot_float<type_bf16>, pack_float<type_bf16>, gemm<gemm_float>},
    {type_q4_0, dot_32<unit_q4_0>, pack_q4_0, gemm<gemm_32<kind_q4_0, false>>},
    {type_q4_1, dot_32<unit_q4_1>, pack_q4_1, gemm<gemm_32<kind_4_bit, true>>},
    {type_q8_0, dot_32<unit_q8_0>, pack_q8_0, gemm<gemm_32<kind_wide, false>>},
    {type_iq4_nl, dot_32<unit_iq4_nl>, pack_iq4_nl, gemm<gemm_32<kind_wide, false>>},
    {type_mxfp4, dot_32<unit_mxfp4>, pack_mxfp4, gemm<gemm_32<kind_mxfp4, false>>},
    {type_q4_k, dot_256<block_dot_q45_k<block_q4_k, false>>, pack_q45_k<block_q4_k, false>,
     gemm<gemm_256<kind_4_bit, true, false>>},
    {type_q5_k, dot_256<block_dot_q45_k<block_q5_k, true>>, pack_q45_k<block_q5_k, true>,
     gemm<gemm_256<kind_5_bit, true, false>>},
    {type_q6_k, dot_256<dot_q6_k>, pack_q6_k, gemm<gemm_256<kind_q6_k, false, true>>},
    {type_iq4_xs, dot_256<dot_iq4_xs>, pack_iq4_xs, gemm<gemm_256<kind_wide, false, false>>},
    {-1, nullptr, nullptr, nullptr},
};

} // namespace

} // namespace hybrimoe::kernels
