// AVX-512 VNNI. Everything here has internal linkage: nothing compiled with these flags may be shared by the linker.
//
// Row-stream dot: one row at a time, one sequential stream of weights, prefetched ahead. Packed tile: bytes of 16 rows
// are transposed while still packed, then unpacked, so that one dpbusd serves 16 rows and one token.
#include <immintrin.h>

#include "block_layout.h"
#include "kernel_set.h"
#include "row_streams.h"

namespace hybrimoe::kernels {

namespace {

// ---------------------------------------------------------------------------------------------------------------
// small pieces

constexpr float smallest_amax = 1e-36f;
constexpr float largest_float = 3.402823466e+38f;

inline __m512i load512(const void * p) {
    return _mm512_loadu_si512(p);
}
inline __m128i load128(const void * p) {
    return _mm_loadu_si128(static_cast<const __m128i *>(p));
}
inline __m256i load256(const void * p) {
    return _mm256_loadu_si256(static_cast<const __m256i *>(p));
}

inline __m512i lanes(__m128i a, __m128i b, __m128i c, __m128i d) {
    __m512i v = _mm512_castsi128_si512(a);
    v         = _mm512_castsi256_si512(_mm256_inserti128_si256(_mm512_castsi512_si256(v), b, 1));
    v         = _mm512_inserti32x4(v, c, 2);
    return _mm512_inserti32x4(v, d, 3);
}

// 16 bytes of four blocks, one block a lane
inline __m512i load_lanes(const uint8_t * p, int stride) {
    return lanes(load128(p), load128(p + stride), load128(p + 2 * stride), load128(p + 3 * stride));
}

inline __m512i low_nibbles(__m512i v) {
    return _mm512_and_si512(v, _mm512_set1_epi8(15));
}
inline __m512i high_nibbles(__m512i v) {
    return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15));
}

// Non-linear 4-bit values plus 128
inline __m512i iq4_table() {
    return _mm512_xor_si512(_mm512_broadcast_i32x4(load128(iq4_values)), _mm512_set1_epi8(-128));
}

inline __m512 bits_as_float(__m512i v) {
    return _mm512_castsi512_ps(v);
}

inline __m512 zero_f() {
    return _mm512_setzero_ps();
}

// Word w of a 64-byte piece for each of four lanes, as floats repeated over the lane
struct lane_words {
    short at[16];
};
constexpr lane_words words_every(int first, int stride) {
    lane_words w{};
    for (int i = 0; i < 16; ++i) {
        w.at[i] = static_cast<short>(first + stride * (i / 4));
    }
    return w;
}
inline __m512 lane_halves(__m512i piece, const lane_words & words) {
    const __m512i index = _mm512_castsi256_si512(load256(words.at));
    return _mm512_cvtph_ps(_mm512_castsi512_si256(_mm512_permutexvar_epi16(index, piece)));
}

template <int bytes> inline void prefetch(const uint8_t * p) {
    for (int i = 0; i < bytes; i += 64) {
        _mm_prefetch(reinterpret_cast<const char *>(p + i), _MM_HINT_T0);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// row-stream dot, 32 values a block: four blocks (a unit) at a time

// load: unsigned bytes in the order of row_unit128; scales: d, and m where has_min; w = d (q - zero) [+ m]
struct unit_q4_0 {
    static constexpr int type = type_q4_0, bytes = 4 * sizeof(block_q4_0);
    static constexpr float zero   = 8.0f;
    static constexpr bool has_min = false;
    static void load(const uint8_t * p, __m512i & lo, __m512i & hi) {
        const __m512i v = load_lanes(p + 2, sizeof(block_q4_0));
        lo              = low_nibbles(v);
        hi              = high_nibbles(v);
    }
    static void scales(const uint8_t * p, __m512 & d, __m512 &) {
        static constexpr lane_words at = words_every(0, sizeof(block_q4_0) / 2);
        d                              = lane_halves(load512(p), at);
    }
};

struct unit_q4_1 {
    static constexpr int type = type_q4_1, bytes = 4 * sizeof(block_q4_1);
    static constexpr float zero   = 0.0f;
    static constexpr bool has_min = true;
    static void load(const uint8_t * p, __m512i & lo, __m512i & hi) {
        const __m512i v = load_lanes(p + 4, sizeof(block_q4_1));
        lo              = low_nibbles(v);
        hi              = high_nibbles(v);
    }
    static void scales(const uint8_t * p, __m512 & d, __m512 & m) {
        static constexpr lane_words at_d = words_every(0, sizeof(block_q4_1) / 2);
        static constexpr lane_words at_m = words_every(1, sizeof(block_q4_1) / 2);
        const __m512i piece              = load512(p);
        d                                = lane_halves(piece, at_d);
        m                                = lane_halves(piece, at_m);
    }
};

struct unit_q8_0 {
    static constexpr int type = type_q8_0, bytes = 4 * sizeof(block_q8_0);
    static constexpr float zero   = 128.0f;
    static constexpr bool has_min = false;
    static void load(const uint8_t * p, __m512i & lo, __m512i & hi) {
        const __m512i flip = _mm512_set1_epi8(-128);
        lo                 = _mm512_xor_si512(load_lanes(p + 2, sizeof(block_q8_0)), flip);
        hi                 = _mm512_xor_si512(load_lanes(p + 18, sizeof(block_q8_0)), flip);
    }
    static void scales(const uint8_t * p, __m512 & d, __m512 &) {
        // Words 0 and 17 of the first 64 bytes, 2 and 19 of the next: 34 and 51 of both together.
        static constexpr lane_words at = words_every(0, sizeof(block_q8_0) / 2);
        const __m512i index            = _mm512_castsi256_si512(load256(at.at));
        const __m512i words            = _mm512_permutex2var_epi16(load512(p), index, load512(p + 64));
        d                              = _mm512_cvtph_ps(_mm512_castsi512_si256(words));
    }
};

struct unit_iq4_nl {
    static constexpr int type = type_iq4_nl, bytes = 4 * sizeof(block_iq4_nl);
    static constexpr float zero   = 128.0f;
    static constexpr bool has_min = false;
    static void load(const uint8_t * p, __m512i & lo, __m512i & hi) {
        const __m512i v = load_lanes(p + 2, sizeof(block_iq4_nl));
        lo              = _mm512_shuffle_epi8(iq4_table(), low_nibbles(v));
        hi              = _mm512_shuffle_epi8(iq4_table(), high_nibbles(v));
    }
    static void scales(const uint8_t * p, __m512 & d, __m512 & m) { unit_q4_0::scales(p, d, m); }
};

// E8M0 exponents of four 32-bit lanes: e < 2 are denormals
inline __m512 e8m0_half(__m512i e) {
    const __m512i normal   = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(1)), 23);
    const __m512i denormal = _mm512_sllv_epi32(_mm512_set1_epi32(0x00200000), e);
    return bits_as_float(_mm512_mask_mov_epi32(normal, _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(2)), denormal));
}

inline __m512i mxfp4_table() {
    return _mm512_add_epi8(_mm512_broadcast_i32x4(load128(mxfp4_values)), _mm512_set1_epi8(12));
}

