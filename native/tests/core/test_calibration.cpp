// The live cost model against synthetic machines: known parameters, noise, outliers, steps, clocks that jump.
#include "check.h"
#include "core/calibration/cost_estimator.h"
#include "layers.h"

#include <array>
#include <cmath>
#include <random>
#include <string>
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

// Passes of a few milliseconds, as a decoded token takes. A step must last 25 ms and 4 passes.
constexpr double pass_us = 2500.0;

// As the governor does it before each layer.
void take_over(cost_estimator & e, cost_model & costs) {
    if (e.moved()) {
        CHECK_OK(e.apply(costs));
        CHECK(!e.moved());
    }
}

double random_bytes(std::mt19937_64 & random, double least = 14.0, double most = 24.0) { // 16 KiB to 16 MiB
    return std::exp2(std::uniform_real_distribution<double>(least, most)(random));
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
        cost_model costs = e.calibrated();
        for (int k = 0; k < 600; ++k) {
            const double bytes = random_bytes(n.random);
            e.next_pass();
            e.observe_copy(0, bytes, n(9.0 + bytes / 24800.0), k * pass_us);
            take_over(e, costs);
        }
        check_near(e.link_latency_us(0), 9.0, 0.05, "latency");
        check_near(e.link_bytes_per_us(0), 24800.0, 0.05, "bandwidth");
    }
}

// A link that changes its width, with copies of one size or of many: within 32 samples, and reported once.
void test_step_settles() {
    for (const double factor : {0.25, 4.0}) {
        for (uint64_t seed = 1; seed <= 100; ++seed) {
            noise n;
            n.random.seed(seed);
            n.outlier_share        = seed % 2 ? 0.0 : 0.05;
            const bool is_one_size = seed <= 50;
            cost_estimator e       = make_estimator(base_costs(9.0, 24800.0));
            cost_model costs       = e.calibrated();
            double now_us          = 0.0;
            const auto copy        = [&](double rate) {
                const double bytes = is_one_size ? 2.7e6 : random_bytes(n.random, 20.0, 26.0);
                e.next_pass();
                e.observe_copy(0, bytes, n(9.0 + bytes / rate), now_us);
                now_us += pass_us;
                take_over(e, costs);
            };
            for (int k = 0; k < 300; ++k) {
                copy(24800.0);
            }
            drift_report r;
            CHECK(!e.next_drift(r));
            const double since = now_us, rate = 24800.0 * factor;
            for (int k = 0; k < 32; ++k) {
                copy(rate);
            }
            check_near(e.link_bytes_per_us(0), rate, 0.08, "bandwidth after a step");
            CHECK_EQ(e.state({resource_kind::link, 0}).disturbed, 1.0); // it is a lasting cost now
            check_near(costs.t_copy(0, 2.7e6), 9.0 + 2.7e6 / rate, 0.08, "copy time after a step");
            CHECK(e.next_drift(r));
            CHECK(r.kind == cost_kind::copy && r.device == 0 && std::string(r.parameter) == "bandwidth");
            check_near(r.old_value, 24800.0, 0.05, "reported old bandwidth");
            check_near(r.new_value, rate, 0.08, "reported new bandwidth");
            CHECK(std::fabs(r.since_us - since) <= (is_one_size ? 5.0 : 15.0) * pass_us);
            CHECK(!e.next_drift(r));
        }
    }
}

// A step counts once it has lasted, in time and in passes; until then it is a disturbance.
void test_step_needs_time_and_passes() {
    struct {
        int samples_per_pass;
        double sample_us;
        bool is_lasting;
    } const cases[] = {{1, 100.0, false}, {1000, 1000.0, false}, {1, 1000.0, true}, {10, 1000.0, true}};
    for (const auto & c : cases) {
        cost_estimator e = make_estimator(base_costs(9.0, 24800.0));
        cost_model costs = e.calibrated();
        const double us  = 9.0 + 2.7e6 / 24800.0;
        double now_us    = 0.0;
        for (int k = 0; k < 200; ++k, now_us += c.sample_us) {
            if (k % c.samples_per_pass == 0) {
                e.next_pass();
            }
            e.observe_copy(0, 2.7e6, k < 100 ? us : 10.0 * us, now_us);
            take_over(e, costs);
        }
        CHECK_EQ(e.copies(0).n_steps(), c.is_lasting ? 1 : 0);
        check_near(e.copies(0).factor(1), c.is_lasting ? 10.9 : 1.0, 0.15, "lasting factor");
        check_near(e.state({resource_kind::link, 0}).disturbed, c.is_lasting ? 1.0 : 10.0, 0.15, "disturbance");
        check_near(costs.t_copy(0, 2.7e6), 10.0 * us, 0.05, "copy time"); // either way
    }
}

