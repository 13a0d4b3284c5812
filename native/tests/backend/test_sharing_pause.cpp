// A pause after a failed step: it ends by itself, grows with each failure, and is short again after it has worked.
#include "check.h"

#include "hybrid/sharing_pause.h"

using namespace hybrimoe;

namespace {

constexpr double second_us = 1e6;

void test_doubles_up_to_a_minute() {
    sharing_pause pause;
    CHECK(!pause.is_on(0.0));
    double now_us = 10.0;
    for (const double length_s : {1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0}) {
        pause.begin("why", now_us);
        CHECK(pause.is_on(now_us) && pause.reason() == "why");
        CHECK(pause.is_on(now_us + length_s * second_us - 1.0));
        now_us += length_s * second_us;
        CHECK(!pause.is_on(now_us));
        CHECK(!pause.is_on());
    }
    CHECK(pause.n() == 8);
}

void test_is_short_again_after_success() {
    sharing_pause pause;
    pause.begin("why", 0.0);
    pause.begin("why", second_us); // two seconds, until 3 s
    pause.on_success(4 * second_us);
    pause.begin("why", 4 * second_us); // it had worked for less than two seconds
    CHECK(pause.until_us() == 8 * second_us);
    pause.on_success(13 * second_us);
    pause.begin("why", 13 * second_us);
    CHECK(pause.until_us() == 14 * second_us);
}

} // namespace

int main() {
    test_doubles_up_to_a_minute();
    test_is_short_again_after_success();
    return check::report();
}