struct unit_mxfp4 {
    static constexpr int type = type_mxfp4, bytes = 4 * sizeof(block_mxfp4);
    static constexpr float zero   = 12.0f;
    static constexpr bool has_min = false;
    static void load(const uint8_t * p, __m512i & lo, __m512i & hi) {
        const __m512i v = load_lanes(p + 1, sizeof(block_mxfp4));
        lo              = _mm512_shuffle_epi8(mxfp4_table(), low_nibbles(v));
        hi              = _mm512_shuffle_epi8(mxfp4_table(), high_nibbles(v));
    }
    static void scales(const uint8_t * p, __m512 & d, __m512 &) {
        // Bytes 0, 17, 34 and 51: the low or the high byte of words 0, 8, 17 and 25, brought to a float's exponent.
        const __m512i words    = _mm512_set_epi32(25, 25, 25, 25, 17, 17, 17, 17, 8, 8, 8, 8, 0, 0, 0, 0);
        const __m512i to_top   = _mm512_set_epi32(15, 15, 15, 15, 23, 23, 23, 23, 15, 15, 15, 15, 23, 23, 23, 23);
        const __m512i shifted  = _mm512_sllv_epi32(_mm512_permutexvar_epi16(words, load512(p)), to_top);
        const __m512i exponent = _mm512_and_si512(shifted, _mm512_set1_epi32(0x7f800000));
        const __m512i normal   = _mm512_sub_epi32(exponent, _mm512_set1_epi32(1 << 23));
        const __mmask16 small  = _mm512_cmplt_epi32_mask(exponent, _mm512_set1_epi32(2 << 23));
        d                      = bits_as_float(
            _mm512_mask_add_epi32(normal, small, _mm512_set1_epi32(0x00200000), _mm512_srli_epi32(exponent, 2)));
    }
};

// present: the elements whose blocks belong to the row; scales of others are taken as zero
template <class unit, int n_x>
inline void add_unit(const uint8_t * p, const row_unit128 * const * x, int64_t u, __m512 * sum, __m512 * offset,
                     __mmask16 present = 0xffff) {
    __m512i lo;
    __m512i hi;
    __m512 d;
    __m512 m = zero_f();
    unit::load(p, lo, hi);
    unit::scales(p, d, m);
    d = _mm512_maskz_mov_ps(present, d);
    m = _mm512_maskz_mov_ps(present, m);
    for (int t = 0; t < n_x; ++t) {
        const row_unit128 & xu = x[t][u];
        __m512i acc            = _mm512_dpbusd_epi32(_mm512_setzero_si512(), lo, load512(xu.lo));
        acc                    = _mm512_dpbusd_epi32(acc, hi, load512(xu.hi));
        const __m512 xd        = _mm512_load_ps(xu.d);
        const __m512 s         = _mm512_mul_ps(d, xd);
        sum[t]                 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), s, sum[t]);
        const __m512 b         = unit::has_min ? _mm512_mul_ps(m, xd) : s;
        offset[t]              = _mm512_fmadd_ps(b, _mm512_load_ps(xu.sum), offset[t]);
    }
}

template <class unit, int n_x> struct units_dot {
    static constexpr int streams = n_x == 1 ? 4 : 2;

    template <int n, class rows> static void add(const dot_args & args, const rows & at) {
        const int64_t n_units   = args.n_values / 128;
        const size_t tail_bytes = static_cast<size_t>(args.n_values % 128 / 32) * (unit::bytes / 4);
        const uint8_t * end     = args.rows + static_cast<size_t>(args.n_rows) * args.row_bytes;
        const row_unit128 * x[n_x];
        for (int t = 0; t < n_x; ++t) {
            x[t] = static_cast<const row_unit128 *>(args.x[t]);
        }
        __m512 sum[n][n_x];
        __m512 offset[n][n_x];
        for (int i = 0; i < n; ++i) {
            for (int t = 0; t < n_x; ++t) {
                sum[i][t] = offset[i][t] = zero_f();
            }
        }
        size_t byte = 0;
        for (int64_t u = 0; u < n_units; ++u, byte += unit::bytes) {
            each<n>([&](auto i) {
                prefetch<unit::bytes>(at.fetch[i] + byte);
                add_unit<unit, n_x>(at.row[i] + byte, x, u, sum[i], offset[i]);
            });
        }
        if (tail_bytes != 0) {
            const auto tail_lanes = static_cast<__mmask16>((1u << (args.n_values % 128 / 8)) - 1);
            each<n>([&](auto i) {
                // A whole unit reads past the row, and at the last rows past what may be the end of the file map.
                alignas(64) uint8_t copy[unit::bytes];
                const uint8_t * p = at.row[i] + byte;
                if (p + unit::bytes > end) {
                    memset(copy, 0, sizeof(copy));
                    memcpy(copy, p, tail_bytes);
                    p = copy;
                }
                add_unit<unit, n_x>(p, x, n_units, sum[i], offset[i], tail_lanes);
            });
        }
        for (int i = 0; i < n; ++i) {
            for (int t = 0; t < n_x; ++t) {
                const __m512 total       = unit::has_min
                                               ? _mm512_add_ps(sum[i][t], offset[i][t])
                                               : _mm512_fnmadd_ps(_mm512_set1_ps(unit::zero), offset[i][t], sum[i][t]);
                args.out[t][at.index[i]] = _mm512_reduce_add_ps(total);
            }
        }
    }
};

template <class unit> void dot_32(const dot_args & args) {
    args.n_x == 1 ? walk_rows<units_dot<unit, 1>>(args) : walk_rows<units_dot<unit, 2>>(args);
}

// ---------------------------------------------------------------------------------------------------------------
// row-stream dot, 256 values a block. 64 values a register in natural order; the nibbles of a piece are brought there
// by loading it twice (a broadcast costs nothing) and shifting the halves by different amounts.

inline __m512i twice_256(const uint8_t * p) {
    return _mm512_broadcast_i64x4(load256(p));
}

inline __m512i shift_by_half(__m512i v, short low, short high) {
    const __m512i by = _mm512_inserti64x4(_mm512_set1_epi16(low), _mm256_set1_epi16(high), 1);
    return _mm512_srlv_epi16(v, by);
}

// Scale 2c over the low half, 2c + 1 over the high half
inline __m512 pair_of(__m512 scales, int c) {
    const __m512i index = _mm512_inserti64x4(_mm512_set1_epi32(2 * c), _mm256_set1_epi32(2 * c + 1), 1);
    return _mm512_permutexvar_ps(index, scales);
}

// Accumulators of one token. Two sums: one would be a chain of four additions a block.
struct sums_256 {
    __m512 sum[2];
    __m512 offset;
};

// (v & mask) | bits
inline __m512i and_or(__m512i v, __m512i mask, __m512i bits) {
    return _mm512_ternarylogic_epi32(v, mask, bits, 0xea);
}

// Eight scales, times d, and eight mins, times dmin, of a Q4_K or Q5_K block: unpack_k_scales in one register
inline __m512 k_scales_and_mins(const uint8_t * p) {
    const __m128i head = load128(p); // d and dmin, then the dwords s0, s1, s2
    const __m128i low  = _mm_srlv_epi32(_mm_shuffle_epi32(head, _MM_SHUFFLE(3, 2, 3, 1)), _mm_setr_epi32(0, 0, 0, 4));
    const __m128i high = _mm_srli_epi32(_mm_shuffle_epi32(head, _MM_SHUFFLE(2, 0, 1, 0)), 2);
    const __m128i bytes =
        _mm_or_si128(_mm_and_si128(low, _mm_setr_epi32(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f)),
                     _mm_and_si128(high, _mm_setr_epi32(0, 0x30303030, 0, 0x30303030)));
    const __m512 d_dmin = _mm512_castps128_ps512(_mm_cvtph_ps(head));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), pair_of(d_dmin, 0));
}

