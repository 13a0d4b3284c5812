// The guard without a clock: tokens' times in, levels out.
#include "check.h"

#include "core/guard.h"

#include <algorithm>
#include <array>
#include <initializer_list>
#include <limits>
#include <random>

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

guard_token token(double token_us, double floor = floor_us) {
    guard_token t;
    t.token_us = token_us;
    t.floor_us = floor;
    return t;
}

// Feeds `n` tokens; returns how many of them changed the level, the last change in `out`.
int feed(guard & g, int n, const guard_token & t, guard_change & out) {
    int n_changes = 0;
    for (int i = 0; i < n; i++) {
        guard_change change;
        if (g.on_token(t, change)) {
            out = change;
            n_changes++;
        }
    }
    return n_changes;
}

int feed(guard & g, int n, double token_us, guard_change & out, double floor = floor_us) {
    return feed(g, n, token(token_us, floor), out);
}

// Tokens until the level changes; 0 if it did not within `most`.
int until_change(guard & g, double token_us, guard_change & out, int most) {
    for (int n = 1; n <= most; n++) {
        if (g.on_token(token(token_us), out)) {
            return n;
        }
    }
    return 0;
}

// At level i a token takes ratios[i] times its floor. Returns the tokens until `wanted`, or 0 if it took over `most`.
int until_level(guard & g, const std::array<double, n_guard_levels> & ratios, guard_level wanted, int most) {
    for (int n = 1; n <= most; n++) {
        guard_change change;
        g.on_token(token(ratios[static_cast<size_t>(g.level())] * floor_us), change);
        if (g.level() == wanted && !g.is_on_trial()) {
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
    options.pause_tokens = options.max_pause = 1000000;
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
    CHECK_EQ(feed(g, 100, 2 * floor_us, change), 0); // there is nothing below, and nothing above is better
    CHECK(g.level() == guard_level::static_layers);
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
    // Each token has its own floor: routing that costs plain llama.cpp more as well is no loss.
    CHECK_EQ(feed(g, 100, 2 * floor_us, change, 2 * floor_us), 0);
    for (int i = 0; i < 100; i++) {
        CHECK_EQ(feed(g, 1, floor_us, change), 0);
        CHECK_EQ(feed(g, 1, 9 * floor_us, change, 9 * floor_us), 0);
    }
    // Not even while a trial is judged early.
    guard by_default;
    CHECK_EQ(feed(by_default, 16, 2 * floor_us, change), 1);
    CHECK_EQ(until_change(by_default, floor_us, change, 100), 16);
    CHECK(change.is_trial);
    CHECK_EQ(feed(by_default, 1, 1000 * floor_us, change), 0);
    CHECK_EQ(feed(by_default, 15, floor_us, change), 0);
    CHECK(by_default.level() == guard_level::full && !by_default.is_on_trial());
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
    for (const double bad : {nan, infinity, 10 * floor_us}) { // nothing is left of the token
        guard_token t = token(2 * floor_us);
        t.overhead_us = bad;
        CHECK_EQ(feed(g, 100, t, change), 0);
        t.overhead_us = 0.0;
        t.price_us    = bad;
        CHECK_EQ(feed(g, 100, t, change), 0);
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
        CHECK_EQ(until_change(g, 1.2 * floor_us, change, 1000), 4);
        CHECK(!change.is_trial && change.from == guard_level::full && g.level() == guard_level::no_prefetch);
    }
    // A trial that pays brings the first pause back: of a level that is better, and of one that is as good.
    CHECK_EQ(until_change(g, floor_us, change, 1000), 32);
    CHECK_EQ(feed(g, 4, 0.5 * floor_us, change), 0);
    CHECK(g.level() == guard_level::full);
    CHECK_EQ(until_change(g, 2 * floor_us, change, 1000), 4);
    CHECK_EQ(until_change(g, floor_us, change, 1000), 8);
    CHECK_EQ(feed(g, 4, 1.01 * floor_us, change), 0);
    CHECK(g.level() == guard_level::full && !g.is_on_trial());
    // Within the floor, but slower than what it left: it does not pay.
    CHECK_EQ(until_change(g, 2 * floor_us, change, 1000), 4);
    CHECK_EQ(until_change(g, 0.5 * floor_us, change, 1000), 8);
    CHECK_EQ(until_change(g, 0.6 * floor_us, change, 1000), 4);
    CHECK(!change.is_trial && g.level() == guard_level::no_prefetch);
    CHECK_EQ(until_change(g, 0.5 * floor_us, change, 1000), 16);
}

void test_default_pauses() {
    guard g;
    guard_change change;
    CHECK_EQ(until_change(g, 2 * floor_us, change, 100), 16);
    for (const int pause : {16, 32, 64, 128, 256, 256}) {
        CHECK_EQ(until_change(g, floor_us, change, 1000), pause);
        CHECK(change.is_trial);
        CHECK(until_change(g, 2 * floor_us, change, 1000) > 0);
    }
}

void test_trial_from_the_bottom() {
    guard g(small());
    guard_change change;
    CHECK_EQ(feed(g, 16, 3 * floor_us, change), 4);
    CHECK(g.level() == guard_level::static_layers);
    // It loses even there; only a trial leads away, one level at a time, and after the longest pause.
    CHECK_EQ(until_change(g, 3 * floor_us, change, 1000), 32);
    CHECK(change.is_trial && change.to == guard_level::frozen);
    CHECK_EQ(until_change(g, 2 * floor_us, change, 1000), 8); // the trial paid: frozen stays, yet loses
    CHECK(!change.is_trial && change.from == guard_level::frozen && change.to == guard_level::static_layers);
}

// What no level gives up, and what trials took on purpose, is not held against a level.
void test_overhead_and_price_are_not_held_against_a_level() {
    for (const bool is_price : {false, true}) {
        guard g(small());
        guard_change change;
        guard_token t                           = token(3 * floor_us);
        (is_price ? t.price_us : t.overhead_us) = 2 * floor_us;
        CHECK_EQ(feed(g, 1000, t, change), 0);
        CHECK_EQ(g.token_us(), 3 * floor_us); // shown as measured
        // Only what is beyond them is a loss.
        t.token_us = 4 * floor_us;
        CHECK_EQ(feed(g, 4, t, change), 1);
        CHECK_EQ(change.token_us, 4 * floor_us);
        CHECK_EQ(change.floor_us, floor_us);
    }
    guard g(small());
    guard_change change;
    guard_token t = token(3 * floor_us);
    t.price_us = t.overhead_us = floor_us;
    CHECK_EQ(feed(g, 1000, t, change), 0);
}

void test_bad_trial_ends_early() {
    for (const double slower : {1.2, 1.3, 10.0}) {
        guard g;
        guard_change change;
        CHECK_EQ(until_change(g, 2 * floor_us, change, 100), 16);
        CHECK_EQ(until_change(g, floor_us, change, 100), 16);
        CHECK(change.is_trial);
        CHECK_EQ(until_change(g, slower * floor_us, change, 100), slower > 1.25 ? 4 : 16);
        CHECK(g.level() == guard_level::no_prefetch && !g.is_on_trial());
    }
    // It is compared with what it left, not with the floor.
    guard g;
    guard_change change;
    CHECK_EQ(until_change(g, 2 * floor_us, change, 100), 16);
    CHECK_EQ(until_change(g, 0.5 * floor_us, change, 100), 16);
    CHECK_EQ(until_change(g, 0.7 * floor_us, change, 100), 4);
    // One that becomes slow later on ends as soon as most of its tokens are.
    CHECK_EQ(until_change(g, 0.5 * floor_us, change, 100), 32);
    CHECK_EQ(feed(g, 4, 0.5 * floor_us, change), 0);
    CHECK_EQ(until_change(g, floor_us, change, 100), 4);
}

void test_resigns_at_the_level_that_lost_least() {
    const std::array<double, n_guard_levels> ratios = {3.0, 2.0, 1.5, 2.0, 3.0};
    guard g(small());
    guard_change change;
    CHECK_EQ(until_level(g, ratios, guard_level::static_layers, 100), 16);
    CHECK_EQ(until_change(g, 3 * floor_us, change, 100), 4);
    CHECK(!change.is_trial && change.from == guard_level::static_layers && change.to == guard_level::no_demand);
    // There it stays for the longest pause although it loses; then it looks again.
    CHECK_EQ(until_change(g, 1.5 * floor_us, change, 100), 32);
    CHECK(change.is_trial && change.to == guard_level::no_prefetch);

    // Levels that lose alike are not told apart: no change for nothing.
    guard other(small());
    CHECK_EQ(feed(other, 30, 2 * floor_us, change), 4);
    CHECK(other.level() == guard_level::static_layers);
}

void test_costs_that_jump_bring_the_next_trial_soon() {
    guard g;
    guard_change change;
    CHECK_EQ(until_change(g, 2 * floor_us, change, 100), 16);
    for (const int pause : {16, 32, 64, 128}) {
        CHECK_EQ(until_change(g, floor_us, change, 1000), pause);
        CHECK_EQ(until_change(g, 2 * floor_us, change, 1000), 4);
    }
    CHECK_EQ(feed(g, 23, floor_us, change), 0);
    g.on_costs_changed(); // 7 tokens of the window are not comparable any more
    CHECK_EQ(until_change(g, floor_us, change, 1000), 16);
    CHECK(change.is_trial);

    // A trial that is under way goes on.
    CHECK_EQ(feed(g, 8, floor_us, change), 0);
    g.on_costs_changed();
    CHECK(g.is_on_trial());
    CHECK_EQ(feed(g, 8, floor_us, change), 0);
    CHECK(!g.is_on_trial() && g.level() == guard_level::full);

    // Who has resigned judges again.
    guard resigned;
    CHECK_EQ(until_level(resigned, {3.0, 2.0, 1.5, 2.0, 3.0}, guard_level::static_layers, 100), 64);
    CHECK_EQ(until_change(resigned, 3 * floor_us, change, 100), 16);
    CHECK(resigned.level() == guard_level::no_demand);
    CHECK_EQ(feed(resigned, 64, 1.5 * floor_us, change), 0);
    resigned.on_costs_changed();
    CHECK_EQ(until_change(resigned, 1.5 * floor_us, change, 100), 16);
    CHECK(!change.is_trial && change.to == guard_level::frozen);
}

// All experts resident: nearly what plain llama.cpp does, with noise, and now and then a token that was delayed.
void test_all_resident_stays_full() {
    for (uint64_t seed = 1; seed <= 20; ++seed) {
        std::mt19937_64 random(seed);
        std::normal_distribution<double> noise(0.0, 0.04);
        guard g;
        for (int i = 0; i < 2000; ++i) {
            const double delay = random() % 50 == 0 ? 30.0 : 1.0;
            const double work  = 0.98 * floor_us * std::exp(noise(random)) * delay;
            guard_token t      = token(work + 0.2 * floor_us);
            t.overhead_us      = 0.2 * floor_us;
            guard_change change;
            CHECK(!g.on_token(t, change));
        }
        CHECK(g.level() == guard_level::full);
    }
}

// Whatever level a loss has led to, and however long it lasted: it is up again within 512 tokens after the end.
void test_up_again_after_a_loss() {
    const std::array<double, n_guard_levels> losses[] = {
        {2.0, 2.0, 2.0, 2.0, 2.0},  // the machine
        {5.0, 5.0, 5.0, 1.0, 1.0},  // a link that is throttled
        {1.5, 1.1, 1.0, 1.0, 1.0},  // prefetch and demanded copies that do not pay
        {3.0, 3.0, 3.0, 3.0, 1.0},  // an accelerator that is slow on single experts
        {1.5, 1.4, 1.3, 1.4, 1.5}}; // nothing helps, something loses least
    const std::array<double, n_guard_levels> none = {0.9, 0.92, 0.94, 0.96, 1.0};
    for (const auto & loss : losses) {
        for (int n_tokens = 16; n_tokens < 1500; n_tokens += 37) {
            guard g;
            guard_change change;
            for (int i = 0; i < n_tokens; ++i) {
                g.on_token(token(loss[static_cast<size_t>(g.level())] * floor_us), change);
            }
            CHECK(until_level(g, none, guard_level::full, 512) > 0);
            CHECK_EQ(feed(g, 1000, 0.9 * floor_us, change), 0);
        }
    }
}

// Leaving the static layers fills all slots, and so does the way back: a share of the time pays for both.
void test_refill_makes_the_pause_longer() {
    guard g(small());
    guard_change change;
    CHECK_EQ(feed(g, 16, 3 * floor_us, change), 4);
    g.on_refill(40.0); // 2 x 40 us of 100 us each: 0.8 % of 100 tokens
    CHECK_EQ(until_change(g, floor_us, change, 1000), 100);
    CHECK(change.is_trial && change.to == guard_level::frozen);
    g.on_refill(40.0);
    // Between levels that leave the slots as they are nothing is filled.
    CHECK_EQ(feed(g, 4, 0.9 * floor_us, change), 0);
    CHECK_EQ(until_change(g, 0.9 * floor_us, change, 1000), 4);
    CHECK(change.is_trial && change.to == guard_level::no_demand);

    // Trials from the static layers that never pay: at most the share of the time is spent on filling.
    guard losing;
    double total_us = 0.0, filling_us = 0.0;
    for (int i = 0; i < 200000; ++i) {
        const bool is_static = losing.level() == guard_level::static_layers;
        const double us      = is_static ? floor_us : 2 * floor_us;
        total_us += us;
        if (losing.on_token(token(us), change) &&
            (change.from == guard_level::static_layers || change.to == guard_level::static_layers)) {
            losing.on_refill(500.0);
            filling_us += 500.0;
        }
    }
    CHECK(filling_us > 0.004 * total_us && filling_us < 0.01 * total_us);
}

// Without a prefetch that could be given up there is no level for it, on the way down and up.
void test_no_level_for_a_prefetch_that_is_not_there() {
    guard_options options = small();
    options.has_prefetch  = false;
    guard g(options);
    guard_change change;
    for (const guard_level level : {guard_level::no_demand, guard_level::frozen, guard_level::static_layers}) {
        CHECK_EQ(until_change(g, 2 * floor_us, change, 100), 4);
        CHECK(g.level() == level);
    }
    for (const guard_level level : {guard_level::frozen, guard_level::no_demand, guard_level::full}) {
        CHECK(until_change(g, floor_us, change, 100) > 0);
        CHECK(change.is_trial && g.level() == level);
        CHECK_EQ(feed(g, 4, floor_us, change), 0);
    }
    // From a trial that does not pay it is back where it came from.
    CHECK_EQ(until_change(g, 2 * floor_us, change, 100), 4);
    CHECK(until_change(g, floor_us, change, 100) > 0);
    CHECK_EQ(until_change(g, 2 * floor_us, change, 100), 4);
    CHECK(change.from == guard_level::full && g.level() == guard_level::no_demand);
}

void test_odd_windows() {
    for (const int window : {-5, 0, 1, 64, 1000}) {
        guard_options options = small();
        options.window        = window;
        guard g(options);
        guard_change change;
        CHECK_EQ(until_change(g, 2 * floor_us, change, 1000), std::min(std::max(window, 1), 64));
        CHECK(until_change(g, floor_us, change, 1000) > 0); // trials end, too
        CHECK(change.is_trial);
        CHECK(until_change(g, 2 * floor_us, change, 1000) > 0);
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
    test_default_pauses();
    test_trial_from_the_bottom();
    test_overhead_and_price_are_not_held_against_a_level();
    test_bad_trial_ends_early();
    test_resigns_at_the_level_that_lost_least();
    test_costs_that_jump_bring_the_next_trial_soon();
    test_all_resident_stays_full();
    test_up_again_after_a_loss();
    test_refill_makes_the_pause_longer();
    test_no_level_for_a_prefetch_that_is_not_there();
    test_odd_windows();
    test_names();
    return check::report("guard");
}
