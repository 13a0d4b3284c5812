// hybrimoe.h: what it says about the running ggml, and calls with bad arguments.
#include "check.h"
#include "counters.h"
#include "fake_ggml.h"
#include "hybrimoe.h"

#include <cstring>
#include <string>
#include <thread>

namespace {

bool contains(const char * text, const char * part) {
    return text != nullptr && std::strstr(text, part) != nullptr;
}

void test_versions() {
    CHECK(hybrimoe_abi_version() == HYBRIMOE_ABI_VERSION);
    CHECK(std::strlen(hybrimoe_version()) > 0);
    CHECK(std::strlen(hybrimoe_ggml_version()) > 0);
}

void test_configure() {
    char error[256] = "untouched";
    CHECK(hybrimoe_configure("{\"cpu_kernels\": \"ggml\"}", error, sizeof(error)) == 0);
    CHECK(std::string(error) == "untouched");

    CHECK(hybrimoe_configure("{\"cpu_kernel\": \"ggml\"}", error, sizeof(error)) == -1);
    CHECK(contains(error, "cpu_kernel\""));
    CHECK(contains(error, "known"));

    char tiny[4] = "abc";
    CHECK(hybrimoe_configure("[]", tiny, sizeof(tiny)) == -1);
    CHECK(std::strlen(tiny) == 3);
    tiny[0] = 'x';
    CHECK(hybrimoe_configure("[]", tiny, 0) == -1);
    CHECK(tiny[0] == 'x');
    CHECK(hybrimoe_configure("[]", nullptr, 100) == -1);
    CHECK(hybrimoe_configure(nullptr, error, sizeof(error)) == -1);
}

void test_last_words() {
    CHECK(hybrimoe_set_last_words(HYBRIMOE_ILLEGAL_INSTRUCTION, "gone", 5) == 0);
    CHECK(hybrimoe_set_last_words(HYBRIMOE_ILLEGAL_INSTRUCTION, nullptr, 5) == 0);
    CHECK(hybrimoe_set_last_words(HYBRIMOE_FILE_IS_GONE, nullptr, 3) == 0);
    CHECK(hybrimoe_set_last_words(2, "gone", 5) == -1);
    CHECK(hybrimoe_set_last_words(-1, nullptr, 5) == -1);
}

void test_unknown_instances() {
    hybrimoe_layer_counters out;
    std::memset(&out, 0x5a, sizeof(out));
    const hybrimoe_layer_counters before = out;
    for (const uint64_t id : {uint64_t{0}, uint64_t{12345}, ~uint64_t{0}}) {
        CHECK(hybrimoe_n_layers(id) == 0);
        CHECK(hybrimoe_get_layer_counters(id, 0, &out) == -1);
        CHECK(hybrimoe_n_nodes_delegated(id) == 0);
        CHECK(hybrimoe_reset_counters(id) == -1);
    }
    CHECK(std::memcmp(&out, &before, sizeof(out)) == 0);
}

void test_instances() {
    CHECK(hybrimoe_last_instance() == 0);
    const hybrimoe::instance_ticket first  = hybrimoe::register_instance();
    const hybrimoe::instance_ticket second = hybrimoe::register_instance();
    CHECK(first.id >= 1 && second.id > first.id);
    CHECK(hybrimoe_last_instance() == second.id);
    std::thread([] { CHECK(hybrimoe_last_instance() == 0); }).join();

    hybrimoe::add(first.data->layer(2).n_blocks, 3);
    hybrimoe::add(first.data->n_nodes_delegated, 4);
    CHECK(hybrimoe_n_layers(first.id) == 3);
    CHECK(hybrimoe_n_layers(second.id) == 0);
    hybrimoe_layer_counters out{};
    CHECK(hybrimoe_get_layer_counters(first.id, 2, &out) == 0 && out.n_blocks == 3);
    CHECK(hybrimoe_get_layer_counters(first.id, 0, &out) == 0 && out.n_blocks == 0);
    for (const int layer : {-1, 3, 1 << 30, -(1 << 30)}) {
        CHECK(hybrimoe_get_layer_counters(first.id, layer, &out) == -1);
    }
    CHECK(hybrimoe_n_nodes_delegated(first.id) == 4);
    CHECK(hybrimoe_reset_counters(first.id) == 0);
    CHECK(hybrimoe_n_nodes_delegated(first.id) == 0);

    hybrimoe::forget_instance(first.id);
    CHECK(hybrimoe_n_layers(first.id) == 0);
    hybrimoe::add(first.data->layer(0).n_blocks, 1); // a computation that is still running keeps its counters
    hybrimoe::forget_instance(first.id);
    hybrimoe::forget_instance(second.id);
    CHECK(hybrimoe::register_instance().id > second.id);
}

} // namespace

int main(int argc, char ** argv) {
    const std::string test       = argc > 1 ? argv[1] : "same";
    fake_ggml::answers & answers = fake_ggml::current();
    if (test == "missing-function") {
        answers.missing_function = "ggml_glu_split";
        CHECK(contains(hybrimoe_check_ggml(nullptr), "ggml_glu_split()"));
        answers.missing_function = nullptr;
        CHECK(contains(hybrimoe_check_ggml(nullptr), "ggml_glu_split()")); // the first verdict holds
    } else if (test == "misfit") {
        answers.reason = "tensors are other";
        CHECK(contains(hybrimoe_check_ggml(nullptr), "9.9.9"));
        CHECK(contains(hybrimoe_check_ggml(nullptr), "tensors are other"));
    } else {
        CHECK(hybrimoe_check_ggml(nullptr) == nullptr);
        test_versions();
        test_configure();
        test_last_words();
        test_unknown_instances();
        test_instances();
    }
    return check::report();
}
