// Expert kernels against an f32 reference of the dequantised weights: every type, path, group size and odd shape.
// Argument "quick" leaves out the largest shapes and some repetitions (for sanitizer builds);
// "threads" runs what several threads do (for the thread sanitizer).
#include <limits>
#include <string>

#include "moe_fixture.h"

using namespace fixture;

namespace {

int n_checks   = 0;
int n_failures = 0;
bool quick     = false;
bool few_types = false;

void check(bool ok, const std::string & what) {
    ++n_checks;
    if (!ok) {
        ++n_failures;
        if (n_failures <= 40) {
            fprintf(stderr, "FAILED: %s\n", what.c_str());
        }
    }
}

constexpr int32_t all_types[] = {type_f32,    type_f16,   type_bf16, type_q4_0, type_q4_1, type_q8_0,
                                 type_iq4_nl, type_mxfp4, type_q4_k, type_q5_k, type_q6_k, type_iq4_xs};

std::vector<const kernel_set *> all_sets() {
    std::vector<const kernel_set *> sets;
    for (const char * const * name = available_kernel_sets(); *name != nullptr; ++name) {
        sets.push_back(find_kernel_set(*name));
    }
    return sets;
}

// Two int8 activation quantisations, of x and of the hidden row: a product of two normal values, whose largest of 256
// is 6 deviations and more, so one scale for 256 values costs (6 / 127)^2 / 12 there (stock: the same, see
// test_against_ggml). Types with float activations carry rounding errors only.
double bound_of(int32_t type) {
    switch (find_type(type)->act) {
    case act_format::f32:
        return 1e-10;
    case act_format::q8_32:
        return 2.5e-4;
    default:
        return 8e-4;
    }
}

std::string label(const kernel_set * ks, const std::string & what) {
    return std::string(kernel_set_name(ks)) + ": " + what;
}

void expect_near(const kernel_set * ks, const model & mod, const input & in, const std::vector<float> & ref,
                 double bound, const std::string & what, size_t limit = default_scratch_limit_bytes) {
    const double e = nmse(forward(ks, mod.layer, in, 1, limit), ref);
    check(e <= bound, label(ks, what) + ": NMSE " + std::to_string(e * 1e6) + "e-6");
}

// -- shapes ------------------------------------------------------------------------------------------------------

struct shape {
    int64_t n_embd;
    int64_t n_ff;
};

void test_types_and_shapes() {
    const shape small_blocks[] = {{64, 96}, {192, 768}, {1088, 160}, {96, 1408}};
    const shape large_blocks[] = {{256, 256}, {512, 768}, {1280, 256}};
    const shape floats[]       = {{64, 96}, {37, 51}, {200, 768}, {1000, 70}};
    const int tokens[]         = {1, 2, 3, 16, 17, 64, 512};
    for (const int32_t type : all_types) {
        const type_info * info = find_type(type);
        const bool is_k        = info->block_values == 256;
        const shape * shapes   = is_k ? large_blocks : info->block_values == 32 ? small_blocks : floats;
        const int n            = quick ? 2 : is_k ? 3 : 4;
        for (int s = 0; s < n; ++s) {
            model mod;
            mod.make(type, type, type, shapes[s].n_embd, shapes[s].n_ff, 3, ffn_op::swiglu,
                     11 + static_cast<uint64_t>(s));
            for (const int t : tokens) {
                if ((quick && (t > 17 || t == 16)) || (t == 512 && s != 0) || (t == 64 && s == 1)) {
                    continue;
                }
                // expert 1 gets t tokens, expert 2 one, expert 0 none
                input in;
                in.make(t + 1, 1, shapes[s].n_embd, 5);
                in.ids.assign(in.ids.size(), 1);
                in.ids.back()                = 2;
                const std::vector<float> ref = reference(mod, in);
                const std::string what       = std::string(info->name) + " " + std::to_string(shapes[s].n_embd) + "x" +
                                               std::to_string(shapes[s].n_ff) + " t=" + std::to_string(t);
                for (const kernel_set * ks : all_sets()) {
                    expect_near(ks, mod, in, ref, bound_of(type), what);
                }
            }
        }
    }
}

// Gate, up and down of different types: two activation formats of x at once, every pair of formats between phases.
void test_mixed_types() {
    const int32_t mixes[][3] = {{type_q4_k, type_q4_k, type_q6_k}, {type_q4_0, type_q6_k, type_q8_0},
                                {type_q6_k, type_q4_1, type_q4_k}, {type_bf16, type_q4_0, type_f16},
                                {type_q8_0, type_f32, type_q4_k},  {type_iq4_xs, type_iq4_xs, type_mxfp4}};
    for (const auto & mix : mixes) {
        model mod;
        mod.make(mix[0], mix[1], mix[2], 512, 256, 5, ffn_op::swiglu, 3);
        for (const int t : {1, 12, 40}) {
            input in;
            in.make(t, 2, 512, 6);
            in.route_randomly(5, 9);
            const std::vector<float> ref = reference(mod, in);
            for (const kernel_set * ks : all_sets()) {
                expect_near(ks, mod, in, ref, 8e-4, "mixed types, t=" + std::to_string(t));
            }
        }
    }
}

void test_ops_biases_scales() {
    const ffn_op ops[] = {ffn_op::reglu,      ffn_op::geglu,       ffn_op::swiglu,       ffn_op::swiglu_oai,
                          ffn_op::geglu_erf,  ffn_op::geglu_quick, ffn_op::swiglu_clamp, ffn_op::swiglu_limit,
                          ffn_op::situ,       ffn_op::silu,        ffn_op::gelu,         ffn_op::gelu_erf,
                          ffn_op::gelu_quick, ffn_op::relu,        ffn_op::relu_sqr};
    for (const ffn_op op : ops) {
        for (const int variant : {2, 1, 0}) {
            if (quick && variant != 2) {
                continue;
            }
            model mod;
            mod.make(type_f32, type_f32, type_f32, 96, 70, 6, op, 21);
            rng r(4);
            for (matrix * m : {&mod.gate, &mod.up, &mod.down}) {
                if (m->m.data == nullptr) {
                    continue;
                }
                if (variant >= 1) {
                    m->add_bias(6, r);
                }
                if (variant == 2) {
                    m->add_scale(6, r);
                }
            }
            mod.layer.weights_on_input = variant == 2;
            mod.layer.limit            = op == ffn_op::situ ? 3.0f : 0.8f;
            mod.refresh();
            for (const int t : {1, 9}) {
                input in;
                in.make(t, 3, 96, 8);
                in.route_randomly(6, 2);
                const std::vector<float> ref = reference(mod, in);
                for (const kernel_set * ks : all_sets()) {
                    expect_near(ks, mod, in, ref, 1e-10,
                                "op " + std::to_string(static_cast<int>(op)) + " variant " + std::to_string(variant));
                }
            }
        }
    }
}

// The layer of llama4: weights on the input, quantised.
void test_weights_on_input() {
    for (const int32_t type : {type_q4_0, type_q4_k}) {
        model mod;
        mod.make(type, type, type, 256, 256, 4, ffn_op::swiglu, 31);
        mod.layer.weights_on_input = true;
        input in;
        in.make(13, 2, 256, 3);
        in.route_randomly(4, 3);
        const std::vector<float> ref = reference(mod, in);
        for (const kernel_set * ks : all_sets()) {
            expect_near(ks, mod, in, ref, bound_of(type), "weights on input");
            // The same rows, multiplied by the caller.
            const std::vector<float> inside = forward(ks, mod.layer, in, 2);
            input weighted                  = in;
            weighted.weigh();
            check(forward(ks, mod.layer, weighted, 2) == inside, label(ks, "x weighted by the caller"));
            if (type == type_q4_0) { // in passes of 32 tokens
                input longer;
                longer.make(70, 2, 256, 5);
                longer.route_randomly(4, 7);
                const std::vector<float> passes = forward(ks, mod.layer, longer, 2, 1);
                longer.weigh();
                check(forward(ks, mod.layer, longer, 2, 1) == passes, label(ks, "weighted x in passes"));
            }
        }
    }
}

void test_merged_gate_up() {
    model mod;
    mod.make(type_q4_0, type_q4_0, type_q4_0, 128, 96, 3, ffn_op::swiglu, 5);
    // [gate rows | up rows] of each expert in one tensor
    std::vector<uint8_t> merged;
    for (size_t e = 0; e < 3; ++e) {
        for (const matrix * m : {&mod.gate, &mod.up}) {
            const uint8_t * from = m->bytes.get() + e * m->m.expert_bytes;
            merged.insert(merged.end(), from, from + m->m.expert_bytes);
        }
    }
    expert_matrix both = mod.gate.m;
    both.data          = merged.data();
    both.expert_bytes  = 2 * mod.gate.m.expert_bytes;
    moe_layer split    = mod.layer;
    split_gate_up(both, 96, &split.gate, &split.up);
    input in;
    in.make(7, 2, 128, 3);
    in.route_randomly(3, 3);
    const kernel_set * ks = best_kernel_set();
    check(forward(ks, split, in, 1) == forward(ks, mod.layer, in, 1), "merged gate_up equals separate tensors");
}

// -- determinism -------------------------------------------------------------------------------------------------

void test_thread_counts() {
    for (const int32_t type : all_types) {
        if (few_types && type != type_bf16 && type != type_q4_0 && type != type_q6_k) {
            continue;
        }
        model mod;
        mod.make(type, type, type, 512, 256, 16, ffn_op::swiglu, 77, 0, false);
        for (const int t : {1, 2, 37}) {
            input in;
            in.make(t, 4, 512, 12);
            in.route_randomly(16, 13);
            for (const kernel_set * ks : all_sets()) {
                const std::vector<float> one = forward(ks, mod.layer, in, 1);
                for (int n_threads = 2; n_threads <= 4; ++n_threads) {
                    const std::vector<float> many = forward(ks, mod.layer, in, n_threads);
                    check(memcmp(one.data(), many.data(), one.size() * sizeof(float)) == 0,
                          label(ks, std::string(find_type(type)->name) + " bitwise with " + std::to_string(n_threads) +
                                        " threads"));
                }
            }
        }
    }
}

// Several streams of weights at once: the same bits, whatever the rows' number leaves over.
void test_streams() {
    for (const int32_t type : all_types) {
        const int32_t block = find_type(type)->block_values;
        const shape sizes   = block == 1 ? shape{39, 83} : block == 32 ? shape{96, 160} : shape{256, 512};
        model mod;
        mod.make(type, type, type, sizes.n_embd, sizes.n_ff, 3, ffn_op::swiglu, 78, 0, false);
        for (const int t : {1, 2}) {
            input in;
            in.make(t, 1, mod.layer.n_embd, 14);
            in.ids.assign(in.ids.size(), 2); // the last expert, alone: one and two tokens of one dot
            for (const kernel_set * ks : all_sets()) {
                const std::vector<float> one  = forward(ks, mod.layer, in, 1, default_scratch_limit_bytes, nullptr, 1);
                const std::vector<float> four = forward(ks, mod.layer, in, 1, default_scratch_limit_bytes, nullptr, 4);
                check(memcmp(one.data(), four.data(), one.size() * sizeof(float)) == 0,
                      label(ks, std::string(find_type(type)->name) + " bitwise with several streams"));
            }
        }
    }
}

// A token's result does not depend on its place in the batch while its experts' groups keep their kind.
void test_order_of_tokens() {
    model mod;
    mod.make(type_q4_k, type_q4_k, type_q6_k, 256, 256, 4, ffn_op::swiglu, 7);
    input in;
    in.make(40, 2, 256, 1);
    in.route_randomly(4, 2);
    input reversed = in;
    for (int64_t t = 0; t < 40; ++t) {
        const auto from = static_cast<size_t>(t);
        const auto to   = static_cast<size_t>(39 - t);
        memcpy(&reversed.x[to * 256], &in.x[from * 256], 256 * sizeof(float));
        for (size_t k = 0; k < 2; ++k) {
            reversed.ids[2 * to + k]     = in.ids[2 * from + k];
            reversed.weights[2 * to + k] = in.weights[2 * from + k];
        }
    }
    for (const kernel_set * ks : all_sets()) {
        const std::vector<float> a = forward(ks, mod.layer, in, 2);
        const std::vector<float> b = forward(ks, mod.layer, reversed, 2);
        bool same                  = true;
        for (size_t t = 0; t < 40; ++t) {
            same = same && memcmp(&a[t * 256], &b[(39 - t) * 256], 256 * sizeof(float)) == 0;
        }
        check(same, label(ks, "a token's place in the batch changes nothing"));
    }
}

// Small scratch: several passes over the tokens.
void test_passes() {
    model mod;
    mod.make(type_q4_0, type_q4_0, type_q4_0, 256, 256, 4, ffn_op::swiglu, 7);
    input in;
    in.make(150, 2, 256, 1);
    in.route_randomly(4, 2);
    const std::vector<float> ref = reference(mod, in);
    for (const kernel_set * ks : all_sets()) {
        const moe_plan plan = make_plan(ks, mod.layer, 150, 2, 2, 1);
        check(plan.chunk_tokens < 150 && plan.chunk_tokens >= 32, label(ks, "a low limit makes passes"));
        expect_near(ks, mod, in, ref, bound_of(type_q4_0), "several passes", 1);
    }
}

// -- masks -------------------------------------------------------------------------------------------------------

void test_masks() {
    model mod;
    mod.make(type_q8_0, type_q8_0, type_q8_0, 128, 96, 8, ffn_op::swiglu, 9);
    for (const int t : {1, 30}) {
        input in;
        in.make(t, 4, 128, 4);
        in.route_randomly(8, 4);
        in.take.resize(in.ids.size());
        rng r(3);
        for (uint8_t & take : in.take) {
            take = static_cast<uint8_t>(r.next() >> 63);
        }
        for (size_t k = 0; k < 4; ++k) {
            in.take[in.take.size() - 1 - k] = t == 1; // a token with nothing to compute
        }
        in.ids[0]                    = -1; // no expert
        in.ids[1]                    = 8;  // out of range
        const std::vector<float> ref = reference(mod, in);
        for (const kernel_set * ks : all_sets()) {
            expect_near(ks, mod, in, ref, bound_of(type_q8_0), "masked pairs");
            // the rest, added to what is there
            input rest = in;
            for (size_t i = 0; i < rest.take.size(); ++i) {
                rest.take[i] = in.take[i] == 0;
            }
            input all = in;
            all.take.clear();
            const std::vector<float> part = forward(ks, mod.layer, in, 2);
            const std::vector<float> sum  = forward(ks, mod.layer, rest, 2, default_scratch_limit_bytes, part.data());
            check(nmse(sum, reference(mod, all)) < bound_of(type_q8_0), label(ks, "two parts make the whole"));
        }
        in.take.assign(in.take.size(), 0);
        for (const kernel_set * ks : all_sets()) {
            const std::vector<float> none = forward(ks, mod.layer, in, 2);
            check(none == std::vector<float>(none.size(), 0.0f), label(ks, "nothing to compute gives zeros"));
        }
    }
}

// -- special values ----------------------------------------------------------------------------------------------

// A non-finite activation makes its own token's output non-finite and leaves the other tokens alone.
void test_special_values() {
    const float inf = std::numeric_limits<float>::infinity();
    for (const int32_t type : all_types) {
        model mod;
        mod.make(type, type, type, 256, 256, 2, ffn_op::swiglu, 15);
        for (const int t : {2, 9}) {
            input in;
            in.make(t, 1, 256, 5);
            const std::string name = find_type(type)->name;
            for (const kernel_set * ks : all_sets()) {
                const std::vector<float> clean = forward(ks, mod.layer, in, 1);
                for (const float bad : {inf, -inf, std::numeric_limits<float>::quiet_NaN()}) {
                    for (const size_t at : {size_t{77}, size_t{0}, size_t{255}}) {
                        if (quick && at != 77) {
                            continue;
                        }
                        input broken               = in;
                        broken.x[at]               = bad;
                        const std::vector<float> y = forward(ks, mod.layer, broken, 1);
                        bool any_finite            = false;
                        for (size_t i = 0; i < 256; ++i) {
                            any_finite = any_finite || std::isfinite(y[i]);
                        }
                        check(!any_finite, label(ks, name + ": non-finite activations reach the output"));
                        check(memcmp(&y[256], &clean[256], (y.size() - 256) * sizeof(float)) == 0,
                              label(ks, name + ": other tokens are untouched"));
                    }
                }
                // denormals and zeros beside and instead of normal values
                input tiny = in;
                for (size_t i = 0; i < 256; ++i) {
                    tiny.x[i] = i % 3 == 0 ? 1e-40f : -3e-42f;
                }
                tiny.x[256]                = 1e-41f;
                tiny.x[257]                = 0.0f;
                const std::vector<float> y = forward(ks, mod.layer, tiny, 1);
                bool small                 = true;
                for (size_t i = 0; i < 256; ++i) {
                    small = small && std::fabs(y[i]) < 1e-30f;
                }
                check(small, label(ks, name + ": denormals stay small"));
                const std::vector<float> ref = reference(mod, tiny);
                check(nmse(y, ref) <= bound_of(type), label(ks, name + ": denormals beside normal values"));
            }
        }
    }
}

// -- strides, stand-alone pieces -----------------------------------------------------------------------------------

void test_odd_strides() {
    for (const int32_t type : all_types) {
        for (const size_t gap : {size_t{2}, size_t{7}}) {
            if (find_type(type)->block_values == 1 && gap == 7) {
                continue; // a float row at an odd address is nothing ggml makes
            }
            model mod;
            mod.make(type, type, type, 256, 256, 2, ffn_op::swiglu, 15, gap);
            input in;
            in.make(5, 1, 256, 5);
            in.ids.back()                = 1;
            const std::vector<float> ref = reference(mod, in);
            for (const kernel_set * ks : all_sets()) {
                expect_near(ks, mod, in, ref, bound_of(type), std::string("odd stride ") + find_type(type)->name);
            }
        }
    }
}

// A type of somebody else's: rows of f32 behind the external interface.
void external_dot(int n, float * s, size_t, const void * w, size_t, const void * x, size_t, int) {
    float sum = 0.0f;
    for (int i = 0; i < n; ++i) {
        sum += static_cast<const float *>(w)[i] * static_cast<const float *>(x)[i];
    }
    *s = sum;
}
void external_copy(const float * x, void * y, int64_t n) {
    memcpy(y, x, static_cast<size_t>(n) * sizeof(float));
}

void test_external_types() {
    const external_type external = {external_dot, external_copy, sizeof(float), 1};
    for (const int which : {1, 2, 3, 4, 7}) { // bits: gate, up, down
        model mod;
        mod.make(type_f32, type_f32, type_f32, 96, 64, 3, ffn_op::swiglu, 41);
        expert_matrix * matrices[] = {&mod.layer.gate, &mod.layer.up, &mod.layer.down};
        for (int i = 0; i < 3; ++i) {
            if (which >> i & 1) {
                matrices[i]->type     = 1000;
                matrices[i]->external = &external;
            }
        }
        check(check_layer(mod.layer) == nullptr, "external layer is accepted");
        for (const int t : {1, 20}) {
            input in;
            in.make(t, 2, 96, 3);
            in.route_randomly(3, 3);
            const std::vector<float> ref = reference(mod, in);
            for (const kernel_set * ks : all_sets()) {
                expect_near(ks, mod, in, ref, 1e-10, "external type, which=" + std::to_string(which));
            }
        }
    }
}

void test_refusals() {
    model mod;
    mod.make(type_q4_k, type_q4_k, type_q4_k, 256, 256, 2, ffn_op::swiglu, 1);
    check(check_layer(mod.layer) == nullptr, "a good layer is accepted");
    moe_layer bad = mod.layer;
    bad.up.type   = 10;
    check(check_layer(bad) != nullptr, "an unknown type needs an external one");
    bad      = mod.layer;
    bad.n_ff = 96;
    check(check_layer(bad) != nullptr, "a row must be whole blocks");
    bad           = mod.layer;
    bad.gate.data = nullptr;
    check(check_layer(bad) != nullptr, "a gated layer needs its gate");
    check(find_kernel_set("nosuch") == nullptr, "unknown kernel sets are refused");
    check(find_type(10) == nullptr, "unknown types are refused");
}

void test_router() {
    rng r(3);
    matrix m;
    for (const int32_t type : {type_f32, type_f16, type_bf16}) {
        m.make(type, 203, 37, 1, r);
        std::vector<float> x(203);
        for (float & v : x) {
            v = r.normal();
        }
        std::vector<float> ref;
        reference_matrix(m, 0, x.data(), ref);
        for (const kernel_set * ks : all_sets()) {
            std::vector<float> logits(37);
            router_rows(ks, type, m.m.data, m.m.row_bytes, 203, x.data(), logits.data(), 0, 20);
            router_rows(ks, type, m.m.data, m.m.row_bytes, 203, x.data(), logits.data(), 20, 37);
            check(nmse(logits, ref) < 1e-10, label(ks, "router"));
        }
    }
}

} // namespace

int main(int argc, char ** argv) {
    const std::string mode = argc > 1 ? argv[1] : "";
    quick                  = mode == "quick";
    few_types              = mode == "threads";
    if (mode != "threads") {
        test_types_and_shapes();
        test_mixed_types();
        test_ops_biases_scales();
        test_weights_on_input();
        test_merged_gate_up();
        test_special_values();
        test_odd_strides();
        test_external_types();
        test_refusals();
        test_router();
    }
    test_thread_counts();
    test_streams();
    test_order_of_tokens();
    test_passes();
    test_masks();
    printf("%d checks, %d failures, sets:", n_checks, n_failures);
    for (const char * const * name = available_kernel_sets(); *name != nullptr; ++name) {
        printf(" %s", *name);
    }
    printf("\n");
    return n_failures == 0 ? 0 : 1;
}