void test_outliers_are_bounded() {
    cost_estimator e = make_estimator(base_costs(9.0, 24800.0));
    cost_model costs = e.calibrated();
    noise n;
    double now_us   = 0.0;
    const auto copy = [&](double us) {
        e.next_pass();
        e.observe_copy(0, 2.7e6, us, now_us += pass_us);
        take_over(e, costs);
    };
    const double us = 9.0 + 2.7e6 / 24800.0;
    for (int k = 0; k < 200; ++k) {
        copy(n(us));
    }
    const double before = e.copies(0).factor(1);
    for (int k = 0; k < 5; ++k) { // the machine slept
        copy(1e9);
    }
    check_near(e.copies(0).factor(1), before, 0.05, "lasting factor after five absurd samples");
    CHECK(e.link_bytes_per_us(0) < 1.0); // but for now nobody plans with this link
    for (int k = 0; k < 3; ++k) {
        copy(n(us));
    }
    check_near(e.link_bytes_per_us(0), 24800.0, 0.08, "bandwidth after it woke up");
    drift_report r;
    CHECK(!e.next_drift(r));
}

// Eight waits of another program's time slice, again and again: never learnt by the lasting costs.
void test_bursts_are_not_learnt() {
    noise n;
    cost_estimator e    = make_estimator(base_costs(9.0, 24800.0));
    cost_model costs    = e.calibrated();
    const int32_t one[] = {1, 1, 1, 1, 1, 1, 1, 1};
    double now_us       = 0.0;
    for (int k = 0; k < 3000; ++k) {
        e.next_pass();
        const bool waits = k % 150 >= 100 && k % 150 < 108;
        const double us  = n(30.0 + 8 * 20.5) + (waits ? 3000.0 : 0.0);
        e.observe_gpu(0, 0, one, 8, us, now_us += us);
        take_over(e, costs);
        if (k % 150 == 107) {
            check_near(e.state({resource_kind::gpu, 0}).slowdown, 3194.0 / 194.0, 0.2, "slowdown while it waits");
        }
        if (k % 150 == 110) {
            check_near(e.state({resource_kind::gpu, 0}).slowdown, 1.0, 0.15, "slowdown three samples later");
        }
        const double x[] = {30.0, 8 * 20.5, 0.0}; // units: the calibrated step, and one expert with one token each
        check_near(e.gpu(0, 0).predict(x), 194.0, 0.08, "lasting cost of the batch");
    }
    CHECK_EQ(e.gpu(0, 0).n_steps(), 0);
    drift_report r;
    CHECK(!e.next_drift(r));
}

// Time goes into labels only: what is not lasting by the clock is followed all the same.
void test_clock_that_jumps() {
    cost_estimator e = make_estimator(base_costs(9.0, 24800.0));
    cost_model costs = e.calibrated();
    const double us  = 9.0 + 2.7e6 / 24800.0;
    for (int k = 0; k < 100; ++k) {
        e.next_pass();
        e.observe_copy(0, 2.7e6, us, k % 2 ? 1e9 : -1e9);
        take_over(e, costs);
    }
    check_near(costs.link(0).bytes_per_us, 24800.0, 0.01, "bandwidth");
    for (int k = 0; k < 100; ++k) { // now backwards
        e.next_pass();
        e.observe_copy(0, 2.7e6, 5.0 * us, -1e6 * k);
        take_over(e, costs);
    }
    check_near(costs.t_copy(0, 2.7e6), 5.0 * us, 0.05, "copy time");
    for (int k = 0; k < 40; ++k) { // and forwards again
        e.next_pass();
        e.observe_copy(0, 2.7e6, us, 1e9 + pass_us * k);
        take_over(e, costs);
    }
    check_near(costs.t_copy(0, 2.7e6), us, 0.05, "copy time");
}