template <class block_q45, bool fifth_bit> struct block_dot_q45_k {
    static constexpr int bytes  = sizeof(block_q45);
    static constexpr float zero = 1.0f; // offset is the sum of the mins

    template <int n_x> static void add(const uint8_t * p, const row_block256 * const * x, int64_t b, sums_256 * s) {
        const __m512 scales = k_scales_and_mins(p);
        __m512i q[4];
        const uint8_t * qs = p + (fifth_bit ? 48 : 16);
        for (int c = 0; c < 4; ++c) {
            q[c] = low_nibbles(shift_by_half(twice_256(qs + 32 * c), 0, 4));
        }
        if (fifth_bit) {
            const __m512i qh = twice_256(p + 16);
            for (int c = 0; c < 4; ++c) {
                const __m512i bit = _mm512_inserti64x4(_mm512_set1_epi8(static_cast<char>(1 << (2 * c))),
                                                       _mm256_set1_epi8(static_cast<char>(2 << (2 * c))), 1);
                q[c] = _mm512_mask_add_epi8(q[c], _mm512_test_epi8_mask(qh, bit), q[c], _mm512_set1_epi8(16));
            }
        }
        for (int t = 0; t < n_x; ++t) {
            const row_block256 & xb = x[t][b];
            const __m512 ds         = _mm512_mul_ps(scales, _mm512_set1_ps(xb.d));
            for (int c = 0; c < 4; ++c) {
                const __m512i acc = _mm512_dpbusd_epi32(_mm512_setzero_si512(), q[c], load512(xb.q + 64 * c));
                s[t].sum[c % 2]   = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), pair_of(ds, c), s[t].sum[c % 2]);
            }
            // The upper half of ds, the mins, meets sum32.
            const void * sums = reinterpret_cast<const uint8_t *>(&xb) + offsetof(row_block256, sum32) - 32;
            s[t].offset       = _mm512_mask3_fmadd_ps(ds, _mm512_loadu_ps(sums), s[t].offset, 0xff00);
        }
    }
};

using dot_q4_k = block_dot_q45_k<block_q4_k, false>;
using dot_q5_k = block_dot_q45_k<block_q5_k, true>;

struct dot_q6_k {
    static constexpr int bytes  = sizeof(block_q6_k);
    static constexpr float zero = 32.0f;

    template <int n_x> static void add(const uint8_t * p, const row_block256 * const * x, int64_t b, sums_256 * s) {
        const __m512 scale16 = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load128(p + 192)));
        const float d        = _cvtsh_ss(load_u16(p + 208));
        const __m512i top    = _mm512_set1_epi8(0x30);

        __m512i q[4];
        for (int half = 0; half < 2; ++half) {
            const __m512i ql = load512(p + 64 * half);
            const __m512i qh = twice_256(p + 128 + 32 * half);
            const __m512i by = _mm512_inserti64x4(_mm512_set1_epi16(4), _mm256_set1_epi16(2), 1);
            const __m512i h0 = _mm512_and_si512(_mm512_sllv_epi16(qh, by), top);
            const __m512i h1 = _mm512_and_si512(shift_by_half(qh, 0, 2), top);
            q[2 * half]      = and_or(ql, _mm512_set1_epi8(15), h0);
            q[2 * half + 1]  = and_or(_mm512_srli_epi16(ql, 4), _mm512_set1_epi8(15), h1);
        }
        for (int t = 0; t < n_x; ++t) {
            const row_block256 & xb = x[t][b];
            const __m512 ds         = _mm512_mul_ps(scale16, _mm512_set1_ps(d * xb.d));
            for (int c = 0; c < 4; ++c) {
                const __m512i acc = _mm512_dpbusd_epi32(_mm512_setzero_si512(), q[c], load512(xb.q + 64 * c));
                const __m512i index =
                    _mm512_set_epi32(4 * c + 3, 4 * c + 3, 4 * c + 3, 4 * c + 3, 4 * c + 2, 4 * c + 2, 4 * c + 2,
                                     4 * c + 2, 4 * c + 1, 4 * c + 1, 4 * c + 1, 4 * c + 1, 4 * c, 4 * c, 4 * c, 4 * c);
                s[t].sum[c % 2] =
                    _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), _mm512_permutexvar_ps(index, ds), s[t].sum[c % 2]);
            }
            s[t].offset = _mm512_fmadd_ps(ds, _mm512_load_ps(xb.sum16), s[t].offset);
        }
    }
};

struct dot_iq4_xs {
    static constexpr int bytes  = sizeof(block_iq4_xs);
    static constexpr float zero = 128.0f;

    template <int n_x> static void add(const uint8_t * p, const row_block256 * const * x, int64_t b, sums_256 * s) {
        const uint64_t low  = _pdep_u64(load_u32(p + 4), 0x0f0f0f0f0f0f0f0full);
        const uint64_t high = _pdep_u64(load_u16(p + 2), 0x3030303030303030ull);
        const __m256i raw   = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(low | high)));
        const __m256 scale8 = _mm256_cvtepi32_ps(_mm256_sub_epi32(raw, _mm256_set1_epi32(32)));
        const float d       = _cvtsh_ss(load_u16(p));
        const __m512i by    = _mm512_set_epi64(0x0004000400040004, 0x0004000400040004, 0, 0, 0x0004000400040004,
                                               0x0004000400040004, 0, 0);
        __m512i q[4];
        for (int c = 0; c < 4; ++c) {
            const uint8_t * qs = p + 8 + 32 * c;
            const __m512i v =
                _mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(load128(qs)), 0xff00, load128(qs + 16));
            q[c] = _mm512_shuffle_epi8(iq4_table(), low_nibbles(_mm512_srlv_epi16(v, by)));
        }
        for (int t = 0; t < n_x; ++t) {
            const row_block256 & xb = x[t][b];
            const __m256 ds         = _mm256_mul_ps(scale8, _mm256_set1_ps(d * xb.d));
            for (int c = 0; c < 4; ++c) {
                const __m512i acc = _mm512_dpbusd_epi32(_mm512_setzero_si512(), q[c], load512(xb.q + 64 * c));
                const __m512 sc   = pair_of(_mm512_castps256_ps512(ds), c);
                s[t].sum[c % 2]   = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), sc, s[t].sum[c % 2]);
            }
            const __m256 off = _mm256_fmadd_ps(ds, _mm256_load_ps(xb.sum32), _mm512_castps512_ps256(s[t].offset));
            s[t].offset      = _mm512_zextps256_ps512(off);
        }
    }
};

template <class block, int n_x> struct blocks_dot {
    static constexpr int streams = n_x == 1 ? 4 : 2;

    template <int n, class rows> static void add(const dot_args & args, const rows & at) {
        const row_block256 * x[n_x];
        for (int t = 0; t < n_x; ++t) {
            x[t] = static_cast<const row_block256 *>(args.x[t]);
        }
        sums_256 s[n][n_x];
        for (int i = 0; i < n; ++i) {
            for (int t = 0; t < n_x; ++t) {
                s[i][t].sum[0] = s[i][t].sum[1] = s[i][t].offset = zero_f();
            }
        }
        size_t byte = 0;
        for (int64_t b = 0; b < args.n_values / 256; ++b, byte += block::bytes) {
            each<n>([&](auto i) {
                prefetch<block::bytes>(at.fetch[i] + byte);
                block::template add<n_x>(at.row[i] + byte, x, b, s[i]);
            });
        }
        for (int i = 0; i < n; ++i) {
            for (int t = 0; t < n_x; ++t) {
                const __m512 sum         = _mm512_add_ps(s[i][t].sum[0], s[i][t].sum[1]);
                const __m512 total       = _mm512_fnmadd_ps(_mm512_set1_ps(block::zero), s[i][t].offset, sum);
                args.out[t][at.index[i]] = _mm512_reduce_add_ps(total);
            }
        }
    }
};

template <class block> void dot_256(const dot_args & args) {
    args.n_x == 1 ? walk_rows<blocks_dot<block, 1>>(args) : walk_rows<blocks_dot<block, 2>>(args);
}

// ---------------------------------------------------------------------------------------------------------------
// row-stream dot, float types

