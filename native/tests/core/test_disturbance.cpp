// What holds right now: three samples in a row decide, one of them never.
#include "check.h"

#include "core/calibration/disturbance.h"

#include <initializer_list>
#include <random>

using namespace hybrimoe;

namespace {

constexpr double residual = 0.05;

bool feed(disturbance & d, std::initializer_list<double> ratios) {
    bool has_changed = false;
    for (const double ratio : ratios) {
        has_changed = d.observe(std::log(ratio), residual);
    }
    return has_changed; // by the last one
}

void check_factor(const disturbance & d, double factor) {
    CHECK(std::fabs(d.factor() / factor - 1.0) < 1e-9);
    CHECK_EQ(d.is_on(), factor != 1.0);
}

void test_three_in_a_row_set_it() {
    for (const double far : {10.0, 0.1, 1.6, 0.6}) {
        disturbance d;
        CHECK(!feed(d, {far, far}));
        check_factor(d, 1.0);
        CHECK(feed(d, {far}));
        check_factor(d, far);
        CHECK(!feed(d, {far, far})); // nothing new
    }
    disturbance d;
    CHECK(feed(d, {1.0, 20.0, 8.0, 12.0}));
    check_factor(d, 12.0); // their median
}

void test_two_do_not() {
    disturbance d;
    for (int i = 0; i < 100; ++i) {
        CHECK(!feed(d, {10.0, 10.0, 1.0}));
        CHECK(!feed(d, {10.0, 1.0, 0.1}));
        CHECK(!feed(d, {0.1, 0.1, 1.1}));
        CHECK(!feed(d, {10.0, 0.1, 10.0})); // not in one direction
        CHECK(!feed(d, {1.0, 1.0}));
        check_factor(d, 1.0);
    }
    // Nor three that are not far off.
    CHECK(!feed(d, {1.45, 1.45, 1.45, 1.45}));
    CHECK(!feed(d, {0.7, 0.7, 0.7, 0.7}));
    // What is usual for a noisy resource is not far off.
    for (int i = 0; i < 10; ++i) {
        CHECK(!d.observe(std::log(2.0), 0.2));
    }
    CHECK(d.observe(std::log(3.0), 0.2) || d.observe(std::log(3.0), 0.2) || d.observe(std::log(3.0), 0.2));
}

void test_median_clears_it() {
    disturbance d;
    CHECK(feed(d, {10.0, 10.0, 10.0}));
    CHECK(!feed(d, {1.0})); // one that is not off may be luck
    check_factor(d, 10.0);
    CHECK(feed(d, {1.1}));
    check_factor(d, 1.0);

    // It follows what is still off by more than 1.2, also below what would set it.
    CHECK(feed(d, {10.0, 10.0, 10.0}));
    CHECK(feed(d, {1.3, 1.3}));
    check_factor(d, 1.3);
    CHECK(!feed(d, {1.3, 1.3}));
    CHECK(feed(d, {1.19, 1.19}));
    check_factor(d, 1.0);
    CHECK(!feed(d, {1.3, 1.3, 1.3}));

    // From one side to the other.
    CHECK(feed(d, {10.0, 10.0, 10.0}));
    CHECK(feed(d, {0.1, 0.1}));
    check_factor(d, 0.1);
    CHECK(feed(d, {1.0, 1.0}));
    check_factor(d, 1.0);
}

void test_lasting_costs_take_over() {
    disturbance d;
    CHECK(feed(d, {10.0, 10.0, 10.0}));
    d.clear();
    check_factor(d, 1.0);
    CHECK(!feed(d, {10.0, 10.0})); // those before count no more
    CHECK(feed(d, {10.0}));
    check_factor(d, 10.0);
}

// Neither noise alone nor one waiting sample in a hundred is a disturbance.
void test_noise_is_none() {
    std::mt19937_64 random(3);
    std::normal_distribution<double> gauss(0.0, residual);
    disturbance d;
    int n_on = 0;
    for (int i = 0; i < 100000; ++i) {
        d.observe(gauss(random) + (random() % 100 == 0 ? std::log(30.0) : 0.0), residual);
        n_on += d.is_on() ? 1 : 0;
    }
    CHECK(n_on < 20);
}

} // namespace

int main() {
    test_three_in_a_row_set_it();
    test_two_do_not();
    test_median_clears_it();
    test_lasting_costs_take_over();
    test_noise_is_none();
    return check::report("disturbance");
}