void test_slow_drift_is_reported() {
    cost_estimator e = make_estimator(base_costs(0.0, 24800.0));
    cost_model costs = e.calibrated();
    noise n;
    for (int k = 0; k < 1500; ++k) {
        const double rate = 24800.0 * (1.0 - 0.4 * std::min(1.0, k / 1000.0));
        e.next_pass();
        e.observe_copy(0, 2.7e6, n(2.7e6 / rate), k * pass_us);
        take_over(e, costs);
    }
    drift_report r;
    CHECK(e.next_drift(r));
    CHECK(r.new_value < r.old_value && r.since_us > 100 * pass_us && r.since_us < 900 * pass_us);
    check_near(2.7e6 / e.link_bytes_per_us(0) + e.link_latency_us(0), 2.7e6 / 14880.0, 0.05, "copy time after drift");
}

// Prefill batches tell the parts apart; decode batches alone leave the cost of further tokens as it was.
void test_cpu_parts() {
    for (const bool prefill : {true, false}) {
        const cost_model base = base_costs(9.0, 24800.0);
        cost_estimator e      = make_estimator(base);
        cost_model costs      = base;
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
            e.next_pass();
            e.observe_cpu(k % 4, loads, n_experts, n(us), k * pass_us);
            take_over(e, costs);
        }
        CHECK_OK(e.apply(costs));
        check_near(costs.t_cpu(0, 1, false), 120.0, 0.05, "CPU time of one token");
        check_near(costs.t_cpu(0, 1, true) - costs.t_cpu(0, 1, false), 40.0, prefill ? 0.2 : 0.1, "first expert");
        const double further = costs.t_cpu(0, 31, false) - costs.t_cpu(0, 1, false);
        check_near(further / 30.0, prefill ? 6.0 : 9.0, 0.05, "CPU time of a further token");
    }
}

// The CPU computes further tokens at half its speed, weights arrive as before.
void test_throttled_cpu_is_followed() {
    for (uint64_t seed = 1; seed <= 10; ++seed) {
        noise n;
        n.random.seed(seed);
        n.sigma          = 0.03;
        cost_estimator e = make_estimator(base_costs(9.0, 24800.0));
        cost_model costs = e.calibrated();
        std::uniform_int_distribution<int> some(1, 8), tokens(1, 40);
        int32_t loads[8];
        for (int k = 0; k < 600; ++k) {
            const int n_experts = some(n.random);
            double us           = 30.0;
            for (int i = 0; i < n_experts; ++i) {
                loads[i] = tokens(n.random);
                us += 69.0 + (k >= 300 ? 18.0 : 9.0) * (loads[i] - 1);
            }
            e.next_pass();
            e.observe_cpu(k % 4, loads, n_experts, n(us), k * pass_us);
            take_over(e, costs);
        }
        CHECK_OK(e.apply(costs));
        check_near(costs.t_cpu(0, 1, false), 69.0, 0.1, "CPU time of one token");
        check_near(costs.t_cpu(0, 33, false), 69.0 + 32 * 18.0, 0.05, "CPU time of 33 tokens");
        bool is_reported = false;
        for (drift_report r; e.next_drift(r);) {
            is_reported = is_reported || (r.kind == cost_kind::cpu && std::string(r.parameter) == "tokens");
        }
        CHECK(is_reported);
    }
}

// What a CPU batch of 8 experts and copies that go on all the time get of a ceiling, in proportion to what they ask
// for.
struct shared_batch {
    double us = 0.0;
    memory_share beside;
};

shared_batch beside_copies(double alone_us, double true_ceiling, double believed_ceiling) {
    constexpr double bytes = 8 * 2.7e6, link = 24800.0;
    const double asked = bytes / alone_us + link;
    shared_batch out;
    out.us            = alone_us * std::max(1.0, asked / true_ceiling);
    out.beside.speed  = std::min(1.0, believed_ceiling / asked);
    out.beside.shared = asked > believed_ceiling ? 1.0 : 0.0;
    out.beside.bytes  = link * std::min(1.0, true_ceiling / asked) * out.us;
    return out;
}