template <int type> inline __m512 load_floats(const uint8_t * row, int64_t i, __mmask16 mask) {
    if constexpr (type == type_f32) {
        return _mm512_maskz_loadu_ps(mask, row + 4 * i);
    } else {
        const __m256i v = _mm256_maskz_loadu_epi16(mask, row + 2 * i);
        if constexpr (type == type_f16) {
            return _mm512_cvtph_ps(v);
        } else {
            return bits_as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
        }
    }
}

constexpr int float_bytes(int type) {
    return type == type_f32 ? 4 : 2;
}

inline __mmask16 first_lanes(int64_t n) {
    return static_cast<__mmask16>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1);
}

template <int type, int n_x> struct floats_dot {
    static constexpr int streams = n_x == 1 ? 4 : 2;

    template <int n, class rows> static void add(const dot_args & args, const rows & at) {
        __m512 sum[n][n_x][4];
        for (int i = 0; i < n; ++i) {
            for (int t = 0; t < n_x; ++t) {
                sum[i][t][0] = sum[i][t][1] = sum[i][t][2] = sum[i][t][3] = zero_f();
            }
        }
        const auto x_at = [&args](int t, int64_t k) { return static_cast<const float *>(args.x[t]) + k; };
        int64_t k       = 0;
        for (; k + 64 <= args.n_values; k += 64) {
            each<n>([&](auto i) {
                prefetch<64 * float_bytes(type)>(at.fetch[i] + k * float_bytes(type));
                each<4>([&](auto j) {
                    const __m512 w = load_floats<type>(at.row[i], k + 16 * j, 0xffff);
                    for (int t = 0; t < n_x; ++t) {
                        sum[i][t][j] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x_at(t, k + 16 * j)), sum[i][t][j]);
                    }
                });
            });
        }
        for (; k < args.n_values; k += 16) {
            const __mmask16 mask = first_lanes(args.n_values - k);
            each<n>([&](auto i) {
                const __m512 w = load_floats<type>(at.row[i], k, mask);
                for (int t = 0; t < n_x; ++t) {
                    sum[i][t][0] = _mm512_fmadd_ps(w, _mm512_maskz_loadu_ps(mask, x_at(t, k)), sum[i][t][0]);
                }
            });
        }
        for (int i = 0; i < n; ++i) {
            for (int t = 0; t < n_x; ++t) {
                const __m512 * part      = sum[i][t];
                args.out[t][at.index[i]] = _mm512_reduce_add_ps(
                    _mm512_add_ps(_mm512_add_ps(part[0], part[1]), _mm512_add_ps(part[2], part[3])));
            }
        }
    }
};

template <int type> void dot_float(const dot_args & args) {
    args.n_x == 1 ? walk_rows<floats_dot<type, 1>>(args) : walk_rows<floats_dot<type, 2>>(args);
}

// ---------------------------------------------------------------------------------------------------------------
// packing a tile

struct tile {
    const uint8_t * row[16];

    explicit tile(const tile_source & source) {
        for (int r = 0; r < 16; ++r) {
            const int present = r < source.n_rows ? r : source.n_rows - 1;
            row[r]            = source.rows + static_cast<size_t>(present) * source.row_bytes;
        }
    }

    // 16 bytes at `at` of all rows: out[c] holds dword c of the 16 rows
    void transpose16(int64_t at, __m512i out[4]) const {
        const __m512i a =
            lanes(load128(row[0] + at), load128(row[4] + at), load128(row[8] + at), load128(row[12] + at));
        const __m512i b =
            lanes(load128(row[1] + at), load128(row[5] + at), load128(row[9] + at), load128(row[13] + at));
        const __m512i c =
            lanes(load128(row[2] + at), load128(row[6] + at), load128(row[10] + at), load128(row[14] + at));
        const __m512i d =
            lanes(load128(row[3] + at), load128(row[7] + at), load128(row[11] + at), load128(row[15] + at));
        const __m512i ab0 = _mm512_unpacklo_epi32(a, b);
        const __m512i ab1 = _mm512_unpackhi_epi32(a, b);
        const __m512i cd0 = _mm512_unpacklo_epi32(c, d);
        const __m512i cd1 = _mm512_unpackhi_epi32(c, d);
        out[0]            = _mm512_unpacklo_epi64(ab0, cd0);
        out[1]            = _mm512_unpackhi_epi64(ab0, cd0);
        out[2]            = _mm512_unpacklo_epi64(ab1, cd1);
        out[3]            = _mm512_unpackhi_epi64(ab1, cd1);
    }
};

// 16-bit (or 8-bit) scales of all rows, collected ahead of the loop that uses them: gathers are slow on many CPUs, and
// a load that follows 16 short stores at once would wait for them.
template <class word> struct scale_words {
    alignas(64) word at[pack_values_int8 / 32][tile_rows];

    scale_words(const tile & w, int64_t first_byte, int64_t stride, int64_t n) {
        for (int64_t i = 0; i < n; ++i) {
            for (int r = 0; r < 16; ++r) {
                memcpy(&at[i][r], w.row[r] + first_byte + i * stride, sizeof(word));
            }
        }
    }
};

inline __m512 floats_of(const uint16_t (&halves)[tile_rows]) {
    return _mm512_cvtph_ps(load256(halves));
}

// Packed with the cheapest offset: or-ed in while the nibble is cut out
constexpr int q4_0_offset = 112 + 8;
constexpr int q6_k_offset = 64 + 32;

// The half in the low 16 bits of each dword
inline __m512 halves_to_floats(__m512i v) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v));
}

inline void store_q(packed_group * out, int c, __m512i v) {
    _mm512_store_si512(out->q[c], v);
}

// Four-bit blocks of 32; to_byte maps bytes whose low four bits are the value
template <class to_byte_fn>
inline void pack_nibbles(const tile & w, int64_t at, packed_group * out, to_byte_fn to_byte) {
    __m512i v[4];
    w.transpose16(at, v);
    for (int c = 0; c < 4; ++c) {
        store_q(out, c, to_byte(v[c]));
        store_q(out, 4 + c, to_byte(_mm512_srli_epi16(v[c], 4)));
    }
}

// All groups of a tile whose blocks are a half-precision scale and, from byte qs on, 16 bytes of nibbles
template <class block, int qs, class to_byte_fn>
inline void pack_half_and_nibbles(const tile_source & source, int64_t first_value, int64_t n_values, packed_group * out,
                                  to_byte_fn to_byte) {
    constexpr int64_t size = sizeof(block);
    const tile w(source);
    const int64_t first = first_value / 32 * size;
    const scale_words<uint16_t> d(w, first, size, n_values / 32);
    for (int64_t g = 0; g < n_values / 32; ++g) {
        pack_nibbles(w, first + g * size + qs, out + g, to_byte);
        _mm512_store_ps(out[g].a, floats_of(d.at[g]));
    }
}

void pack_q4_0(const tile_source & source, int64_t first_value, int64_t n_values, void * packed) {
    const __m512i low  = _mm512_set1_epi8(15);
    const __m512i bits = _mm512_set1_epi8(112);
    pack_half_and_nibbles<block_q4_0, 2>(source, first_value, n_values, static_cast<packed_group *>(packed),
                                         [low, bits](__m512i v) { return and_or(v, low, bits); });
}

void pack_q4_1(const tile_source & source, int64_t first_value, int64_t n_values, void * packed) {
    constexpr int64_t size = sizeof(block_q4_1);
    auto * out             = static_cast<packed_group *>(packed);
    pack_half_and_nibbles<block_q4_1, 4>(source, first_value, n_values, out, [](__m512i v) { return low_nibbles(v); });
    const scale_words<uint16_t> m(tile(source), first_value / 32 * size + 2, size, n_values / 32);
    for (int64_t g = 0; g < n_values / 32; ++g) {
        _mm512_store_ps(out[g].b, floats_of(m.at[g]));
    }
}

