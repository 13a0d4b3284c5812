// When what is not used is tried, at what price, and how a trial becomes part of a plan.
#include "traffic.h"

#include <limits>
#include <map>
#include <random>

using namespace hybrimoe;

namespace {

constexpr resource cpu{resource_kind::cpu, cpu_device}, gpu{resource_kind::gpu, 0}, link{resource_kind::link, 0};
constexpr double pass_us   = 10000.0;
constexpr double unlimited = std::numeric_limits<double>::infinity();

bool same(const resource & a, const resource & b) {
    return a.kind == b.kind && a.device == b.device;
}

layers::costs machine() {
    layers::costs c;
    c.cpu_per_token = 100, c.cpu_first = 20, c.gpu_fixed = 30, c.gpu_step = 10, c.copy = 100;
    return c;
}

// Estimator and trials, pass by pass. What is not listed in `used` gets no samples.
struct loop {
    explicit loop(const trial_options & options = {}) : tries(1, options) {
        CHECK_OK(cost_estimator::create(layers::make_costs(machine()), {}, estimator));
        costs = estimator.calibrated();
    }

    void sample(const resource & what) {
        const int32_t one[] = {1};
        const double now_us = pass_us * static_cast<double>(estimator.pass());
        if (what.kind == resource_kind::cpu) {
            estimator.observe_cpu(0, one, 1, 120.0 * slow[what.kind], now_us);
        } else if (what.kind == resource_kind::gpu) {
            estimator.observe_gpu(0, 0, one, 1, 40.0 * slow[what.kind], now_us);
        } else {
            estimator.observe_copy(0, 1e6, 100.0 * slow[what.kind], now_us);
        }
        if (estimator.moved()) {
            CHECK_OK(estimator.apply(costs));
        }
    }

    void begin_pass(std::initializer_list<resource> used = {}) {
        estimator.next_pass();
        tries.next_pass(estimator, pass_us);
        for (const resource & what : used) {
            sample(what);
        }
    }

    int64_t pass() const { return estimator.pass(); }

