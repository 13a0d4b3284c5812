// The live cost model against synthetic machines: known parameters, noise, outliers, steps, clocks that jump.
#include "check.h"
#include "core/calibration/cost_estimator.h"
#include "layers.h"

#include <cmath>
#include <random>
#include <vector>

using namespace hybrimoe;

namespace {

struct noise {
    std::mt19937_64 random{11};
    double sigma = 0.05, outlier_share = 0.0;

    double operator()(double us) {
        std::normal_distribution<double> gauss(0.0, sigma);
        std::uniform_real_distribution<double> u(0.0, 1.0);
        const double factor = u(random) < outlier_share ? 3.0 + 20.0 * u(random) : 1.0;
        return us * factor * std::exp(gauss(random));
    }
};

void check_near(double value, double truth, double share, const char * what) {
    if (!(std::fabs(value / truth - 1.0) <= share)) {
        std::ostringstream text;
        text << what << ": " << value << " is not within " << share * 100 << " % of " << truth;
        check::fail(__FILE__, __LINE__, text.str());
    }
}

cost_model base_costs(double latency_us, double bytes_per_us) {
    layers::costs c;
    c.bytes = 2.7e6, c.cpu_fixed = 60, c.cpu_per_token = 9, c.cpu_first = 25, c.cpu_step = 5;
    c.gpu_fixed = 20, c.gpu_per_token = 0.5, c.gpu_step = 30, c.dram = 40e3;
    cost_model m = layers::make_costs(c, 4);
    CHECK_OK(m.set_link(0, latency_us, bytes_per_us));
    return m;
}

cost_estimator make_estimator(const cost_model & m) {
    cost_estimator e;
    CHECK_OK(cost_estimator::create(m, {}, e));
    return e;
}

double random_bytes(std::mt19937_64 & random) {
    return std::exp2(std::uniform_real_distribution<double>(14.0, 24.0)(random)); // 16 KiB to 16 MiB
}

void test_batch_fit() {
    noise n;
    n.outlier_share = 0.1;
    std::vector<double> x, y;
    for (int k = 0; k < 400; ++k) {
        const double bytes = random_bytes(n.random);
        x.insert(x.end(), {1.0, bytes});
        y.push_back(n(8.0 + bytes / 12000.0));
    }
    fit_result fit;
    CHECK_OK(fit_costs(x.data(), y.data(), 400, 2, fit));
    check_near(fit.params[0], 8.0, 0.05, "latency");
    check_near(1.0 / fit.params[1], 12000.0, 0.05, "bandwidth");
    CHECK(fit.n_outliers >= 25 && fit.n_outliers <= 60);
    CHECK(fit.median_error < 0.06);

    // A parameter that is not there stays at zero instead of going below it.
    for (int k = 0; k < 400; ++k) {
        y[static_cast<size_t>(k)] = n(x[static_cast<size_t>(k) * 2 + 1] / 12000.0);
    }
    CHECK_OK(fit_costs(x.data(), y.data(), 400, 2, fit));
    CHECK(fit.params[0] >= 0.0 && fit.params[0] < 0.2);

    const double bad[] = {-1.0};
    CHECK(!fit_costs(x.data(), bad, 1, 1, fit).ok());
    CHECK(!fit_costs(x.data(), y.data(), 1, 2, fit).ok());
    CHECK(!fit_costs(x.data(), y.data(), 10, 4, fit).ok());
}

void test_copies_converge() {
    for (const double share : {0.0, 0.1}) {
        noise n;
        n.outlier_share  = share;
        cost_estimator e = make_estimator(base_costs(4.0, 40000.0)); // both wrong by about a factor of two
        for (int k = 0; k < 600; ++k) {
            const double bytes = random_bytes(n.random);
            e.observe_copy(0, bytes, n(9.0 + bytes / 24800.0), k * 1000.0);
        }
        check_near(e.link_latency_us(0), 9.0, 0.05, "latency");
        check_near(e.link_bytes_per_us(0), 24800.0, 0.05, "bandwidth");
    }
}

// A link that changes its width, with copies of one size only: within 32 samples, and reported.
void test_step_settles() {
    for (const double factor : {0.25, 4.0}) {
        for (uint64_t seed = 1; seed <= 50; ++seed) {
            noise n;
            n.random.seed(seed);
            n.outlier_share  = seed % 2 ? 0.0 : 0.05;
            cost_estimator e = make_estimator(base_costs(9.0, 24800.0));
            cost_model costs = e.calibrated();
            double now_us    = 0.0;
            for (int k = 0; k < 300; ++k, now_us += 1000.0) {
                e.observe_copy(0, 2.7e6, n(9.0 + 2.7e6 / 24800.0), now_us);
            }
            drift_report r;
            CHECK(!e.next_drift(r));
            const double since = now_us, rate = 24800.0 * factor;
            for (int k = 0; k < 32; ++k, now_us += 1000.0) {
                e.observe_copy(0, 2.7e6, n(9.0 + 2.7e6 / rate), now_us);
            }
            check_near(e.link_bytes_per_us(0), rate, 0.08, "bandwidth after a step");
            CHECK(e.moved());
            CHECK_OK(e.apply(costs));
            CHECK(!e.moved());
            check_near(costs.t_copy(0, 2.7e6), 9.0 + 2.7e6 / rate, 0.05, "copy time after a step");
            CHECK(e.next_drift(r));
            CHECK(r.kind == cost_kind::copy && r.device == 0 && std::string(r.parameter) == "bandwidth");
            check_near(r.old_value, 24800.0, 0.05, "reported old bandwidth");
            check_near(r.new_value, rate, 0.08, "reported new bandwidth");
            CHECK(std::fabs(r.since_us - since) <= 5000.0);
            CHECK(!e.next_drift(r));
        }
    }
}

void test_outliers_are_bounded() {
    cost_estimator e = make_estimator(base_costs(9.0, 24800.0));
    noise n;
    for (int k = 0; k < 200; ++k) {
        e.observe_copy(0, 2.7e6, n(9.0 + 2.7e6 / 24800.0), k);
    }
    const double before = e.link_bytes_per_us(0);
    for (int k = 0; k < 5; ++k) { // the machine slept
        e.observe_copy(0, 2.7e6, 1e9, 200.0 + k);
    }
    check_near(e.link_bytes_per_us(0), before, 0.05, "bandwidth after five absurd samples");
    drift_report r;
    CHECK(!e.next_drift(r));
}

void test_slow_drift_is_reported() {
    cost_estimator e = make_estimator(base_costs(0.0, 24800.0));
    noise n;
    for (int k = 0; k < 1500; ++k) {
        const double rate = 24800.0 * (1.0 - 0.4 * std::min(1.0, k / 1000.0));
        e.observe_copy(0, 2.7e6, n(2.7e6 / rate), k * 1000.0);
    }
    drift_report r;
    CHECK(e.next_drift(r));
    CHECK(r.new_value < r.old_value && r.since_us > 100e3 && r.since_us < 900e3);
    check_near(2.7e6 / e.link_bytes_per_us(0) + e.link_latency_us(0), 2.7e6 / 14880.0, 0.05, "copy time after drift");
}

// Prefill batches tell the parts apart; decode batches alone leave the cost of further tokens as it was.
void test_cpu_parts() {
    for (const bool prefill : {true, false}) {
        const cost_model base = base_costs(9.0, 24800.0);
        cost_estimator e      = make_estimator(base);
        noise n;
        n.sigma = 0.03;
        std::uniform_int_distribution<int> some(1, 8), tokens(1, 40);
        int32_t loads[8];
        for (int k = 0; k < 800; ++k) {
            const int n_experts = some(n.random);
            double us           = 5.0 + 40.0; // step, first: 25 by the calibration
            for (int i = 0; i < n_experts; ++i) {
                loads[i] = prefill ? tokens(n.random) : 1;
                us += 120.0 + 6.0 * (loads[i] - 1); // 69 and 9
            }
            e.observe_cpu(k % 4, loads, n_experts, n(us), 0.0, k);
        }
        cost_model costs = base;
        CHECK_OK(e.apply(costs));
        check_near(costs.t_cpu(0, 1, false), 120.0, 0.05, "CPU time of one token");
        check_near(costs.t_cpu(0, 1, true) - costs.t_cpu(0, 1, false), 40.0, prefill ? 0.2 : 0.1, "first expert");
        const double further = costs.t_cpu(0, 31, false) - costs.t_cpu(0, 1, false);
        check_near(further / 30.0, prefill ? 6.0 : 9.0, 0.05, "CPU time of a further token");
    }
}

void test_gpu_and_ceiling() {
    const cost_model base = base_costs(9.0, 24800.0);
    cost_estimator e      = make_estimator(base);
    noise n;
    n.sigma             = 0.03;
    const int32_t one[] = {1, 1, 1, 1, 1, 1, 1, 1};
    std::uniform_int_distribution<int> some(1, 8);
    for (int k = 0; k < 500; ++k) {
        const int g = some(n.random);
        e.observe_gpu(0, 0, one, g, n(45.0 + 33.0 * g), k);
        // The CPU alone is as calibrated; beside copies it meets a ceiling of 30 instead of 40 GB/s.
        const int c = some(n.random);
        e.observe_cpu(0, one, c, n(30.0 + 69.0 * c), 0.0, k);
        e.observe_cpu(0, one, 8, n((8 * 2.7e6 + 8.1e6) / 30e3), 8.1e6, k);
    }
    cost_model costs = base;
    CHECK_OK(e.apply(costs));
    check_near(costs.t_gpu(0, 0, 1), 33.0, 0.05, "GPU time");
    check_near(costs.step_us(0), 45.0, 0.1, "GPU step");
    check_near(costs.dram_bytes_per_us(), 30e3, 0.05, "ceiling");
    check_near(costs.t_cpu(0, 1, false), 69.0, 0.05, "CPU time beside a ceiling");
    CHECK_OK(costs.check());
}

void test_bad_samples() {
    cost_estimator e     = make_estimator(base_costs(9.0, 24800.0));
    const int32_t zero[] = {0};
    const double nan     = std::nan("");
    for (const double us : {nan, 0.0, -5.0, HUGE_VAL}) {
        e.observe_copy(0, 1e6, us, 0.0);
    }
    e.observe_copy(0, 1e6, 50.0, nan);
    e.observe_copy(1, 1e6, 50.0, 0.0);
    e.observe_copy(0, -1.0, 50.0, 0.0);
    e.observe_cpu(0, zero, 1, 50.0, 0.0, 0.0);
    e.observe_cpu(99, zero, 1, 50.0, 0.0, 0.0);
    e.observe_gpu(0, 7, zero, 1, 50.0, 0.0);
    CHECK_EQ(e.n_rejected(), 10);
    CHECK(!e.moved());
    CHECK_EQ(e.link_bytes_per_us(0), 24800.0);

    cost_model incomplete;
    CHECK_OK(cost_model::create(2, 1, 1, incomplete));
    cost_estimator other;
    CHECK(cost_estimator::create(incomplete, {}, other).code() == error_code::missing_cost);
    estimator_options wrong;
    wrong.memory = 1.0;
    CHECK(cost_estimator::create(base_costs(1, 1), wrong, other).code() == error_code::invalid_argument);
    cost_model small = layers::make_costs({}, 2);
    CHECK(e.apply(small).code() == error_code::invalid_argument);
}

void test_scaled_curves() {
    cost_curve affine, pure, points, out;
    CHECK_OK(cost_curve::affine(60, 9, affine));
    CHECK_OK(cost_curve::affine(0, 9, pure));
    const double at[] = {1, 4, 64}, us[] = {100, 130, 500};
    CHECK_OK(cost_curve::piecewise(at, us, 3, points));
    for (const cost_curve & c : {affine, pure, points}) {
        out = c.scaled(0.5, 3.0);
        for (const double n : {1.0, 2.0, 4.0, 30.0, 64.0, 100.0}) {
            check_near(out.at(n), 0.5 * c.at(1) + 3.0 * (c.at(n) - c.at(1)), 1e-9, "scaled curve");
        }
    }
}

} // namespace

int main() {
    test_batch_fit();
    test_copies_converge();
    test_step_settles();
    test_outliers_are_bounded();
    test_slow_drift_is_reported();
    test_cpu_parts();
    test_gpu_and_ceiling();
    test_bad_samples();
    test_scaled_curves();
    return check::report("calibration");
}