void pack_iq4_nl(const tile_source & source, int64_t first_value, int64_t n_values, void * packed) {
    const __m512i table = iq4_table();
    pack_half_and_nibbles<block_iq4_nl, 2>(source, first_value, n_values, static_cast<packed_group *>(packed),
                                           [table](__m512i v) { return _mm512_shuffle_epi8(table, low_nibbles(v)); });
}

void pack_mxfp4(const tile_source & source, int64_t first_value, int64_t n_values, void * packed) {
    constexpr int64_t size = sizeof(block_mxfp4);
    const __m512i table    = _mm512_add_epi8(mxfp4_table(), _mm512_set1_epi8(116));
    const tile w(source);
    const int64_t first = first_value / 32 * size;
    const scale_words<uint8_t> e(w, first, size, n_values / 32);
    auto * out = static_cast<packed_group *>(packed);
    for (int64_t g = 0; g < n_values / 32; ++g) {
        pack_nibbles(w, first + g * size + 1, out + g,
                     [table](__m512i v) { return _mm512_shuffle_epi8(table, low_nibbles(v)); });
        _mm512_store_ps(out[g].a, e8m0_half(_mm512_cvtepu8_epi32(load128(e.at[g]))));
    }
}

void pack_q8_0(const tile_source & source, int64_t first_value, int64_t n_values, void * packed) {
    constexpr int64_t size = sizeof(block_q8_0);
    const tile w(source);
    const int64_t first = first_value / 32 * size;
    const scale_words<uint16_t> d(w, first, size, n_values / 32);
    const __m512i flip = _mm512_set1_epi8(-128);
    auto * out         = static_cast<packed_group *>(packed);
    for (int64_t g = 0; g < n_values / 32; ++g) {
        for (int half = 0; half < 2; ++half) {
            __m512i v[4];
            w.transpose16(first + g * size + 2 + 16 * half, v);
            for (int c = 0; c < 4; ++c) {
                store_q(out + g, 4 * half + c, _mm512_xor_si512(v[c], flip));
            }
        }
        _mm512_store_ps(out[g].a, floats_of(d.at[g]));
    }
}

// Byte i of every dword as a float
inline __m512 byte_as_float(__m512i v, int i) {
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srl_epi32(v, _mm_cvtsi32_si128(8 * i)), _mm512_set1_epi32(255)));
}

inline __m512 signed_byte_as_float(__m512i v, int i) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_sll_epi32(v, _mm_cvtsi32_si128(24 - 8 * i)), 24));
}

// a = d scale, b = -dmin min, of the eight groups of one Q4_K or Q5_K block
inline void pack_k_scales(const tile & w, int64_t at, packed_group * out) {
    __m512i v[4];
    w.transpose16(at, v);
    const __m512i m6 = _mm512_set1_epi32(0x3f3f3f3f);
    const __m512i m4 = _mm512_set1_epi32(0x0f0f0f0f);
    const __m512i m2 = _mm512_set1_epi32(0x03030303);
    const auto top2  = [m2](__m512i x) { return _mm512_slli_epi32(_mm512_and_si512(_mm512_srli_epi32(x, 6), m2), 4); };
    const __m512i scales[2] = {_mm512_and_si512(v[1], m6), _mm512_or_si512(_mm512_and_si512(v[3], m4), top2(v[1]))};
    const __m512i mins[2]   = {_mm512_and_si512(v[2], m6),
                               _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(v[3], 4), m4), top2(v[2]))};
    const __m512 d          = halves_to_floats(v[0]);
    const __m512 minus_dmin = _mm512_sub_ps(zero_f(), halves_to_floats(_mm512_srli_epi32(v[0], 16)));
    for (int g = 0; g < 8; ++g) {
        _mm512_store_ps(out[g].a, _mm512_mul_ps(d, byte_as_float(scales[g / 4], g % 4)));
        _mm512_store_ps(out[g].b, _mm512_mul_ps(minus_dmin, byte_as_float(mins[g / 4], g % 4)));
    }
}

template <class block_q45, bool fifth_bit>
void pack_q45_k(const tile_source & source, int64_t first_value, int64_t n_values, void * packed) {
    const tile w(source);
    const __m512i bit5 = _mm512_set1_epi8(16);
    auto * out         = static_cast<packed_group *>(packed);
    for (int64_t b = 0; b < n_values / 256; ++b, out += 8) {
        const int64_t at = (first_value / 256 + b) * static_cast<int64_t>(sizeof(block_q45));
        pack_k_scales(w, at, out);
        __m512i qh[8];
        if (fifth_bit) {
            w.transpose16(at + 16, qh);
            w.transpose16(at + 32, qh + 4);
        }
        const int64_t qs = at + (fifth_bit ? 48 : 16);
        for (int j = 0; j < 4; ++j) {
            for (int half = 0; half < 2; ++half) {
                __m512i v[4];
                w.transpose16(qs + 32 * j + 16 * half, v);
                for (int c = 0; c < 4; ++c) {
                    __m512i lo  = low_nibbles(v[c]);
                    __m512i hi  = high_nibbles(v[c]);
                    const int k = 4 * half + c;
                    if (fifth_bit) {
                        const __m512i h = _mm512_srl_epi16(qh[k], _mm_cvtsi32_si128(2 * j));
                        lo              = _mm512_or_si512(lo, _mm512_and_si512(_mm512_slli_epi16(h, 4), bit5));
                        hi              = _mm512_or_si512(hi, _mm512_and_si512(_mm512_slli_epi16(h, 3), bit5));
                    }
                    store_q(out + 2 * j, k, lo);
                    store_q(out + 2 * j + 1, k, hi);
                }
            }
        }
    }
}

void pack_q6_k(const tile_source & source, int64_t first_value, int64_t n_values, void * packed) {
    constexpr int64_t size = sizeof(block_q6_k);
    const tile w(source);
    const int64_t first = first_value / 256 * size;
    const scale_words<uint16_t> d_of_block(w, first + 208, size, n_values / 256);
    const __m512i low  = _mm512_set1_epi8(15);
    const __m512i top  = _mm512_set1_epi8(0x30);
    const __m512i bit6 = _mm512_set1_epi8(64);
    auto * out         = static_cast<packed_group *>(packed);
    for (int64_t b = 0; b < n_values / 256; ++b) {
        const int64_t at = first + b * size;
        const __m512 d   = floats_of(d_of_block.at[b]);
        __m512i scales[4];
        w.transpose16(at + 192, scales);
        for (int half = 0; half < 2; ++half, out += 4) {
            for (int g = 0; g < 4; ++g) {
                const int s = 8 * half + 2 * g;
                _mm512_store_ps(out[g].a, _mm512_mul_ps(d, signed_byte_as_float(scales[s / 4], s % 4)));
                _mm512_store_ps(out[g].b, _mm512_mul_ps(d, signed_byte_as_float(scales[s / 4], s % 4 + 1)));
            }
            for (int part = 0; part < 2; ++part) {
                __m512i l0[4];
                __m512i l1[4];
                __m512i h[4];
                w.transpose16(at + 64 * half + 16 * part, l0);
                w.transpose16(at + 64 * half + 32 + 16 * part, l1);
                w.transpose16(at + 128 + 32 * half + 16 * part, h);
                for (int c = 0; c < 4; ++c) {
                    const int k = 4 * part + c;
                    store_q(out, k, and_or(l0[c], low, and_or(_mm512_slli_epi16(h[c], 4), top, bit6)));
                    store_q(out + 1, k, and_or(l1[c], low, and_or(_mm512_slli_epi16(h[c], 2), top, bit6)));
                    store_q(out + 2, k, and_or(_mm512_srli_epi16(l0[c], 4), low, and_or(h[c], top, bit6)));
                    store_q(out + 3, k,
                            and_or(_mm512_srli_epi16(l1[c], 4), low, and_or(_mm512_srli_epi16(h[c], 2), top, bit6)));
                }
            }
        }
    }
}

