// Settings: the JSON that the host sends, and the defaults from the environment.
#include "check.h"
#include "kernels/moe_kernels.h"
#include "settings.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

using namespace hybrimoe;

namespace {

// The message with which `json` is refused; empty when it is accepted.
std::string refusal(const std::string & json) {
    try {
        parse_settings(json, settings());
        return "";
    } catch (const std::invalid_argument & error) {
        return error.what();
    }
}

bool contains(const std::string & text, const char * part) {
    return text.find(part) != std::string::npos;
}

void test_valid() {
    CHECK(parse_settings("{}", settings()).kernels == settings().kernels);
    settings ggml;
    ggml.kernels = cpu_kernels::ggml;
    CHECK(parse_settings("{}", ggml).kernels == cpu_kernels::ggml);
    CHECK(parse_settings("{\"cpu_kernels\": \"auto\"}", ggml).kernels == cpu_kernels::best);
    for (const char * const * name = kernels::available_kernel_sets(); *name != nullptr; name++) {
        const settings named = parse_settings("{\"cpu_kernels\": \"" + std::string(*name) + "\"}", ggml);
        CHECK(named.kernels == cpu_kernels::named && named.kernel_set == *name);
        CHECK(parse_settings("{\"cpu_kernels\": \"ggml\"}", named).kernels == cpu_kernels::ggml);
    }
    CHECK(parse_settings(" {\"cpu_kernels\" : \"ggml\"}\n", settings()).kernels == cpu_kernels::ggml);
}

void test_not_json() {
    for (const char * json :
         {"", " ", "{", "{\"cpu_kernels\": }", "nonsense", "{} {}", "{\"cpu_kernels\": \"\xff\"}"}) {
        CHECK(contains(refusal(json), "not JSON"));
    }
    CHECK(contains(refusal(std::string("{\0}", 3)), "not JSON"));
}

void test_wrong_type() {
    for (const char * json : {"[]", "null", "3", "\"cpu_kernels\""}) {
        CHECK(contains(refusal(json), "object"));
    }
    for (const char * value : {"1", "null", "true", "[\"ggml\"]", "{}"}) {
        CHECK(contains(refusal("{\"cpu_kernels\": " + std::string(value) + "}"), "cpu_kernels must be a string"));
    }
}

void test_unknown() {
    const std::string key = refusal("{\"cpu_kernels\": \"ggml\", \"treads\": 2}");
    CHECK(contains(key, "treads") && contains(key, "known"));
    const std::string value = refusal("{\"cpu_kernels\": \"abacus\"}");
    CHECK(contains(value, "abacus") && contains(value, "\"ggml\""));
    CHECK(!refusal("{\"cpu_kernels\": \"GGML\"}").empty());
    CHECK(!refusal("{\"\": 0}").empty());
}

void test_huge() {
    const size_t depth = 1 << 17; // enough to overflow the stack of a recursive parser
    CHECK(contains(refusal(std::string(depth, '[')), "not JSON"));
    CHECK(contains(refusal(std::string(depth, '[') + std::string(depth, ']')), "object"));
    const size_t n = 1 << 18;
    CHECK(!refusal("{\"cpu_kernels\": \"" + std::string(n, 'g') + "\"}").empty());
    CHECK(refusal("{" + std::string(n, ' ') + "}").empty());
}

void test_current() {
    CHECK(current_settings().kernels == settings().kernels);
    settings ggml;
    ggml.kernels = cpu_kernels::ggml;
    set_current_settings(ggml);
    CHECK(current_settings().kernels == cpu_kernels::ggml);
    CHECK(parse_settings("{}", current_settings()).kernels == cpu_kernels::ggml);
}

} // namespace

int main(int argc, char ** argv) {
    const std::string test = argc > 1 ? argv[1] : "plain";
    if (test == "environment") {
        setenv("HYBRIMOE_CPU", "ggml", 1);
        CHECK(current_settings().kernels == cpu_kernels::ggml);
    } else if (test == "bad-environment") {
        setenv("HYBRIMOE_CPU", "abacus", 1);
        for (int again = 0; again < 2; again++) {
            std::string message;
            try {
                current_settings();
            } catch (const std::exception & error) {
                message = error.what();
            }
            CHECK(contains(message, "abacus") && contains(message, "ggml"));
        }
    } else {
        unsetenv("HYBRIMOE_CPU");
        test_valid();
        test_not_json();
        test_wrong_type();
        test_unknown();
        test_huge();
        test_current();
    }
    return check::report();
}
