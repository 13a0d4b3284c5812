// Against ggml itself, loaded from llama.cpp's libraries: the exact value of every weight, and the error of a whole
// layer, which may be at most 1.1 times that of ggml's own dot products on the same input.
//
//   test_against_ggml DIR     (holds libggml-base.so and libggml-cpu.so)
#include <dlfcn.h>

#include <string>

#include "moe_fixture.h"

using namespace fixture;

namespace {

// As in ggml-cpu.h and ggml.h
struct cpu_traits {
    void (*from_float)(const float * x, void * y, int64_t n);
    void (*vec_dot)(int n, float * s, size_t bs, const void * w, size_t bw, const void * x, size_t bx, int nrc);
    int32_t vec_dot_type;
    int64_t n_rows;
};

struct ggml_api {
    void * base = nullptr;
    void * cpu  = nullptr;
    const cpu_traits * (*traits)(int32_t type);
    size_t (*quantize)(int32_t type, const float * from, void * to, int64_t start, int64_t n_rows, int64_t n_per_row,
                       const float * imatrix);
    size_t (*row_size)(int32_t type, int64_t n);

    template <class fn> static fn symbol(void * library, const char * name) {
        void * p = dlsym(library, name);
        if (p == nullptr) {
            fprintf(stderr, "error: %s is missing\nhint: %s\n", name, dlerror());
            exit(1);
        }
        return reinterpret_cast<fn>(p);
    }