void pack_iq4_xs(const tile_source & source, int64_t first_value, int64_t n_values, void * packed) {
    const tile w(source);
    const __m512i table = iq4_table();
    auto * out          = static_cast<packed_group *>(packed);
    for (int64_t b = 0; b < n_values / 256; ++b, out += 8) {
        const int64_t at = (first_value / 256 + b) * static_cast<int64_t>(sizeof(block_iq4_xs));
        __m512i head[4]; // d and high scale bits, low scale bits, eight bytes of values
        w.transpose16(at, head);
        const __m512 d = halves_to_floats(head[0]);
        for (int g = 0; g < 8; ++g) {
            const __m512i l4 =
                _mm512_and_si512(_mm512_srl_epi32(head[1], _mm_cvtsi32_si128(4 * g)), _mm512_set1_epi32(15));
            const __m512i h2 =
                _mm512_and_si512(_mm512_srl_epi32(head[0], _mm_cvtsi32_si128(16 + 2 * g)), _mm512_set1_epi32(3));
            const __m512i s = _mm512_sub_epi32(_mm512_or_si512(l4, _mm512_slli_epi32(h2, 4)), _mm512_set1_epi32(32));
            _mm512_store_ps(out[g].a, _mm512_mul_ps(d, _mm512_cvtepi32_ps(s)));
            pack_nibbles(w, at + 8 + 16 * g, out + g,
                         [table](__m512i v) { return _mm512_shuffle_epi8(table, low_nibbles(v)); });
        }
    }
}

template <int type> void pack_float(const tile_source & source, int64_t first_value, int64_t n_values, void * packed) {
    const tile w(source);
    auto * out = static_cast<float *>(packed);
    int64_t i  = 0;
    for (; i + 16 <= n_values; i += 16) {
        // 16 x 16 transpose of converted values, by way of 4 x 4 blocks
        __m512 v[16];
        for (int r = 0; r < 16; ++r) {
            v[r] = load_floats<type>(w.row[r], first_value + i, 0xffff);
        }
        for (int q = 0; q < 4; ++q) {
            // lanes: values 4l..4l+3 of rows 4q..4q+3
            const __m512d a   = _mm512_castps_pd(_mm512_unpacklo_ps(v[4 * q], v[4 * q + 1]));
            const __m512d b   = _mm512_castps_pd(_mm512_unpackhi_ps(v[4 * q], v[4 * q + 1]));
            const __m512d c   = _mm512_castps_pd(_mm512_unpacklo_ps(v[4 * q + 2], v[4 * q + 3]));
            const __m512d d   = _mm512_castps_pd(_mm512_unpackhi_ps(v[4 * q + 2], v[4 * q + 3]));
            const __m512 t[4] = {_mm512_castpd_ps(_mm512_unpacklo_pd(a, c)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, c)),
                                 _mm512_castpd_ps(_mm512_unpacklo_pd(b, d)),
                                 _mm512_castpd_ps(_mm512_unpackhi_pd(b, d))};
            for (int j = 0; j < 4; ++j) {
                float * to = out + (i + j) * tile_rows + 4 * q;
                _mm_store_ps(to, _mm512_castps512_ps128(t[j]));
                _mm_store_ps(to + 4 * tile_rows, _mm512_extractf32x4_ps(t[j], 1));
                _mm_store_ps(to + 8 * tile_rows, _mm512_extractf32x4_ps(t[j], 2));
                _mm_store_ps(to + 12 * tile_rows, _mm512_extractf32x4_ps(t[j], 3));
            }
        }
    }
    for (; i < n_values; ++i) {
        for (int r = 0; r < 16; ++r) {
            out[i * tile_rows + r] = _mm512_cvtss_f32(load_floats<type>(w.row[r], first_value + i, 1));
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// the 16 x 8 tile

inline __m512i bytes_of_token(const int8_t * p) {
    return _mm512_set1_epi32(static_cast<int>(load_u32(p)));
}

template <int n_t> inline void load_c(__m512 * sum, const float * c, int64_t stride, bool first) {
    for (int t = 0; t < n_t; ++t) {
        sum[t] = first ? zero_f() : _mm512_loadu_ps(c + t * stride);
    }
}

template <int n_t> inline void store_c(const __m512 * sum, float * c, int64_t stride) {
    for (int t = 0; t < n_t; ++t) {
        _mm512_storeu_ps(c + t * stride, sum[t]);
    }
}

// Products of values [4 first, 4 last) of one group, added to acc
template <int n_t, int first, int last>
inline void tile_products(const packed_group & w, const int8_t (&x)[8][panel_tokens][4], __m512i * acc) {
#pragma GCC unroll 8
    for (int k = first; k < last; ++k) {
        const __m512i q = _mm512_load_si512(w.q[k]);
#pragma GCC unroll 8
        for (int t = 0; t < n_t; ++t) {
            acc[t] = _mm512_dpbusd_epi32(acc[t], q, bytes_of_token(x[k][t]));
        }
    }
}

template <int n_t> inline void tile_start(const int32_t * start, __m512i * acc) {
#pragma GCC unroll 8
    for (int t = 0; t < n_t; ++t) {
        acc[t] = start != nullptr ? _mm512_set1_epi32(start[t]) : _mm512_setzero_si512();
    }
}

struct gemm_args {
    const void * packed;
    const void * panel;
    int64_t n_values;
    float * c;
    int64_t c_stride;
    bool first;
};

enum class kind_32 { offset_128, q4_0, mins };

template <kind_32 kind> struct gemm_32 {
    template <int n_t> static void run(const gemm_args & args) {
        const auto * w = static_cast<const packed_group *>(args.packed);
        const auto * x = static_cast<const panel_group32 *>(args.panel);
        __m512 sum[n_t];
        load_c<n_t>(sum, args.c, args.c_stride, args.first);
        for (int64_t g = 0; g < args.n_values / 32; ++g, ++w, ++x) {
            __m512i acc[n_t];
            tile_start<n_t>(kind == kind_32::mins ? nullptr : kind == kind_32::q4_0 ? x->start_q4_0 : x->start, acc);
            tile_products<n_t, 0, 8>(*w, x->q, acc);
            const __m512 a = _mm512_load_ps(w->a);
#pragma GCC unroll 8
            for (int t = 0; t < n_t; ++t) {
                const __m512 s = _mm512_mul_ps(a, _mm512_set1_ps(x->d[t]));
                sum[t]         = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[t]), s, sum[t]);
            }
            if (kind == kind_32::mins) {
                const __m512 b = _mm512_load_ps(w->b);
#pragma GCC unroll 8
                for (int t = 0; t < n_t; ++t) {
                    sum[t] = _mm512_fmadd_ps(b, _mm512_set1_ps(x->d_sum[t]), sum[t]);
                }
            }
        }
        store_c<n_t>(sum, args.c, args.c_stride);
    }
};

enum class kind_256 { mins, one_scale, two_scales };

