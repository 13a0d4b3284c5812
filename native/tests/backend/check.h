// CHECK names the line and the condition that failed; `report` ends the program.
#pragma once

#include <cstdio>

namespace check {

inline int & n_failed() {
    static int n = 0;
    return n;
}

inline void fail(const char * file, int line, const char * text) {
    n_failed()++;
    std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, text);
}

inline int report() {
    std::printf("%s\n", n_failed() == 0 ? "ok" : "FAILED");
    return n_failed() == 0 ? 0 : 1;
}

} // namespace check

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            check::fail(__FILE__, __LINE__, #condition);                                                               \
        }                                                                                                              \
    } while (false)