    cost_estimator estimator;
    cost_model costs;
    trials tries;
    std::map<resource_kind, double> slow{
        {resource_kind::cpu, 1.0}, {resource_kind::gpu, 1.0}, {resource_kind::link, 1.0}};
};

// ---- credit ----

void check_near(double value, double expected) {
    if (!(std::fabs(value - expected) <= 1e-6 * std::fabs(expected) + 1e-9)) {
        CHECK_EQ(value, expected);
    }
}

void test_credit_accrues_with_the_share() {
    loop l;
    for (int i = 1; i <= 200; ++i) {
        l.begin_pass({cpu, gpu, link});
        check_near(l.tries.credit_us(), 0.008 * pass_us * std::min(i, 64)); // what is saved is bounded
    }
    l.tries.on_tried(gpu, 3000.0, l.estimator);
    check_near(l.tries.credit_us(), 0.008 * pass_us * 64 - 3000.0);
    check_near(l.tries.spent_us(), 3000.0);
    CHECK_EQ(l.tries.n_trials(), 1);
    // What was dearer than planned is paid back first.
    l.tries.on_tried(gpu, 10000.0, l.estimator);
    const double debt = l.tries.credit_us();
    CHECK(debt < 0.0);
    l.begin_pass({cpu, gpu, link});
    check_near(l.tries.credit_us(), debt + 0.008 * pass_us);
}

void test_credit_after_a_jump() {
    loop l;
    for (int i = 0; i < 10; ++i) {
        l.begin_pass({cpu, gpu, link});
    }
    l.slow[resource_kind::gpu] = 10.0;
    for (int i = 0; i < 3; ++i) {
        l.sample(gpu);
    }
    const int64_t jump = l.estimator.state(gpu).changed_pass;
    CHECK_EQ(jump, l.pass());
    for (int i = 0; i < 200; ++i) {
        const double before = l.tries.credit_us();
        l.begin_pass({cpu, link});
        const double age   = static_cast<double>(l.pass() - jump);
        const double share = 0.008 + (0.04 - 0.008) * std::max(0.0, 1.0 - age / 128.0);
        check_near(l.tries.credit_us() - before, share * pass_us);
        l.tries.on_tried(cpu, l.tries.credit_us(), l.estimator); // so that no bound is met
    }
}

// ---- when ----

// Passes in which `what` was tried; each trial costs `price_us`, and gives a sample where `is_seen`.
std::vector<int64_t> tried_in(loop & l, const resource & what, int n_passes, bool is_seen,
                              std::initializer_list<resource> used, double price_us = 0.0) {
    std::vector<int64_t> out;
    for (int i = 0; i < n_passes; ++i) {
        l.begin_pass(used);
        for (int layer = 0; layer < 4; ++layer) {
            const trial_request wanted = l.tries.next(l.estimator);
            if (!wanted.wanted) {
                continue;
            }
            CHECK(same(wanted.what, what));
            out.push_back(l.pass());
            if (is_seen) {
                l.sample(what);
            }
            l.tries.on_tried(what, price_us, l.estimator);
        }
    }
    return out;
}

void test_as_calibrated_ever_more_rarely() {
    for (const resource & what : {cpu, gpu, link}) {
        for (const bool is_seen : {false, true}) {
            loop l;
            std::vector<resource> others;
            for (const resource & other : {cpu, gpu, link}) {
                if (!same(other, what)) {
                    others.push_back(other);
                }
            }
            const std::vector<int64_t> at  = tried_in(l, what, 400, is_seen, {others[0], others[1]});
            const std::vector<int64_t> due = {4, 12, 28, 60, 124, 188, 252, 316, 380};
            CHECK(at == due);
        }
    }
}

void test_used_is_not_tried() {
    loop l;
    for (int i = 0; i < 500; ++i) {
        l.begin_pass({cpu, gpu, link});
        CHECK(!l.tries.next(l.estimator).wanted);
    }
    // What was used in this pass already is not tried any more, though it was due when the pass began.
    for (int i = 0; i < 10; ++i) {
        l.begin_pass({cpu, link});
    }
    l.sample(gpu);
    CHECK(!l.tries.next(l.estimator).wanted);
}

void test_suspect_is_tried_by_its_age() {
    loop l;
    for (int i = 0; i < 20; ++i) {
        l.begin_pass({cpu, gpu, link});
    }
    l.slow[resource_kind::gpu] = 10.0;
    for (int i = 0; i < 3; ++i) {
        l.begin_pass({cpu, gpu, link});
    }
    CHECK(l.estimator.state(gpu).slowdown > 5.0);
    int64_t last = l.pass();
    int n_trials = 0, n_longest = 0;
    for (int i = 0; i < 1500; ++i) {
        l.begin_pass({cpu, link});
        const int64_t age          = l.pass() - l.estimator.state(gpu).changed_pass;
        const int64_t pause        = std::min<int64_t>(std::max<int64_t>(age / 16, 1), 32);
        const trial_request wanted = l.tries.next(l.estimator);
        CHECK_EQ(wanted.wanted, l.pass() - last >= pause);
        if (wanted.wanted) {
            CHECK(same(wanted.what, gpu) && wanted.must_be_useful);
            n_longest += l.pass() - last == 32 ? 1 : 0;
            last = l.pass();
            ++n_trials;
            l.sample(gpu); // as slow as believed: no surprise
            l.tries.on_tried(gpu, 0.0, l.estimator);
        }
    }
    CHECK(n_trials > 50 && n_longest > 20);
}

// The burst is over when it is looked at for the first time: that look costs what it costs.
void test_first_look_is_free() {
    loop l;
    l.begin_pass({cpu, gpu, link});
    l.slow[resource_kind::gpu] = 10.0;
    for (int i = 0; i < 3; ++i) {
        l.begin_pass({cpu, gpu, link});
    }
    for (int i = 0; i < 2; ++i) {
        l.begin_pass({cpu, link});
        const trial_request wanted = l.tries.next(l.estimator);
        CHECK(wanted.wanted && same(wanted.what, gpu));
        CHECK_EQ(wanted.budget_us, i == 0 ? unlimited : l.tries.credit_us());
        l.sample(gpu);
        l.tries.on_tried(gpu, 100.0, l.estimator);
    }
}

void test_surprise_brings_follow_ups() {
    for (const bool is_over : {true, false}) {
        loop l;
        for (int i = 0; i < 20; ++i) {
            l.begin_pass({cpu, gpu, link});
        }
        l.slow[resource_kind::gpu] = 10.0;
        for (int i = 0; i < 60; ++i) {
            l.begin_pass({cpu, gpu, link}); // lasting by now
        }
        CHECK_EQ(l.estimator.state(gpu).disturbed, 1.0);
        CHECK(l.estimator.state(gpu).slowdown > 9.0);
        l.slow[resource_kind::gpu] = is_over ? 1.0 : 10.0;
        int n_trials               = 0;
        for (int i = 0; i < 20 && n_trials == 0; ++i) {
            l.begin_pass({cpu, link});
            for (trial_request wanted; (wanted = l.tries.next(l.estimator)).wanted;) {
                CHECK(same(wanted.what, gpu));
                CHECK_EQ(wanted.budget_us, n_trials == 0 ? l.tries.credit_us() : unlimited); // a loss is unlikely
                ++n_trials;
                l.sample(gpu);
                l.tries.on_tried(gpu, 10.0, l.estimator);
            }
        }
        // Until it is believed: within the pass of the first one. Without a surprise there is but the one.
        CHECK_EQ(n_trials, is_over ? disturbance::window + 1 : 1);
        CHECK(std::fabs(l.estimator.state(gpu).slowdown / l.slow[resource_kind::gpu] - 1.0) < 0.1);
    }
}

void test_nothing_is_tried_when_off() {
    trial_options off;
    off.on = false;
    loop l(off);
    l.slow[resource_kind::gpu] = 10.0;
    for (int i = 0; i < 1000; ++i) {
        l.begin_pass();
        if (i < 5) {
            l.sample(gpu);
        }
        CHECK(!l.tries.next(l.estimator).wanted);
    }
    CHECK_EQ(l.tries.n_trials(), 0);
}

void test_devices_take_turns() {
    layers::costs c = machine();
    c.n_devices     = 3;
    cost_estimator e;
    CHECK_OK(cost_estimator::create(layers::make_costs(c), {}, e));
    trials tries(3, {});
    std::map<std::pair<int, int>, int> n_trials;
    for (int pass = 0; pass < 70; ++pass) {
        e.next_pass();
        tries.next_pass(e, pass_us);
        for (int layer = 0; layer < 2; ++layer) { // fewer layers than resources
            const trial_request wanted = tries.next(e);
            if (wanted.wanted) {
                ++n_trials[{static_cast<int>(wanted.what.kind), wanted.what.device}];
                tries.on_tried(wanted.what, 0.0, e);
            }
        }
    }
    CHECK_EQ(n_trials.size(), 7U); // the CPU, and each device and its link
    for (const auto & one : n_trials) {
        CHECK_EQ(one.second, 4);
    }
}

// ---- price ----

// A GPU that stays slow for good, a CPU and a link that are not used: at most 1 % of the time, also where trials take
// longer than planned.
void test_price_of_a_steady_state() {
    for (const double planned_us : {20.0, 100.0, 1000.0, 5000.0, 50000.0}) {
        for (const double dearer : {1.0, 2.5}) {
            loop l;
            l.begin_pass({cpu, gpu, link});
            l.slow[resource_kind::gpu] = 10.0;
            for (int i = 0; i < 3; ++i) {
                l.begin_pass({cpu, gpu, link});
            }
            double paid_us = 0.0;
            int n_trials   = 0;
            for (int i = 0; i < 20000; ++i) {
                l.begin_pass();
                for (int layer = 0; layer < 8; ++layer) {
                    const trial_request wanted = l.tries.next(l.estimator);
                    if (!wanted.wanted) {
                        continue;
                    }
                    if (planned_us > wanted.budget_us) {
                        l.tries.on_refused(wanted.what, planned_us);
                        continue;
                    }
                    l.sample(wanted.what);
                    l.tries.on_tried(wanted.what, dearer * planned_us, l.estimator);
                    if (i >= 300) { // the first looks after a jump are paid by more than the share
                        paid_us += dearer * planned_us;
                        ++n_trials;
                    }
                }
            }
            CHECK(paid_us <= 0.01 * 19700 * pass_us);
            CHECK(n_trials > 10); // rarely, where it is dear, but again and again
        }
    }
}

// What costs more than the usual credit is saved for; when it is over, what was left of that is gone too.
void test_dear_trial_is_saved_for() {
    const double dear_us  = 10.0 * pass_us; // 20 times the usual credit
    const double usual_us = 64 * 0.008 * pass_us;
    loop l;
    for (int i = 0; i < 20; ++i) {
        l.begin_pass({cpu, gpu, link});
    }
    l.slow[resource_kind::gpu] = 1000.0;
    for (int i = 0; i < 60; ++i) {
        l.begin_pass({cpu, gpu, link});
    }
    CHECK(l.estimator.state(gpu).slowdown > 500.0);
    l.slow[resource_kind::gpu] = 1.0;
    l.tries.on_tried(link, l.tries.credit_us(), l.estimator); // nothing is saved yet
    int n_passes = 0;
    for (bool is_tried = false; !is_tried && n_passes < 5000; ++n_passes) {
        l.begin_pass({cpu, link});
        const trial_request wanted = l.tries.next(l.estimator);
        if (!wanted.wanted) {
            continue;
        }
        CHECK(same(wanted.what, gpu));
        if (dear_us > wanted.budget_us) {
            l.tries.on_refused(gpu, dear_us);
            continue;
        }
        is_tried = true;
        l.sample(gpu);
        l.tries.on_tried(gpu, 10.0, l.estimator);
    }
    CHECK(n_passes > 500 && n_passes < 1300); // 1250 at 0.8 %, fewer after the change
    l.begin_pass({cpu, link});
    CHECK(l.tries.credit_us() <= usual_us * 1.001);

    // Used again by a plan: nothing is saved for any more.
    l.slow[resource_kind::gpu] = 1000.0;
    l.tries.on_refused(gpu, dear_us);
    for (int i = 0; i < 1000; ++i) {
        l.begin_pass({cpu, gpu, link});
    }
    check_near(l.tries.credit_us(), usual_us);
}

// ---- in a plan ----

std::unique_ptr<runtime> make_runtime(const layers::costs & c, int n_slots, bool preload = true,
                                      const char * schedule = "two-threshold") {
    traffic::options o;
    o.n_layers = 2, o.n_expert = 8, o.top_k = 3;
    o.n_slots  = n_slots;
    o.preload  = preload;
    o.schedule = schedule;
    return traffic::make_runtime(o, layers::make_costs(c, o.n_layers));
}

layer_event event_of(const std::vector<int32_t> & ids, int n_rows = 1) {
    layer_event e;
    e.n_rows = n_rows;
    e.top_k  = 3;
    e.ids    = ids.data();
    return e;
}

layer_event trying(layer_event e, const resource & what, double budget_us = unlimited) {
    e.trial.wanted    = true;
    e.trial.what      = what;
    e.trial.budget_us = budget_us;
    return e;
}

std::vector<int> experts_on(const decision & d, int device) {
    std::vector<int> out;
    for (const placement & at : d.plan.placements) {
        if (at.device == device) {
            out.push_back(at.expert);
        }
    }
    return out;
}

// Experts 0..3 are resident on an accelerator that is believed slow.
void test_resident_expert_to_an_unused_accelerator() {
    layers::costs c                   = machine();
    c.gpu_fixed                       = 900;
    const std::vector<int32_t> ids    = {0, 1, 5, 1, 5, 2}; // two rows; 1 and 5 have two tokens
    const std::unique_ptr<runtime> rt = make_runtime(c, 4);
    const decision * d                = nullptr;
    CHECK_OK(rt->on_layer(event_of(ids, 2), 0.0, d));
    CHECK(experts_on(*d, 0).empty() && !d->is_tried);
    const double untried_us = d->plan.makespan_us;
    check_near(untried_us, 20 + 600); // six tokens on the CPU
    check_near(d->untried_us, untried_us);

    CHECK_OK(rt->on_layer(trying(event_of(ids, 2), gpu), 1.0, d));
    CHECK(d->is_tried);
    CHECK(experts_on(*d, 0) == std::vector<int>{0}); // the first of the resident ones with one token
    check_near(d->untried_us, untried_us);
    check_near(d->plan.makespan_us, 910);
    CHECK_EQ(d->plan.n_cpu, 3);
    CHECK_EQ(d->plan.n_gpu, 1);
    CHECK_EQ(d->slots[0], rt->cache().lookup(0, 0).slot);
    CHECK(d->transfers.empty());
    CHECK_EQ(rt->stats().n_tried, 1);

    // The budget is about what the layer becomes longer by.
    CHECK_OK(rt->on_layer(trying(event_of(ids, 2), gpu, 289.0), 2.0, d));
    CHECK(!d->is_tried && experts_on(*d, 0).empty());
    check_near(d->plan.makespan_us, untried_us);
    check_near(d->refused_us, 290.0);
    CHECK_OK(rt->on_layer(trying(event_of(ids, 2), gpu, 291.0), 3.0, d));
    CHECK(d->is_tried && d->refused_us == 0.0);

    // Nothing resident, nothing to try: an expert is not copied for that.
    const std::vector<int32_t> missed = {5, 6, 7};
    CHECK_OK(rt->on_layer(trying(event_of(missed), gpu), 4.0, d));
    CHECK(!d->is_tried && experts_on(*d, 0).empty() && d->plan.n_copies == 0);
    CHECK_EQ(rt->stats().n_tried, 2);
}

void test_must_be_useful() {
    layers::costs c        = machine();
    c.gpu_fixed            = 900;
    const cost_model quick = layers::make_costs(machine(), 2), slow = layers::make_costs(c, 2);
    const std::vector<int32_t> ids    = {0, 1, 5};
    const std::unique_ptr<runtime> rt = make_runtime(c, 4);
    double now_us                     = 0.0;
    for (const cost_model * calibrated : {&quick, &slow}) {
        layer_event e          = trying(event_of(ids), gpu);
        e.calibrated           = calibrated;
        const decision * d     = nullptr;
        e.trial.must_be_useful = true;
        CHECK_OK(rt->on_layer(e, now_us += 1.0, d));
        CHECK_EQ(d->is_tried, calibrated == &quick);
        CHECK_EQ(experts_on(*d, 0).size(), calibrated == &quick ? 1U : 0U);
        e.trial.must_be_useful = false;
        CHECK_OK(rt->on_layer(e, now_us += 1.0, d));
        CHECK(d->is_tried);
    }
}

// All experts are resident, and the CPU is believed slow.
void test_lightest_expert_to_the_cpu() {
    layers::costs c                   = machine();
    c.cpu_per_token                   = 1000;
    const std::vector<int32_t> ids    = {0, 1, 2, 0, 1, 3}; // 2 and 3 have one token
    const std::unique_ptr<runtime> rt = make_runtime(c, 8);
    const decision * d                = nullptr;
    CHECK_OK(rt->on_layer(event_of(ids, 2), 0.0, d));
    CHECK(experts_on(*d, cpu_device).empty());
    const double untried_us = d->plan.makespan_us;
    check_near(untried_us, 10 + 4 * 30);
    CHECK_OK(rt->on_layer(trying(event_of(ids, 2), cpu), 1.0, d));
    CHECK(d->is_tried && experts_on(*d, cpu_device) == std::vector<int>{2});
    check_near(d->plan.makespan_us, 1020);
    check_near(d->untried_us, untried_us);
    CHECK_EQ(rt->cache().lookup(0, 2).device, 0); // and stays where it is
    CHECK_OK(rt->on_layer(trying(event_of(ids, 2), cpu, 889.0), 2.0, d));
    CHECK(!d->is_tried);
    CHECK_OK(rt->on_layer(trying(event_of(ids, 2), cpu, 891.0), 3.0, d));
    CHECK(d->is_tried);
}

void test_one_idle_copy() {
    layers::costs c                   = machine();
    c.copy                            = 1e6; // nobody would copy at that price
    const std::vector<int32_t> ids    = {0, 5, 6};
    const std::unique_ptr<runtime> rt = make_runtime(c, 4);
    const decision * d                = nullptr;
    CHECK_OK(rt->on_layer(event_of(ids), 0.0, d));
    CHECK(d->transfers.empty() && !d->is_tried);
    const double untried_us = d->plan.makespan_us;
    CHECK_OK(rt->on_layer(trying(event_of(ids), link, 0.0), 1.0, d)); // idle copies do not lengthen the layer
    CHECK(d->is_tried);
    CHECK_EQ(d->transfers.size(), 1U);
    CHECK(d->transfers[0].kind == transfer_kind::admit && d->transfers[0].device == 0);
    CHECK_EQ(d->transfers[0].expert, 5);
    check_near(d->plan.makespan_us, untried_us);
    check_near(d->untried_us, untried_us);
    CHECK(experts_on(*d, cpu_device) == (std::vector<int>{5, 6})); // who computes what is as before

    // The end of the one that is under way will tell.
    CHECK_OK(rt->on_layer(trying(event_of(ids), link), 2.0, d));
    CHECK(!d->is_tried && d->transfers.empty());
    CHECK_OK(rt->on_complete(rt->in_flight()[0].id, 3.0));
    CHECK_OK(rt->on_layer(trying(event_of(ids), link), 4.0, d));
    CHECK(d->is_tried);
    CHECK_EQ(d->transfers.size(), 1U);
    CHECK_EQ(d->transfers[0].expert, 6);
    CHECK_OK(rt->on_complete(rt->in_flight()[0].id, 5.0));
    CHECK_OK(rt->on_layer(trying(event_of(ids), link), 6.0, d)); // all of the layer's are there
    CHECK(!d->is_tried && d->transfers.empty());

    const std::unique_ptr<runtime> none = make_runtime(c, 0);
    CHECK_OK(none->on_layer(trying(event_of(ids), link), 0.0, d));
    CHECK(!d->is_tried && d->transfers.empty());
}

// A layer that uses the resource anyway is planned as without a trial.
void test_used_anyway() {
    for (const resource & what : {cpu, gpu}) {
        const std::vector<int32_t> ids   = {0, 1, 5};
        const std::unique_ptr<runtime> a = make_runtime(machine(), 4, true, "cpu-only");
        const std::unique_ptr<runtime> b = make_runtime(machine(), 4, true, "cpu-only");
        const decision *with = nullptr, *without = nullptr;
        CHECK_OK(a->on_layer(trying(event_of(ids), what), 0.0, with));
        CHECK_OK(b->on_layer(event_of(ids), 0.0, without));
        CHECK(!with->is_tried);
        CHECK_EQ(with->plan.n_gpu, 2);
        CHECK_EQ(with->plan.makespan_us, without->plan.makespan_us);
        CHECK_EQ(a->stats().decision_hash, b->stats().decision_hash);
        CHECK_EQ(a->stats().n_tried, 0);
    }
}

// Each of several accelerators is tried with what it holds itself.
void test_second_accelerator() {
    layers::costs c                   = machine();
    c.gpu_fixed                       = 900;
    c.n_devices                       = 2;
    const std::unique_ptr<runtime> rt = make_runtime(c, 4, false);
    load_result loaded;
    CHECK_OK(rt->cache().begin_load(0, 5, 1, false, loaded));
    CHECK_OK(rt->cache().complete_load(0, 5));
    CHECK_OK(rt->cache().begin_load(0, 0, 0, false, loaded));
    CHECK_OK(rt->cache().complete_load(0, 0));
    runtime_limits limits;
    limits.admission = false; // both decisions find the same cache
    rt->set_limits(limits);
    const decision * d = nullptr;
    for (const int device : {0, 1}) {
        const std::vector<int32_t> ids = {device == 0 ? 0 : 5, 6, 7};
        for (const int wanted : {0, 1}) {
            CHECK_OK(rt->on_layer(trying(event_of(ids), {resource_kind::gpu, wanted}), 0.0, d));
            CHECK_EQ(d->is_tried, wanted == device);
            CHECK(experts_on(*d, device) == (wanted == device ? std::vector<int>{ids[0]} : std::vector<int>{}));
            CHECK_EQ(d->plan.n_gpu, wanted == device ? 1 : 0);
        }
    }
}

} // namespace

int main() {
    test_credit_accrues_with_the_share();
    test_credit_after_a_jump();
    test_as_calibrated_ever_more_rarely();
    test_used_is_not_tried();
    test_suspect_is_tried_by_its_age();
    test_first_look_is_free();
    test_surprise_brings_follow_ups();
    test_nothing_is_tried_when_off();
    test_devices_take_turns();
    test_price_of_a_steady_state();
    test_dear_trial_is_saved_for();
    test_resident_expert_to_an_unused_accelerator();
    test_must_be_useful();
    test_lightest_expert_to_the_cpu();
    test_one_idle_copy();
    test_used_anyway();
    test_second_accelerator();
    return check::report("trials");
}