template <kind_256 kind> struct gemm_256 {
    template <int n_t> static void run(const gemm_args & args) {
        const auto * w = static_cast<const packed_group *>(args.packed);
        const auto * x = static_cast<const panel_block256 *>(args.panel);
        __m512 sum[n_t];
        load_c<n_t>(sum, args.c, args.c_stride, args.first);
        for (int64_t b = 0; b < args.n_values / 256; ++b, ++x) {
            __m512 part[n_t];
            for (int t = 0; t < n_t; ++t) {
                part[t] = zero_f();
            }
            for (int g = 0; g < 8; ++g, ++w) {
                const panel_group256 & xg = x->group[g];
                __m512i acc[n_t];
                if constexpr (kind == kind_256::two_scales) {
                    tile_start<n_t>(xg.start_q6_k[0], acc);
                    tile_products<n_t, 0, 4>(*w, xg.q, acc);
                    add_scaled_products<n_t>(acc, w->a, part);
                    tile_start<n_t>(xg.start_q6_k[1], acc);
                    tile_products<n_t, 4, 8>(*w, xg.q, acc);
                    add_scaled_products<n_t>(acc, w->b, part);
                } else {
                    tile_start<n_t>(kind == kind_256::mins ? nullptr : xg.start, acc);
                    tile_products<n_t, 0, 8>(*w, xg.q, acc);
                    add_scaled_products<n_t>(acc, w->a, part);
                    if (kind == kind_256::mins) {
                        const __m512 m = _mm512_load_ps(w->b);
#pragma GCC unroll 8
                        for (int t = 0; t < n_t; ++t) {
                            part[t] = _mm512_fmadd_ps(m, _mm512_set1_ps(xg.sum[t]), part[t]);
                        }
                    }
                }
            }
            for (int t = 0; t < n_t; ++t) {
                sum[t] = _mm512_fmadd_ps(part[t], _mm512_set1_ps(x->d[t]), sum[t]);
            }
        }
        store_c<n_t>(sum, args.c, args.c_stride);
    }

    template <int n_t> static void add_scaled_products(const __m512i * acc, const float * scale, __m512 * part) {
        const __m512 a = _mm512_load_ps(scale);
#pragma GCC unroll 8
        for (int t = 0; t < n_t; ++t) {
            part[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[t]), a, part[t]);
        }
    }
};

struct gemm_float {
    template <int n_t> static void run(const gemm_args & args) {
        const auto * w = static_cast<const float *>(args.packed);
        const auto * x = static_cast<const float *>(args.panel);
        __m512 sum[n_t];
        load_c<n_t>(sum, args.c, args.c_stride, args.first);
        for (int64_t k = 0; k < args.n_values; ++k, w += tile_rows, x += panel_tokens) {
            const __m512 wk = _mm512_load_ps(w);
#pragma GCC unroll 8
            for (int t = 0; t < n_t; ++t) {
                sum[t] = _mm512_fmadd_ps(wk, _mm512_set1_ps(x[t]), sum[t]);
            }
        }
        store_c<n_t>(sum, args.c, args.c_stride);
    }
};

// A token's arithmetic is the same for every n_t: results do not depend on the neighbours in its panel.
template <class kernel>
void gemm(const void * packed, const void * panel, int64_t n_values, int n_tokens, float * c, int64_t c_stride,
          bool first) {
    const gemm_args args = {packed, panel, n_values, c, c_stride, first};
    switch (n_tokens) {
    case 1:
        return kernel::template run<1>(args);
    case 2:
        return kernel::template run<2>(args);
    case 3:
        return kernel::template run<3>(args);
    case 4:
        return kernel::template run<4>(args);
    case 5:
        return kernel::template run<5>(args);
    case 6:
        return kernel::template run<6>(args);
    case 7:
        return kernel::template run<7>(args);
    default:
        return kernel::template run<8>(args);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// activations

inline __m512i magnitude_bits(__m512 x) {
    return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}

inline int sum_of_bytes(__m256i q) {
    const __m256i s = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), q);
    __m128i v       = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    v               = _mm_add_epi32(v, _mm_shuffle_epi32(v, 0x4e));
    v               = _mm_add_epi32(v, _mm_shuffle_epi32(v, 0xb1));
    return _mm_cvtsi128_si32(v);
}

void quantize_32(const float * x, int64_t n, void * row) {
    auto * out = static_cast<row_unit128 *>(row);
    for (int64_t b = 0; b < n / 32; ++b, x += 32) {
        row_unit128 & unit = out[b / 4];
        const int lane     = static_cast<int>(b % 4);
        const __m512 x0    = _mm512_loadu_ps(x);
        const __m512 x1    = _mm512_loadu_ps(x + 16);
        // As integers, NaN is above infinity: a non-finite value always reaches the scale.
        const float amax = bits_to_float(
            static_cast<uint32_t>(_mm512_reduce_max_epi32(_mm512_max_epi32(magnitude_bits(x0), magnitude_bits(x1)))));
        const bool normal  = amax >= smallest_amax && amax <= largest_float;
        const __m512 scale = _mm512_set1_ps(normal ? 127.0f / amax : 0.0f);
        const __m128i q0   = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x0, scale)));
        const __m128i q1   = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x1, scale)));
        const float d      = amax < smallest_amax ? 0.0f : amax / 127.0f;
        _mm_store_si128(reinterpret_cast<__m128i *>(unit.lo + 16 * lane), q0);
        _mm_store_si128(reinterpret_cast<__m128i *>(unit.hi + 16 * lane), q1);
        _mm_store_ps(unit.d + 4 * lane, _mm_set1_ps(d));
        _mm_store_ps(unit.sum + 4 * lane, _mm_set_ss(static_cast<float>(sum_of_bytes(_mm256_set_m128i(q1, q0)))));
    }
    for (int64_t b = n / 32; b % 4 != 0; ++b) {
        row_unit128 & unit = out[b / 4];
        const int lane     = static_cast<int>(b % 4);
        memset(unit.lo + 16 * lane, 0, 16);
        memset(unit.hi + 16 * lane, 0, 16);
        memset(unit.d + 4 * lane, 0, 16);
        memset(unit.sum + 4 * lane, 0, 16);
    }
}

// The scale takes the sign of the first value of largest magnitude, as ggml's Q8_K does.
void quantize_256(const float * x, int64_t n, void * row) {
    auto * out = static_cast<row_block256 *>(row);
    for (int64_t b = 0; b < n / 256; ++b, x += 256, ++out) {
        __m512i largest = _mm512_setzero_si512();
        for (int i = 0; i < 256; i += 16) {
            largest = _mm512_max_epi32(largest, magnitude_bits(_mm512_loadu_ps(x + i)));
        }
        const int32_t bits = _mm512_reduce_max_epi32(largest);
        const float amax   = bits_to_float(static_cast<uint32_t>(bits));
        const bool normal  = amax >= smallest_amax && amax <= largest_float;
        float max          = amax;
        for (int i = 0; i < 256; i += 16) {
            const __mmask16 at =
                _mm512_cmpeq_epi32_mask(magnitude_bits(_mm512_loadu_ps(x + i)), _mm512_set1_epi32(bits));
            if (at != 0) {
                max = x[i + __builtin_ctz(at)];
                break;
            }
        }
        const float inverse = normal ? -127.0f / max : 0.0f;
        const __m512 scale  = _mm512_set1_ps(inverse);
        for (int s = 0; s < 16; ++s) {
            const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16 * s), scale));
            const __m128i q = _mm512_cvtsepi32_epi8(v);
            _mm_store_si128(reinterpret_cast<__m128i *>(out->q + 16 * s), q);
            out->sum16[s] = static_cast<float>(sum_of_bytes(_mm256_zextsi128_si256(q)));
        }
        for (int g = 0; g < 8; ++g) {
            out->sum32[g] = out->sum16[2 * g] + out->sum16[2 * g + 1];
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
        const int lane = static_cast<int>(g % 4);
        for (int t = 0; t < panel_tokens; ++t) {
            if (t >= n_rows) {
                v[t]          = _mm256_setzero_si256();
                out->start[t] = out->start_q4_0[t] = 0;
                out->d[t] = out->d_sum[t] = 0.0f;
                continue;
            }
            const row_unit128 & unit = static_cast<const row_unit128 *>(rows[t])[g / 4];
            v[t]                     = _mm256_set_m128i(load128(unit.hi + 16 * lane), load128(unit.lo + 16 * lane));
            const float sum          = unit.sum[4 * lane];
            out->start[t]            = -128 * static_cast<int32_t>(sum);
            out->start_q4_0[t]       = -q4_0_offset * static_cast<int32_t>(sum);
            out->d[t]                = unit.d[4 * lane];
            out->d_sum[t]            = unit.d[4 * lane] * sum;
        }
        transpose_group(v, out->q);
    }
}

