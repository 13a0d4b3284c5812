// Two MoE layers of different classes, as the plug-in would have learnt them from a graph.
#pragma once

#include "hybrid/layer_book.h"

#include "fuzz.h"

class toy_book {
public:
    toy_book() {
        ids_.ne[0] = 2;
        add(0, 8, 32, up_[0]);
        add(1, 16, 64, up_[1]);
        REQUIRE(book_.n_layers() == 2 && book_.n_classes() == 2);
    }
    const hybrimoe::layer_book & get() const { return book_; }

private:
    void add(int index, int32_t n_expert, int64_t n_ff, const char & identity) {
        hybrimoe::moe_block block;
        block.layer    = index;
        block.n_expert = n_expert;
        block.ids      = &ids_;
        hybrimoe::described_block described;
        described.layer.n_embd   = 64;
        described.layer.n_ff     = n_ff;
        described.layer.n_expert = n_expert;
        described.layer.op       = hybrimoe::kernels::ffn_op::silu;
        describe(described.layer.up, 64, n_ff, &identity);
        describe(described.layer.down, n_ff, 64, &identity + 1);
        REQUIRE(book_.find(block, described) == index);
    }
    static void describe(hybrimoe::kernels::expert_matrix & matrix, int64_t n_in, int64_t n_out, const char * data) {
        matrix.data         = data;
        matrix.type         = GGML_TYPE_F32;
        matrix.row_bytes    = static_cast<size_t>(n_in) * sizeof(float);
        matrix.expert_bytes = matrix.row_bytes * static_cast<size_t>(n_out);
    }

    ggml_tensor ids_{};
    char up_[4]{}; // addresses alone tell layers apart
    hybrimoe::layer_book book_;
};
