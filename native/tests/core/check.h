// The smallest test harness that names the failing line and value, and lets one program run several cases.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>

namespace check {

inline int & n_failed() {
    static int n = 0;
    return n;
}

inline void fail(const char * file, int line, const std::string & text) {
    std::fprintf(stderr, "%s:%d: %s\n", file, line, text.c_str());
    if (++n_failed() > 50) {
        std::fprintf(stderr, "too many failures\n");
        std::exit(1);
    }
}

template <class A, class B> void equal(const A & a, const B & b, const char * what, const char * file, int line) {
    if (!(a == b)) {
        std::ostringstream text;
        text << what << ": " << a << " != " << b;
        fail(file, line, text.str());
    }
}

inline int report(const char * name) {
    std::printf("%s: %s\n", name, n_failed() == 0 ? "ok" : "FAILED");
    return n_failed() == 0 ? 0 : 1;
}

} // namespace check

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            check::fail(__FILE__, __LINE__, #condition);                                                               \
        }                                                                                                              \
    } while (false)
#define CHECK_EQ(a, b) check::equal((a), (b), #a " == " #b, __FILE__, __LINE__)
#define CHECK_OK(expression)                                                                                           \
    do {                                                                                                               \
        const hybrimoe::status check_status_ = (expression);                                                           \
        if (!check_status_.ok()) {                                                                                     \
            check::fail(__FILE__, __LINE__, std::string(#expression ": ") + check_status_.message());                  \
        }                                                                                                              \
    } while (false)