void panel_256(const void * const * rows, int n_rows, int64_t n, void * panel) {
    auto * out = static_cast<panel_block256 *>(panel);
    for (int64_t b = 0; b < n / 256; ++b, ++out) {
        for (int t = 0; t < panel_tokens; ++t) {
            out->d[t] = t < n_rows ? static_cast<const row_block256 *>(rows[t])[b].d : 0.0f;
        }
        for (int g = 0; g < 8; ++g) {
            panel_group256 & group = out->group[g];
            __m256i v[panel_tokens];
            for (int t = 0; t < panel_tokens; ++t) {
                if (t >= n_rows) {
                    v[t]                   = _mm256_setzero_si256();
                    group.start_q6_k[0][t] = group.start_q6_k[1][t] = group.start[t] = 0;
                    group.sum[t]                                                     = 0.0f;
                    continue;
                }
                const row_block256 & block = static_cast<const row_block256 *>(rows[t])[b];
                v[t]                       = load256(block.q + 32 * g);
                group.start_q6_k[0][t]     = -q6_k_offset * static_cast<int32_t>(block.sum16[2 * g]);
                group.start_q6_k[1][t]     = -q6_k_offset * static_cast<int32_t>(block.sum16[2 * g + 1]);
                group.start[t]             = -128 * static_cast<int32_t>(block.sum32[g]);
                group.sum[t]               = block.sum32[g];
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
inline __m512 exp_ps(__m512 x) {
    // min and max return their second operand when one is NaN
    x              = _mm512_max_ps(_mm512_set1_ps(-105.0f), _mm512_min_ps(_mm512_set1_ps(89.0f), x));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
    __m512 r       = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r              = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p       = _mm512_set1_ps(1.9875691500e-4f);
    p              = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p              = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p              = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p              = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p              = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p              = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

// x sigmoid(a x)
inline __m512 swish(__m512 x, __m512 ax) {
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(x, _mm512_add_ps(one, exp_ps(_mm512_sub_ps(zero_f(), ax))));
}

inline __m512 gelu(__m512 x) {
    // 0.5 (1 + tanh(z)) = sigmoid(2 z)
    const __m512 x2    = _mm512_mul_ps(x, x);
    const __m512 cubic = _mm512_fmadd_ps(x2, _mm512_set1_ps(0.044715f), _mm512_set1_ps(1.0f));
    const __m512 z     = _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(2.0f * 0.79788456080286535588f)), cubic);
    const __m512 y     = swish(x, z);
    const __m512 small = _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(x, _mm512_set1_ps(-10.0f), _CMP_LE_OQ), zero_f());
    return _mm512_mask_mov_ps(small, _mm512_cmp_ps_mask(x, _mm512_set1_ps(10.0f), _CMP_GE_OQ), x);
}

inline __m512 at_most(__m512 x, __m512 limit) {
    return _mm512_min_ps(limit, x);
}
inline __m512 clamp(__m512 x, __m512 limit) {
    return _mm512_max_ps(_mm512_sub_ps(zero_f(), limit), _mm512_min_ps(limit, x));
}

template <ffn_op op>
void glu_vector(float alpha, float limit, const float * gate, const float * up, float * out, int64_t n) {
    const __m512 vlimit = _mm512_set1_ps(limit);
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 mask = first_lanes(n - i);
        const __m512 u       = _mm512_maskz_loadu_ps(mask, up + i);
        const __m512 g       = is_gated(op) ? _mm512_maskz_loadu_ps(mask, gate + i) : u;
        __m512 y;
        if constexpr (op == ffn_op::swiglu) {
            y = _mm512_mul_ps(swish(g, g), u);
        } else if constexpr (op == ffn_op::geglu) {
            y = _mm512_mul_ps(gelu(g), u);
        } else if constexpr (op == ffn_op::geglu_quick) {
            y = _mm512_mul_ps(swish(g, _mm512_mul_ps(g, _mm512_set1_ps(1.702f))), u);
        } else if constexpr (op == ffn_op::swiglu_oai) {
            const __m512 x = at_most(g, vlimit);
            y              = _mm512_mul_ps(swish(x, _mm512_mul_ps(x, _mm512_set1_ps(alpha))),
                                           _mm512_add_ps(clamp(u, vlimit), _mm512_set1_ps(1.0f)));
        } else if constexpr (op == ffn_op::swiglu_clamp) {
            const __m512 x = at_most(g, vlimit);
            y              = _mm512_mul_ps(swish(x, x), clamp(u, vlimit));
        } else if constexpr (op == ffn_op::swiglu_limit) {
            y = _mm512_mul_ps(at_most(swish(g, g), vlimit), clamp(u, vlimit));
        } else if constexpr (op == ffn_op::silu) {
            y = swish(u, u);
        } else if constexpr (op == ffn_op::gelu) {
            y = gelu(u);
        } else {
            static_assert(op == ffn_op::gelu_quick, "no vector form");
            y = swish(u, _mm512_mul_ps(u, _mm512_set1_ps(1.702f)));
        }
        _mm512_mask_storeu_ps(out + i, mask, y);
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
    const __m512 vw = _mm512_set1_ps(w);
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 mask = first_lanes(n - i);
        const __m512 wx      = _mm512_mul_ps(vw, _mm512_maskz_loadu_ps(mask, x + i));
        _mm512_mask_storeu_ps(y + i, mask, first ? wx : _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y + i), wx));
    }
}

constexpr type_kernels types[] = {
    {type_f32, dot_float<type_f32>, pack_float<type_f32>, gemm<gemm_float>},
    {type_f16, dot_float<type_f16>, pack_float<type_f16>, gemm<gemm_float>},
    {type_bf16, dot_float<type_bf16>, pack_float<type_bf16>, gemm<gemm_float>},
    {type_q4_0, dot_32<unit_q4_0>, pack_q4_0, gemm<gemm_32<kind_32::q4_0>>},
    {type_q4_1, dot_32<unit_q4_1>, pack_q4_1, gemm<gemm_32<kind_32::mins>>},
    {type_q8_0, dot_32<unit_q8_0>, pack_q8_0, gemm<gemm_32<kind_32::offset_128>>},
    {type_iq4_nl, dot_32<unit_iq4_nl>, pack_iq4_nl, gemm<gemm_32<kind_32::offset_128>>},
    {type_mxfp4, dot_32<unit_mxfp4>, pack_mxfp4, gemm<gemm_32<kind_32::offset_128>>},
    {type_q4_k, dot_256<dot_q4_k>, pack_q45_k<block_q4_k, false>, gemm<gemm_256<kind_256::mins>>},
    {type_q5_k, dot_256<dot_q5_k>, pack_q45_k<block_q5_k, true>, gemm<gemm_256<kind_256::mins>>},
    {type_q6_k, dot_256<dot_q6_k>, pack_q6_k, gemm<gemm_256<kind_256::two_scales>>},
    {type_iq4_xs, dot_256<dot_iq4_xs>, pack_iq4_xs, gemm<gemm_256<kind_256::one_scale>>},
    {-1, nullptr, nullptr, nullptr},
};

} // namespace

const kernel_set kernels_avx512 = {
    "avx512", 2, 5, true, quantize_32, quantize_256, panel_32, panel_256, panel_f32, glu, add_scaled, types,
};

} // namespace hybrimoe::kernels