void test_gpu_and_ceiling() {
    const cost_model base = base_costs(9.0, 24800.0);
    cost_estimator e      = make_estimator(base);
    cost_model costs      = base;
    noise n;
    n.sigma             = 0.03;
    const int32_t one[] = {1, 1, 1, 1, 1, 1, 1, 1};
    std::uniform_int_distribution<int> some(1, 8);
    for (int k = 0; k < 500; ++k) {
        const double now_us = k * pass_us;
        e.next_pass();
        const int g = some(n.random);
        e.observe_gpu(0, 0, one, g, n(45.0 + 33.0 * g), now_us);
        // The CPU alone is as calibrated; beside copies it meets a ceiling of 30 instead of 40 GB/s.
        const int c = some(n.random);
        e.observe_cpu(0, one, c, n(30.0 + 69.0 * c), now_us);
        const shared_batch both = beside_copies(30.0 + 8 * 69.0, 30e3, costs.dram_bytes_per_us());
        e.observe_cpu(0, one, 8, n(both.us), now_us, both.beside);
        take_over(e, costs);
    }
    CHECK_OK(e.apply(costs));
    check_near(costs.t_gpu(0, 0, 1), 33.0, 0.05, "GPU time");
    check_near(costs.step_us(0), 45.0, 0.1, "GPU step");
    check_near(costs.dram_bytes_per_us(), 30e3, 0.05, "ceiling");
    check_near(costs.t_cpu(0, 1, false), 69.0, 0.05, "CPU time beside a ceiling");
    CHECK_OK(costs.check());
}

// Beside a ceiling that is as believed, neither the CPU's nor the link's cost nor the ceiling moves.
void test_contention_is_no_cost() {
    cost_estimator e = make_estimator(base_costs(9.0, 24800.0));
    cost_model costs = e.calibrated();
    noise n;
    const int32_t one[] = {1, 1, 1, 1, 1, 1, 1, 1};
    for (int k = 0; k < 500; ++k) {
        const double now_us = k * pass_us;
        e.next_pass();
        const shared_batch both = beside_copies(30.0 + 8 * 69.0, 40e3, costs.dram_bytes_per_us());
        e.observe_cpu(0, one, 8, n(both.us), now_us, both.beside);
        memory_share copy = both.beside;
        copy.bytes        = 8 * 2.7e6 / both.us * 100.0;
        e.observe_copy(0, 2.7e6, n(9.0 + 2.7e6 / 24800.0) / copy.speed, now_us, copy);
        take_over(e, costs);
    }
    check_near(e.state({resource_kind::cpu, cpu_device}).slowdown, 1.0, 0.05, "CPU");
    check_near(e.state({resource_kind::link, 0}).slowdown, 1.0, 0.05, "link");
    check_near(e.dram_bytes_per_us(), 40e3, 0.05, "ceiling");
}

// The CPU is believed 10x too slow and is never alone. A batch that is faster than believed is no word on the ceiling.
void test_a_fast_batch_beside_copies_is_the_cpu() {
    cost_estimator e = make_estimator(base_costs(9.0, 24800.0));
    cost_model costs = e.calibrated();
    noise n;
    const int32_t one[] = {1, 1, 1, 1, 1, 1, 1, 1};
    for (int k = 0; k < 300; ++k) {
        e.next_pass();
        const double alone_us = (30.0 + 8 * 69.0) / 10.0;
        memory_share beside   = beside_copies(alone_us, 400e3, costs.dram_bytes_per_us()).beside;
        beside.shared         = 1.0; // two links alone ask for more than is believed to be there
        beside.bytes          = 0.3 * 40e3 * alone_us;
        beside.speed          = 0.9;
        e.observe_cpu(0, one, 8, n(alone_us / beside.speed), k * pass_us, beside);
        take_over(e, costs);
    }
    const double fixed_us = costs.step_us(cpu_device) + costs.of_layer(0).cpu_first_us;
    check_near(fixed_us + 8 * costs.t_cpu(0, 1, false), 58.2, 0.3, "CPU batch");
}

