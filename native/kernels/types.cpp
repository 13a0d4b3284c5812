// Types, and the scalar meaning of every block.
#include "block_layout.h"
#include "kernel_set.h"

namespace hybrimoe::kernels {

namespace {

constexpr type_info types[] = {
    {type_f32, "f32", 1, 4, act_format::f32},
    {type_f16, "f16", 1, 2, act_format::f32},
    {type_bf16, "bf16", 1, 2, act_format::f32},
    {type_q4_0, "q4_0", 32, sizeof(block_q4_0), act_format::q8_32},
    {type_q4_1, "q4_1", 32, sizeof(block_q4_1), act_format::q8_32},
    {type_q8_0, "q8_0", 32, sizeof(block_q8_0), act_format::q8_32},
    {type_iq4_nl, "iq4_nl", 32, sizeof(block_iq4_nl), act_format::q8_32},
    {type_mxfp4, "mxfp4", 32, sizeof(block_mxfp4), act_format::q8_32},
    {type_q4_k, "q4_K", 256, sizeof(block_q4_k), act_format::q8_256},
    {type_q5_k, "q5_K", 256, sizeof(block_q5_k), act_format::q8_256},
    {type_q6_k, "q6_K", 256, sizeof(block_q6_k), act_format::q8_256},
    {type_iq4_xs, "iq4_xs", 256, sizeof(block_iq4_xs), act_format::q8_256},
};

void nibbles(const uint8_t * qs, int16_t * q, int offset) {
    for (int i = 0; i < 16; ++i) {
        q[i]      = static_cast<int16_t>((qs[i] & 15) - offset);
        q[16 + i] = static_cast<int16_t>((qs[i] >> 4) - offset);
    }
}

void table_nibbles(const uint8_t * qs, const int8_t * table, int16_t * q) {
    for (int i = 0; i < 16; ++i) {
        q[i]      = table[qs[i] & 15];
        q[16 + i] = table[qs[i] >> 4];
    }
}

void one_scale(group32 * out, float a, float b = 0.0f) {
    out->a[0] = out->a[1] = a;
    out->b                = b;
}

void unpack_q45_k(const uint8_t * d_dmin_scales, const uint8_t * qs, const uint8_t * qh, int g, group32 * out) {
    uint8_t scales[8];
    uint8_t mins[8];
    unpack_k_scales(d_dmin_scales + 4, scales, mins);
    for (int i = 0; i < 32; ++i) {
        const int low = (qs[32 * (g / 2) + i] >> (4 * (g % 2))) & 15;
        out->q[i]     = static_cast<int16_t>(low + (qh != nullptr ? ((qh[i] >> g) & 1) << 4 : 0));
    }
    one_scale(out, half_to_float(load_u16(d_dmin_scales)) * scales[g],
              -(half_to_float(load_u16(d_dmin_scales + 2)) * mins[g]));
}

void unpack_q6_k(const block_q6_k * block, int g, group32 * out) {
    const int half  = g / 4;
    const int shift = 2 * (g % 4);
    for (int i = 0; i < 32; ++i) {
        const int ql = block->ql[64 * half + 32 * (g % 2) + i] >> (g % 4 >= 2 ? 4 : 0) & 15;
        const int qh = block->qh[32 * half + i] >> shift & 3;
        out->q[i]    = static_cast<int16_t>((ql | qh << 4) - 32);
    }
    const float d = half_to_float(load_u16(block->d));
    out->a[0]     = d * static_cast<float>(static_cast<int8_t>(block->scales[2 * g]));
    out->a[1]     = d * static_cast<float>(static_cast<int8_t>(block->scales[2 * g + 1]));
    out->b        = 0.0f;
}

} // namespace

const type_info * find_type(int32_t type) {
    for (const type_info & info : types) {
        if (info.id == type) {
            return &info;
        }
    }
    return nullptr;
}

void unpack_group(int32_t type, const uint8_t * row, int64_t group, group32 * out) {
    switch (type) {
    case type_q4_0: {
        const auto * block = reinterpret_cast<const block_q4_0 *>(row) + group;
        nibbles(block->qs, out->q, 8);
        return one_scale(out, half_to_float(load_u16(block->d)));
    }
    case type_q4_1: {
        const auto * block = reinterpret_cast<const block_q4_1 *>(row) + group;
        nibbles(block->qs, out->q, 0);
        return one_scale(out, half_to_float(load_u16(block->d)), half_to_float(load_u16(block->m)));
    }
    case type_q8_0: {
        const auto * block = reinterpret_cast<const block_q8_0 *>(row) + group;
        for (int i = 0; i < 32; ++i) {
            out->q[i] = static_cast<int8_t>(block->qs[i]);
        }
        return one_scale(out, half_to_float(load_u16(block->d)));
    }
    case type_iq4_nl: {
        const auto * block = reinterpret_cast<const block_iq4_nl *>(row) + group;
        table_nibbles(block->qs, iq4_values, out->q);
        return one_scale(out, half_to_float(load_u16(block->d)));
    }
    case type_mxfp4: {
        const auto * block = reinterpret_cast<const block_mxfp4 *>(row) + group;
        table_nibbles(block->qs, mxfp4_values, out->q);
        return one_scale(out, e8m0_half_to_float(block->e));
    }
    case type_q4_k: {
        const auto * block = reinterpret_cast<const block_q4_k *>(row) + group / 8;
        return unpack_q45_k(block->d, block->qs, nullptr, static_cast<int>(group % 8), out);
    }
    case type_q5_k: {
        const auto * block = reinterpret_cast<const block_q5_k *>(row) + group / 8;
        return unpack_q45_k(block->d, block->qs, block->qh, static_cast<int>(group % 8), out);
    }
    case type_q6_k:
        return unpack_q6_k(reinterpret_cast<const block_q6_k *>(row) + group / 8, static_cast<int>(group % 8), out);
    case type_iq4_xs: {
        const auto * block = reinterpret_cast<const block_iq4_xs *>(row) + group / 8;
        const int g        = static_cast<int>(group % 8);
        table_nibbles(block->qs + 16 * g, iq4_values, out->q);
        const int low  = block->scales_l[g / 2] >> (4 * (g % 2)) & 15;
        const int high = load_u16(block->scales_h) >> (2 * g) & 3;
        return one_scale(out, half_to_float(load_u16(block->d)) * static_cast<float>((low | high << 4) - 32));
    }
    default:
        *out = group32{};
    }
}

void dequantize_row(int32_t type, const void * row, float * out, int64_t n_values) {
    const auto * bytes = static_cast<const uint8_t *>(row);
    switch (type) {
    case type_f32:
        memcpy(out, row, static_cast<size_t>(n_values) * sizeof(float));
        return;
    case type_f16:
        for (int64_t i = 0; i < n_values; ++i) {
            out[i] = half_to_float(load_u16(bytes + 2 * i));
        }
        return;
    case type_bf16:
        for (int64_t i = 0; i < n_values; ++i) {
            out[i] = bits_to_float(static_cast<uint32_t>(load_u16(bytes + 2 * i)) << 16);
        }
        return;
    default:
        break;
    }
    for (int64_t g = 0; g < n_values / 32; ++g) {
        group32 group;
        unpack_group(type, bytes, g, &group);
        for (int i = 0; i < 32; ++i) {
            out[32 * g + i] = group.a[i / 16] * static_cast<float>(group.q[i]) + group.b;
        }
    }
}

} // namespace hybrimoe::kernels
