// hybrimoe.h: what it says about the running ggml, and calls with bad arguments.
#include "check.h"
#include "counters.h"
#include "fake_ggml.h"
#include "hybrimoe.h"

#include "nlohmann/json.hpp"

#include <cstring>
#include <string>
#include <thread>
#include <unistd.h>

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

nlohmann::json snapshot(const std::string & request) {
    std::string text(static_cast<size_t>(hybrimoe_snapshot(request.c_str(), nullptr, 0)) + 64, '\0');
    const int64_t length = hybrimoe_snapshot(request.c_str(), text.data(), text.size());
    CHECK(length >= 0 && static_cast<size_t>(length) < text.size());
    return nlohmann::json::parse(text.c_str());
}

void test_requests() {
    const nlohmann::json all = snapshot("");
    CHECK(all["schema"] == 1 && all["pid"] == ::getpid() && all["instances"].empty());
    CHECK(all["host"].is_null() && all["socket"].is_null() && all["program"].get<std::string>().size() > 0);
    for (const char * request : {"nonsense", "instance=", "instance=x", "after=-1", "counters,state", "instance=1x"}) {
        CHECK(contains(snapshot(request).value("error", "").c_str(), "not known"));
    }
    CHECK(snapshot("instance=12345 counters")["instances"].empty());
    char tiny[4] = "abc";
    CHECK(hybrimoe_snapshot(nullptr, tiny, sizeof(tiny)) > 100 && std::strlen(tiny) == 3);
}

void test_host_facts() {
    char error[64] = "";
    CHECK(hybrimoe_set_host_facts("{\"phase\":\n\"idle\"}", error, sizeof(error)) == 0);
    CHECK(snapshot("counters")["host"]["phase"] == "idle");
    const std::string large = "{\"x\": \"" + std::string(70000, 'x') + "\"}";
    for (const std::string & bad : {std::string("[]"), std::string("{"), large}) {
        CHECK(hybrimoe_set_host_facts(bad.c_str(), error, sizeof(error)) == -1 && std::strlen(error) > 0);
    }
    CHECK(hybrimoe_set_host_facts("[]", nullptr, 0) == -1);
    CHECK(snapshot("counters")["host"]["phase"] == "idle");
}

void test_instances() {
    CHECK(hybrimoe_last_instance() == 0);
    const hybrimoe::instance_ticket first  = hybrimoe::register_instance();
    const hybrimoe::instance_ticket second = hybrimoe::register_instance();
    CHECK(first.id >= 1 && second.id > first.id);
    CHECK(hybrimoe_last_instance() == second.id);
    std::thread([] { CHECK(hybrimoe_last_instance() == 0); }).join();

    hybrimoe::add(first.data->layer(2).n_steps, 1);
    hybrimoe::add(first.data->layer(2).n_blocks, 3);
    hybrimoe::add(first.data->layer(2).router_ns, 1500);
    hybrimoe::add(first.data->n_nodes_delegated, 4);
    hybrimoe::add(first.data->passes.n_prompt_tokens, 7);
    const std::string name     = "instance=" + std::to_string(first.id);
    const nlohmann::json found = snapshot(name + " counters")["instances"];
    CHECK(found.size() == 1 && found[0]["id"] == first.id && found[0]["n_nodes_delegated"] == 4);
    const nlohmann::json & columns = found[0]["counters"];
    CHECK(columns["layer"] == nlohmann::json({2}) && columns["n_blocks"] == nlohmann::json({3}));
    CHECK(columns["router_us"] == nlohmann::json({1.5}) && found[0]["passes"]["n_prompt_tokens"] == 7);
    CHECK(snapshot("counters")["instances"].size() == 2);
    CHECK(snapshot(name + " state")["instances"].empty()); // it has not been shown yet
    hybrimoe_trace_pass head;
    CHECK(hybrimoe_read_trace(first.id, &head, sizeof(head)) == -1 && hybrimoe_stop_trace(first.id) == -1);

    hybrimoe::forget_instance(first.id);
    CHECK(snapshot(name)["instances"].empty());
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
        test_requests();
        test_host_facts();
        test_instances();
    }
    return check::report();
}