// What was read faster than the ceiling allows shows that it is higher.
void test_ceiling_is_refuted() {
    cost_estimator e    = make_estimator(base_costs(9.0, 24800.0));
    const int32_t one[] = {1, 1, 1, 1, 1, 1, 1, 1};
    memory_share beside;
    beside.bytes = 8 * 2.7e6;
    for (int k = 0; k < 8; ++k) {
        e.next_pass();
        e.observe_cpu(0, one, 8, 432.0, k * pass_us, beside); // 100 GB/s together, 40 were believed
    }
    CHECK(e.moved());
    cost_model costs = e.calibrated();
    CHECK_OK(e.apply(costs));
    CHECK(costs.dram_bytes_per_us() > 80e3 && costs.dram_bytes_per_us() < 120e3);
}

// Whatever comes in, bursts of waits and bounds included: no applied cost is absurd. Costs are those of an expert, a
// copy and whole batches; what a step or a latency is cannot always be told.
class absurdity {
public:
    // Each resource takes between `least` and `most` times as long as calibrated, and that changes.
    absurdity(uint64_t seed, double least, double most) : seed_(seed), least_(least), most_(most), random_(seed) {
        noise_.random.seed(seed);
        noise_.outlier_share = seed % 3 == 0 ? 0.02 : 0.0;
        c_.bytes = 2.7e6, c_.cpu_fixed = 60, c_.cpu_per_token = 9, c_.cpu_first = uniform(0, 50), c_.cpu_step = 5;
        c_.gpu_fixed = uniform(10, 190), c_.gpu_per_token = 0.5, c_.gpu_step = uniform(0, 60);
        c_.copy = 100, c_.dram = 40e3;
        // One count of experts only, as many models have it in decode, or batches that tell the parts apart.
        size_  = any(0, 1) == 0 ? any(1, 8) : 0;
        e_     = make_estimator(layers::make_costs(c_, 1));
        costs_ = e_.calibrated();
    }

    void run() {
        for (int phase = 0; phase < 12 && is_sane_; ++phase) {
            before_ = now_;
            for (double & one : now_) {
                one = any(0, 1) == 0 ? std::exp(uniform(std::log(least_), std::log(most_))) : one;
            }
            for (int pass = any(5, 80); pass > 0 && is_sane_; --pass) {
                e_.next_pass();
                waits_ = any(0, 39) == 0;
                for (int layer = 0; layer < 4; ++layer, now_us_ += uniform(100, 1500)) {
                    sample();
                    take_over(e_, costs_);
                }
                look();
            }
        }
    }

private:
    enum which { of_cpu, of_gpu, of_link };

    double uniform(double lo, double hi) { return std::uniform_real_distribution<double>(lo, hi)(random_); }
    int any(int lo, int hi) { return std::uniform_int_distribution<int>(lo, hi)(random_); }
    double cpu_us(int n_experts, int n_tokens) const {
        return c_.cpu_step + c_.cpu_first + c_.cpu_fixed * n_experts + c_.cpu_per_token * n_tokens;
    }
    double gpu_us(int n_experts, int n_tokens) const {
        return c_.gpu_step + c_.gpu_fixed * n_experts + c_.gpu_per_token * n_tokens;
    }

    void sample() {
        int32_t loads[8];
        const int n  = size_ > 0 ? size_ : any(1, 8);
        int n_tokens = 0;
        for (int i = 0; i < n; ++i) {
            loads[i] = size_ == 0 && any(0, 9) == 0 ? any(1, 30) : 1;
            n_tokens += loads[i];
        }
        const double on_gpu = noise_(gpu_us(n, n_tokens) * now_[of_gpu]) + (waits_ ? 3000.0 : 0.0);
        switch (any(0, 3)) {
        case 0:
            return e_.observe_cpu(0, loads, n, noise_(cpu_us(n, n_tokens) * now_[of_cpu]), now_us_);
        case 1:
            return e_.observe_gpu(0, 0, loads, n, on_gpu, now_us_);
        case 2: // it had ended long before, or just now
            return e_.observe_gpu(0, 0, loads, n, on_gpu * uniform(1, 10), now_us_, true);
        default:
            return e_.observe_copy(0, c_.bytes, noise_(c_.copy * now_[of_link]), now_us_);
        }
    }