    explicit ggml_api(const std::string & dir) {
        base = dlopen((dir + "/libggml-base.so").c_str(), RTLD_NOW | RTLD_GLOBAL);
        cpu  = dlopen((dir + "/libggml-cpu.so").c_str(), RTLD_NOW | RTLD_GLOBAL);
        if (base == nullptr || cpu == nullptr) {
            fprintf(stderr, "error: no ggml libraries in %s\nhint: %s\n", dir.c_str(), dlerror());
            exit(1);
        }
        symbol<void (*)()>(cpu, "ggml_cpu_init")();
        traits   = symbol<const cpu_traits * (*)(int32_t)>(cpu, "ggml_get_type_traits_cpu");
        quantize = symbol<size_t (*)(int32_t, const float *, void *, int64_t, int64_t, int64_t, const float *)>(
            base, "ggml_quantize_chunk");
        row_size = symbol<size_t (*)(int32_t, int64_t)>(base, "ggml_row_size");
    }
};

int n_failures = 0;

void check(bool ok, const std::string & what) {
    if (!ok) {
        ++n_failures;
        fprintf(stderr, "FAILED: %s\n", what.c_str());
    }
}

// Gaussian weights, quantised by ggml
void quantise(const ggml_api & ggml, matrix & m, int n_expert, uint64_t seed) {
    rng r(seed);
    std::vector<float> row(static_cast<size_t>(m.n_in));
    for (int64_t i = 0; i < m.n_out * n_expert; ++i) {
        for (float & v : row) {
            v = r.normal() / std::sqrt(static_cast<float>(m.n_in));
        }
        uint8_t * to = m.bytes.get() + static_cast<size_t>(i) * m.m.row_bytes;
        if (m.m.type == type_f32) {
            memcpy(to, row.data(), row.size() * sizeof(float));
        } else {
            ggml.quantize(m.m.type, row.data(), to, 0, 1, m.n_in, nullptr);
        }
        dequantize_row(m.m.type, to, m.values.data() + static_cast<size_t>(i * m.n_in), m.n_in);
    }
}

void check_blocks(const ggml_api & ggml, const matrix & m, int n_expert) {
    const char * name = find_type(m.m.type)->name;
    void * symbol     = dlsym(ggml.base, (std::string("dequantize_row_") + name).c_str());
    if (symbol == nullptr) {
        return; // f32, f16 and bf16 have no such function
    }
    auto to_float = reinterpret_cast<void (*)(const void *, float *, int64_t)>(symbol);
    std::vector<float> row(static_cast<size_t>(m.n_in));
    bool equal = true;
    for (int64_t i = 0; i < m.n_out * n_expert; ++i) {
        to_float(m.bytes.get() + static_cast<size_t>(i) * m.m.row_bytes, row.data(), m.n_in);
        for (size_t k = 0; k < row.size(); ++k) {
            equal = equal && row[k] == m.values[static_cast<size_t>(i * m.n_in) + k];
        }
    }
    check(equal, std::string(name) + ": blocks mean what they mean in ggml");
}

std::vector<float> stock_matrix(const ggml_api & ggml, const matrix & m, int expert, const std::vector<float> & x) {
    const cpu_traits * traits = ggml.traits(m.m.type);
    std::vector<uint8_t> act(ggml.row_size(traits->vec_dot_type, m.n_in) + 64);
    if (traits->vec_dot_type == type_f32) {
        memcpy(act.data(), x.data(), x.size() * sizeof(float));
    } else {
        ggml.traits(traits->vec_dot_type)->from_float(x.data(), act.data(), m.n_in);
    }
    std::vector<float> out(static_cast<size_t>(m.n_out));
    for (int64_t r = 0; r < m.n_out; ++r) {
        const uint8_t * row =
            m.bytes.get() + static_cast<size_t>(expert) * m.m.expert_bytes + static_cast<size_t>(r) * m.m.row_bytes;
        traits->vec_dot(static_cast<int>(m.n_in), &out[static_cast<size_t>(r)], 0, row, 0, act.data(), 0, 1);
    }
    return out;
}

std::vector<float> stock(const ggml_api & ggml, const model & mod, const input & in) {
    std::vector<float> y(in.x.size(), 0.0f);
    const auto n = static_cast<size_t>(in.n_embd);
    for (size_t pair = 0; pair < in.ids.size(); ++pair) {
        const size_t t = pair / static_cast<size_t>(in.top_k);
        const std::vector<float> x(in.x.begin() + static_cast<long>(t * n),
                                   in.x.begin() + static_cast<long>((t + 1) * n));
        const std::vector<float> g = stock_matrix(ggml, mod.gate, in.ids[pair], x);
        std::vector<float> h       = stock_matrix(ggml, mod.up, in.ids[pair], x);
        for (size_t i = 0; i < h.size(); ++i) {
            h[i] = static_cast<float>(reference_act(mod.layer, static_cast<double>(g[i]), static_cast<double>(h[i])));
        }
        const std::vector<float> out = stock_matrix(ggml, mod.down, in.ids[pair], h);
        for (size_t i = 0; i < n; ++i) {
            y[t * n + i] += out[i] * in.weights[pair];
        }
    }
    return y;
}

void compare(const ggml_api & ggml, int32_t type) {
    constexpr int n_expert = 3;
    model mod;
    mod.make(type, type, type, 512, 768, n_expert, ffn_op::swiglu, 1);
    uint64_t seed = 100;
    for (matrix * m : {&mod.gate, &mod.up, &mod.down}) {
        check_blocks(ggml, *m, n_expert); // random bits
        quantise(ggml, *m, n_expert, ++seed);
        check_blocks(ggml, *m, n_expert);
    }
    for (const int tokens : {1, 24}) {
        input in;
        in.make(tokens, 2, 512, 7);
        in.route_randomly(n_expert, 8);
        const std::vector<float> ref = reference(mod, in);
        const double stock_error     = nmse(stock(ggml, mod, in), ref);
        printf("%-7s %2d tokens: stock %.3e", find_type(type)->name, tokens, stock_error);
        for (const char * const * name = available_kernel_sets(); *name != nullptr; ++name) {
            const double error = nmse(forward(find_kernel_set(*name), mod.layer, in, 1), ref);
            printf("  %s %.3e", *name, error);
            check(error <= 1.1 * stock_error + 1e-12, std::string(*name) + " " + find_type(type)->name + ": error " +
                                                          std::to_string(error / stock_error) + " of stock's");
        }
        printf("\n");
    }
}

// ggml's dot products through the external interface are ggml's results.
void compare_external(const ggml_api & ggml) {
    const cpu_traits * traits    = ggml.traits(type_q4_k);
    const external_type external = {traits->vec_dot, ggml.traits(traits->vec_dot_type)->from_float,
                                    ggml.row_size(traits->vec_dot_type, 256), 256};
    model mod;
    mod.make(type_q4_k, type_q4_k, type_q4_k, 256, 256, 2, ffn_op::swiglu, 1);
    moe_layer layer = mod.layer;
    for (expert_matrix * m : {&layer.gate, &layer.up, &layer.down}) {
        m->type     = 1000;
        m->external = &external;
    }
    input in;
    in.make(5, 1, 256, 7);
    const std::vector<float> theirs = stock(ggml, mod, in);
    for (const char * const * name = available_kernel_sets(); *name != nullptr; ++name) {
        check(nmse(forward(find_kernel_set(*name), layer, in, 1), theirs) < 1e-10,
              std::string(*name) + ": external dot products");
    }
}

} // namespace

int main(int argc, char ** argv) {
    if (argc != 2) {
        fprintf(stderr, "error: one argument expected\nhint: test_against_ggml DIR, where libggml-base.so lies\n");
        return 2;
    }
    const ggml_api ggml(argv[1]);
    for (const int32_t type : {type_f32, type_f16, type_bf16, type_q4_0, type_q4_1, type_q8_0, type_iq4_nl, type_mxfp4,
                               type_q4_k, type_q5_k, type_q6_k, type_iq4_xs}) {
        compare(ggml, type);
    }
    compare_external(ggml);
    printf("%d failures\n", n_failures);
    return n_failures == 0 ? 0 : 1;
}
