// The guard without a clock: tokens' times in, levels out.
#include "check.h"

#include "core/guard.h"

#include <algorithm>
#include <initializer_list>
#include <limits>

using namespace hybrimoe;

namespace {

constexpr double floor_us = 100.0;

guard_options small() {
    guard_options o;
    o.window       = 4;
    o.pause_tokens = 8;
    o.max_pause    = 32;
    return o;
}

// Feeds `n` tokens; returns how many of them changed the level, the last change in `out`.
int feed(guard & g, int n, double token_us, guard_change & out, double floor = floor_us) {
    int n_changes = 0;
    for (int i = 0; i < n; i++) {
        guard_change change;
        if (g.on_token(token_us, floor, change)) {
            out = change;
            n_changes++;
        }
    }
    return n_changes;
}

// Tokens until the level changes; 0 if it did not within `most`.
int until_change(guard & g, double token_us, guard_change & out, int most) {
    for (int n = 1; n <= most; n++) {
        if (g.on_token(token_us, floor_us, out)) {
            return n;
        }
    }
    return 0;
}

void test_stays_up() {
    guard g(small());
    guard_change change;
    CHECK_EQ(feed(g, 1000, floor_us, change), 0);        // as fast as the floor
    CHECK_EQ(feed(g, 1000, 1.03 * floor_us, change), 0); // within the tolerance
    CHECK(g.level() == guard_level::full);
    CHECK_EQ(g.n_changes(), 0);
    CHECK_EQ(g.floor_us(), floor_us);
}

void test_steps_down_level_by_level() {
    const guard_level levels[] = {guard_level::full, guard_level::no_prefetch, guard_level::no_demand,
                                  guard_level::frozen, guard_level::static_layers};
    guard_options options      = small();
    options.pause_tokens       = 1000000;
    guard g(options);
    for (int i = 0; i < 4; i++) {
        guard_change change;
        CHECK_EQ(until_change(g, 2 * floor_us, change, 100), 4);
        CHECK(change.from == levels[i] && change.to == levels[i + 1] && g.level() == levels[i + 1]);
        CHECK(!change.is_trial);
        CHECK_EQ(change.token_us, 2 * floor_us);
        CHECK_EQ(change.floor_us, floor_us);
    }
    guard_change change;
    CHECK_EQ(feed(g, 100, 2 * floor_us, change), 0); // there is nothing below
    CHECK_EQ(g.n_changes(), 4);
}

void test_default_steps_down_twice_within_64_tokens() {
    guard g;
    guard_change change;
    CHECK_EQ(feed(g, 64, 2 * floor_us, change), 4);
    CHECK(g.level() == guard_level::static_layers);
}

void test_one_slow_token_decides_nothing() {
    guard g(small());
    guard_change change;
    for (int i = 0; i < 100; i++) {
        CHECK_EQ(feed(g, 1, 1000 * floor_us, change), 0);
        CHECK_EQ(feed(g, 3, floor_us, change), 0);
    }
    // The floor is the mean of the same tokens: routing that costs plain llama.cpp more as well is no loss.
    CHECK_EQ(feed(g, 100, 2 * floor_us, change, 2 * floor_us), 0);
}

void test_what_is_no_time_is_ignored() {
    const double nan      = std::numeric_limits<double>::quiet_NaN();
    const double infinity = std::numeric_limits<double>::infinity();
    guard g(small());
    guard_change change;
    for (const double bad : {nan, infinity, -infinity, 0.0, -1.0}) {
        CHECK_EQ(feed(g, 100, bad, change), 0);
        CHECK_EQ(feed(g, 100, 2 * floor_us, change, bad), 0);
    }
    CHECK(g.level() == guard_level::full);
    // Nor do they count as tokens of the window.
    CHECK_EQ(feed(g, 3, 2 * floor_us, change), 0);
    CHECK_EQ(feed(g, 10, nan, change), 0);
    CHECK_EQ(feed(g, 1, 2 * floor_us, change), 1);
}

void test_trial_that_pays() {
    guard g(small());
    guard_change change;
    CHECK_EQ(feed(g, 4, 2 * floor_us, change), 1);
    CHECK(change.to == guard_level::no_prefetch);
    // At the new level all is well; after the pause it tries the level above, and stays.
    CHECK_EQ(until_change(g, floor_us, change, 100), 8);
    CHECK(change.is_trial && change.from == guard_level::no_prefetch && change.to == guard_level::full);
    CHECK_EQ(feed(g, 1000, 0.9 * floor_us, change), 0);
    CHECK(g.level() == guard_level::full);
}

void test_trial_that_does_not_pay_doubles_the_pause() {
    guard g(small());
    guard_change change;
    CHECK_EQ(feed(g, 4, 2 * floor_us, change), 1);
    for (const int pause : {8, 16, 32, 32}) { // up to max_pause
        CHECK_EQ(until_change(g, floor_us, change, 1000), pause);
        CHECK(change.is_trial && g.level() == guard_level::full);
        // Faster than before, but by less than the gain asked for.
        CHECK_EQ(until_change(g, 0.99 * floor_us, change, 1000), 4);
        CHECK(!change.is_trial && change.from == guard_level::full && g.level() == guard_level::no_prefetch);
    }
    // A trial that pays brings the first pause back.
    CHECK_EQ(until_change(g, floor_us, change, 1000), 32);
    CHECK_EQ(feed(g, 4, 0.5 * floor_us, change), 0);
    CHECK(g.level() == guard_level::full);
    CHECK_EQ(until_change(g, 2 * floor_us, change, 1000), 4);
    CHECK_EQ(until_change(g, floor_us, change, 1000), 8);
}

void test_trial_from_the_bottom() {
    guard g(small());
    guard_change change;
    CHECK_EQ(feed(g, 16, 3 * floor_us, change), 4);
    CHECK(g.level() == guard_level::static_layers);
    // It loses even there; only a trial leads away, one level at a time.
    CHECK_EQ(until_change(g, 3 * floor_us, change, 1000), 8);
    CHECK(change.is_trial && change.to == guard_level::frozen);
    CHECK_EQ(until_change(g, 2 * floor_us, change, 1000), 8); // the trial paid: frozen stays, yet loses
    CHECK(!change.is_trial && change.from == guard_level::frozen && change.to == guard_level::static_layers);
}

void test_odd_windows() {
    for (const int window : {-5, 0, 1, 64, 1000}) {
        guard_options options = small();
        options.window        = window;
        guard g(options);
        guard_change change;
        CHECK_EQ(until_change(g, 2 * floor_us, change, 1000), std::min(std::max(window, 1), 64));
    }
}

void test_names() {
    for (int level = 0; level <= static_cast<int>(guard_level::static_layers); level++) {
        for (int other = 0; other < level; other++) {
            CHECK(std::string(guard_level_name(static_cast<guard_level>(level))) !=
                  guard_level_name(static_cast<guard_level>(other)));
        }
    }
}

} // namespace

int main() {
    test_stays_up();
    test_steps_down_level_by_level();
    test_default_steps_down_twice_within_64_tokens();
    test_one_slow_token_decides_nothing();
    test_what_is_no_time_is_ignored();
    test_trial_that_pays();
    test_trial_that_does_not_pay_doubles_the_pause();
    test_trial_from_the_bottom();
    test_odd_windows();
    test_names();
    return check::report("guard");
}
