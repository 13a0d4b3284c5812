// Expert ids from a file in place of the router's.
#include "check.h"
#include "hybrid/route_trace.h"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <initializer_list>
#include <set>
#include <stdexcept>
#include <string>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

using namespace hybrimoe;

namespace {

constexpr int32_t magic = 0x52544d48;

class temporary_file {
public:
    explicit temporary_file(const std::vector<int32_t> & content, size_t n_bytes_less = 0)
        : path_("route_trace_test." + std::to_string(::getpid())) {
        std::ofstream file(path_, std::ios::binary);
        file.write(reinterpret_cast<const char *>(content.data()),
                   static_cast<std::streamsize>(content.size() * sizeof(int32_t) - n_bytes_less));
    }
    ~temporary_file() { std::remove(path_.c_str()); }
    const std::string & path() const { return path_; }

private:
    std::string path_;
};

// Three steps of two layers, top-2.
const std::vector<int32_t> good = {magic, 1, 3, 2, 2, /* step 0 */ 0, 1, 2, 3, /* 1 */ 4, 5, 6, 7, /* 2 */ 1, 0, 3, 2};

std::vector<int32_t> ids_of(route_trace & trace, int layer, int64_t n_tokens, int32_t top_k, int32_t n_expert) {
    std::vector<int32_t> ids(static_cast<size_t>(n_tokens * top_k), -1);
    trace.replace(layer, ids.data(), n_tokens, top_k, n_expert);
    return ids;
}

bool same(const std::vector<int32_t> & a, std::initializer_list<int32_t> b) {
    return a == std::vector<int32_t>(b);
}

void test_order() {
    const temporary_file file(good);
    route_trace trace;
    CHECK(!trace.is_active());
    trace.load(file.path());
    CHECK(trace.is_active());
    CHECK(same(ids_of(trace, 0, 1, 2, 8), {0, 1}) && same(ids_of(trace, 1, 1, 2, 8), {2, 3}));
    CHECK(same(ids_of(trace, 0, 1, 2, 8), {0, 1})); // until the pass ends
    trace.next_pass(1);
    CHECK(same(ids_of(trace, 0, 2, 2, 8), {4, 5, 1, 0})); // a token takes a step
    trace.next_pass(2);
    CHECK(same(ids_of(trace, 1, 1, 2, 8), {2, 3})); // from the start again
    CHECK(same(ids_of(trace, 0, 4, 2, 8), {0, 1, 4, 5, 1, 0, 0, 1}));
    CHECK(same(ids_of(trace, 2, 1, 2, 8), {0, 1})); // a model with more layers
}

void test_other_models() {
    const temporary_file file(good);
    route_trace trace;
    trace.load(file.path());
    trace.next_pass(1);
    CHECK(same(ids_of(trace, 1, 1, 1, 8), {6})); // fewer experts a token
    for (const int32_t n_expert : {3, 4, 5, 8}) {
        for (const int32_t top_k : {1, 2, 3}) { // more, or fewer to choose from: none twice, all in range
            const std::vector<int32_t> ids = ids_of(trace, 1, 1, top_k, n_expert);
            CHECK(std::set<int32_t>(ids.begin(), ids.end()).size() == ids.size());
            CHECK(std::all_of(ids.begin(), ids.end(), [&](int32_t id) { return id >= 0 && id < n_expert; }));
        }
    }
}

std::string refusal(const std::vector<int32_t> & content, size_t n_bytes_less = 0) {
    const temporary_file file(content, n_bytes_less);
    route_trace trace;
    try {
        trace.load(file.path());
        return "";
    } catch (const std::runtime_error & error) {
        CHECK(!trace.is_active());
        return error.what();
    }
}

void test_refusals() {
    CHECK(refusal(good).empty());
    CHECK(refusal({}).find("another format") != std::string::npos);
    CHECK(refusal({1, 1, 1, 1, 1, 0}).find("another format") != std::string::npos);
    CHECK(refusal({magic, 2, 1, 1, 1, 0}).find("another format") != std::string::npos);
    CHECK(refusal(good, 1).find("cut off") != std::string::npos);
    for (size_t at = 2; at < 5; at++) {
        for (const int32_t bad : {0, -1, 2147483647}) {
            std::vector<int32_t> content = good;
            content[at]                  = bad;
            const std::string why        = refusal(content);
            CHECK(why.find("impossible dimensions") != std::string::npos || why.find("cut off") != std::string::npos);
        }
    }
    route_trace trace;
    bool is_refused = false;
    try {
        trace.load("/nonexistent/trace");
    } catch (const std::runtime_error &) {
        is_refused = true;
    }
    CHECK(is_refused);
}

// Opening it would wait for a writer.
void test_pipe() {
    const std::string path = "route_trace_test_pipe." + std::to_string(::getpid());
    CHECK(::mkfifo(path.c_str(), 0600) == 0);
    route_trace trace;
    std::string why;
    try {
        trace.load(path);
    } catch (const std::runtime_error & error) {
        why = error.what();
    }
    CHECK(why.find("no regular file") != std::string::npos && !trace.is_active());
    std::remove(path.c_str());
}

} // namespace

int main() {
    test_order();
    test_other_models();
    test_refusals();
    test_pipe();
    return check::report();
}