    // What is not learnt yet may be what was true before.
    void compare(const char * what, double us, double calibrated, which one) {
        const double low = std::min(now_[one], before_[one]), high = std::max(now_[one], before_[one]);
        if (is_sane_ && !(us >= calibrated * low / 200.0 && us <= calibrated * high * 200.0)) {
            std::ostringstream text;
            text << "seed " << seed_ << ": " << what << " " << us << " us, " << calibrated * now_[one] << " is true, "
                 << calibrated * before_[one] << " was";
            check::fail(__FILE__, __LINE__, text.str());
            is_sane_ = false;
        }
    }

    void look() {
        compare("CPU, an expert", costs_.t_cpu(0, 1, false), c_.cpu_fixed + c_.cpu_per_token, of_cpu);
        compare("CPU, 30 tokens", costs_.t_cpu(0, 30, false), c_.cpu_fixed + 30 * c_.cpu_per_token, of_cpu);
        compare("CPU, a batch", costs_.step_us(cpu_device) + costs_.t_cpu(0, 1, true) + 7 * costs_.t_cpu(0, 1, false),
                cpu_us(8, 8), of_cpu);
        compare("GPU, an expert", costs_.t_gpu(0, 0, 1), c_.gpu_fixed + c_.gpu_per_token, of_gpu);
        compare("GPU, a batch", costs_.step_us(0) + 8 * costs_.t_gpu(0, 0, 1), gpu_us(8, 8), of_gpu);
        compare("a copy", costs_.t_copy(0, c_.bytes), c_.copy, of_link);
    }

    uint64_t seed_;
    double least_, most_;
    std::mt19937_64 random_;
    noise noise_;
    layers::costs c_;
    int size_ = 0;
    cost_estimator e_;
    cost_model costs_;
    std::array<double, 3> now_ = {1.0, 1.0, 1.0}, before_ = now_;
    double now_us_ = 0.0;
    bool waits_ = false, is_sane_ = true;
};

void test_no_cost_becomes_absurd() {
    for (uint64_t seed = 1; seed <= 300; ++seed) {
        absurdity(seed, 1.0, 5.0).run();
    }
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
    e.observe_cpu(0, zero, 1, 50.0, 0.0);
    e.observe_cpu(0, zero, 0, 50.0, 0.0);
    e.observe_cpu(99, zero, 1, 50.0, 0.0);
    e.observe_gpu(0, 7, zero, 1, 50.0, 0.0);
    const int32_t one[] = {1};
    for (const bool at_most : {false, true}) {
        e.observe_gpu(0, 0, one, 1, nan, 0.0, at_most);
        e.observe_gpu(0, 0, one, 1, -1.0, 0.0, at_most);
        e.observe_gpu(0, 0, one, 1, 50.0, nan, at_most);
        e.observe_gpu(0, 0, zero, 1, 50.0, 0.0, at_most);
    }
    CHECK_EQ(e.n_rejected(), 19);
    CHECK(!e.moved());
    for (const resource r :
         {resource{resource_kind::cpu, cpu_device}, {resource_kind::gpu, 0}, {resource_kind::link, 0}}) {
        CHECK_EQ(e.state(r).n_samples, 0);
        CHECK_EQ(e.state(r).last_pass, -1);
        CHECK_EQ(e.state(r).confidence(0.0), 0.0);
    }
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
    test_step_needs_time_and_passes();
    test_outliers_are_bounded();
    test_bursts_are_not_learnt();
    test_clock_that_jumps();
    test_slow_drift_is_reported();
    test_cpu_parts();
    test_throttled_cpu_is_followed();
    test_gpu_and_ceiling();
    test_a_fast_batch_beside_copies_is_the_cpu();
    test_contention_is_no_cost();
    test_ceiling_is_refuted();
    test_no_cost_becomes_absurd();
    test_bad_samples();
    test_scaled_curves();
    return check::report("calibration");
}
