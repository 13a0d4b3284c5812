// What plain llama.cpp would take, what timings teach, and what the guard's level does to the runtime.
#include "traffic.h"

#include "core/allocation/whole_layers.h"
#include "core/governor.h"

#include <algorithm>

using namespace hybrimoe;

namespace {

constexpr resource cpu{resource_kind::cpu, cpu_device}, gpu{resource_kind::gpu, 0}, link{resource_kind::link, 0};
constexpr int n_layers = 4, n_expert = 8, top_k = 2;

void check_near(double value, double truth, double share, int line) {
    if (!(std::fabs(value - truth) <= share * std::fabs(truth))) {
        std::ostringstream text;
        text << value << " is not within " << share * 100 << " % of " << truth;
        check::fail(__FILE__, line, text.str());
    }
}
#define CHECK_NEAR(value, truth, share) check_near(value, truth, share, __LINE__)

layers::costs machine() {
    layers::costs c;
    c.cpu_per_token = 100, c.cpu_first = 20, c.cpu_step = 7, c.gpu_fixed = 30, c.gpu_step = 10, c.copy = 100;
    return c;
}

struct engine {
    engine(const cost_model & costs, int n_slots, const governor_options & options = {},
           const char * schedule = "cpu-only", const char * prefetch = "none") {
        traffic::options o;
        o.n_layers = n_layers, o.n_expert = n_expert, o.top_k = top_k;
        o.n_slots  = n_slots;
        o.schedule = schedule;
        o.prefetch = prefetch;
        o.preload  = true;
        rt         = traffic::make_runtime(o, costs);
        CHECK_OK(governor::create(costs, options, *rt, gov));
    }

    // Plans one layer; the caller says how it went, by end().
    const decision & begin(int layer, const std::vector<int32_t> & ids, int n_rows = 1) {
        event        = layer_event();
        event.layer  = layer;
        event.n_rows = n_rows;
        event.top_k  = top_k;
        event.ids    = ids.data();
        gov.begin_layer(event);
        CHECK_OK(rt->on_layer(event, now_us, made));
        return *made;
    }

    layer_timing took(double span_us, double overhead_us = 0.0) {
        layer_timing t;
        t.span_us = span_us, t.overhead_us = overhead_us, t.cpu_begin_us = now_us;
        now_us += span_us;
        t.now_us = now_us;
        return t;
    }

    void end(const layer_timing & timing) {
        gov.end_layer(event, *made, timing);
        rt->on_layer_done();
    }

    // A pass whose layers all have the same experts; true when the guard's level changed.
    bool pass(const std::vector<int32_t> & ids, double layer_us, double overhead_us = 0.0, bool is_decode = true,
              int n_rows = 1) {
        gov.begin_pass();
        for (int layer = 0; layer < n_layers; ++layer) {
            begin(layer, ids, n_rows);
            end(took(layer_us, overhead_us));
        }
        return gov.end_pass(is_decode, change);
    }

    std::unique_ptr<runtime> rt;
    governor gov;
    layer_event event;
    const decision * made = nullptr;
    guard_change change;
    double now_us = 0.0;
};

// ---- the floor ----

double floor_of(const layers::costs & c, int n_slots, const std::vector<int32_t> & ids, int n_rows = 1) {
    engine e(layers::make_costs(c, n_layers), n_slots);
    e.pass(ids, 1.0, 0.0, true, n_rows);
    return e.gov.floor_us();
}

void test_floor_by_hand() {
    const double on_cpu = 7 + 20 + 2 * 100, on_gpu = 10 + 2 * 30;
    const std::vector<int32_t> ids = {0, 5};
    layers::costs c                = machine();
    // Four layers of n slots hold that many whole layers of eight experts, the first ones.
    for (const int n_slots : {0, 1, 2, 3, 4, 6, 8}) {
        const int n_whole = 4 * n_slots / 8;
        CHECK_NEAR(floor_of(c, n_slots, ids), n_whole * on_gpu + (4 - n_whole) * on_cpu, 1e-9);
    }
    // Loads count: 0 has two tokens, 1 and 2 one each.
    c.gpu_per_token = 5;
    CHECK_NEAR(floor_of(c, 4, {0, 1, 0, 2}, 2), 2 * (10 + 3 * 30 + 4 * 5) + 2 * (7 + 20 + 4 * 100), 1e-9);
    // Nobody places layers on a slow accelerator.
    c.gpu_fixed = 300;
    CHECK_NEAR(floor_of(c, 8, ids), 4 * on_cpu, 1e-9);

    c.n_devices = 0;
    CHECK_NEAR(floor_of(c, 0, ids), 4 * on_cpu, 1e-9);
}

void test_floor_of_two_devices() {
    layers::costs c     = machine();
    c.n_devices         = 2;
    const double on_cpu = 7 + 20 + 2 * 100, on_gpu = 10 + 2 * 30;
    CHECK_NEAR(floor_of(c, 2, {0, 5}), 2 * on_gpu + 2 * on_cpu, 1e-9);
    CHECK_NEAR(floor_of(c, 4, {0, 5}), 4 * on_gpu, 1e-9);
    // The second one is slower: its layers take longer, but less than on the CPU.
    cost_model costs = layers::make_costs(c, n_layers);
    cost_curve slow;
    CHECK_OK(cost_curve::affine(60, 0, slow));
    CHECK_OK(costs.set_gpu(0, 1, slow));
    engine e(costs, 4);
    e.pass({0, 5}, 1.0);
    CHECK_NEAR(e.gov.floor_us(), 2 * on_gpu + 2 * (10 + 2 * 60), 1e-9);
}

// Layers that did not run are in neither; each pass has its own floor.
void test_floor_is_that_of_the_pass() {
    engine e(layers::make_costs(machine(), n_layers), 0);
    e.gov.begin_pass();
    for (const int layer : {1, 3}) {
        e.begin(layer, {0, 5});
        e.end(e.took(1.0));
    }
    e.gov.end_pass(true, e.change);
    CHECK_NEAR(e.gov.floor_us(), 2 * 227, 1e-9);
    e.pass({0, 5}, 1.0);
    CHECK_NEAR(e.gov.floor_us(), 4 * 227, 1e-9);
    e.pass({0, 0, 0, 0}, 1.0, 0.0, true, 2); // one expert with four tokens
    CHECK_NEAR(e.gov.floor_us(), 4 * 427, 1e-9);
}

void test_overhead_is_excluded() {
    engine e(layers::make_costs(machine(), n_layers), 0);
    for (int i = 0; i < 300; ++i) {
        CHECK(!e.pass({0, 5}, 227 + 500, 500));
        CHECK_NEAR(e.gov.floor_us(), 4 * 227, 1e-9);
        CHECK_NEAR(e.gov.overhead_us(), 4 * 500, 1e-9);
    }
    CHECK(e.gov.level().level() == guard_level::full);
    CHECK_NEAR(e.gov.level().token_us(), 4 * 727, 1e-9); // shown as measured
}

// ---- levels ----

void test_limits_follow_the_level() {
    for (const bool has_prefetch : {true, false}) {
        engine e(layers::make_costs(machine(), n_layers), 0, {}, "cpu-only", has_prefetch ? "next-layer" : "none");
        // There is no level for a prefetch that is not there.
        std::vector<int> expected = {0, 1, 2, 3, 4};
        if (!has_prefetch) {
            expected.erase(expected.begin() + 1);
        }
        size_t at = 0;
        for (int i = 0; i < 80 && at + 1 < expected.size(); ++i) {
            if (e.pass({0, 5}, 1000)) {
                ++at;
                CHECK_EQ(static_cast<int>(e.change.to), expected[at]);
            }
            const runtime_limits & limits = e.rt->limits();
            CHECK_EQ(limits.prefetch, expected[at] < 1);
            CHECK_EQ(limits.demand_copies, expected[at] < 2);
            CHECK_EQ(limits.admission, expected[at] < 3);
        }
        CHECK_EQ(at + 1, expected.size());
        // And back, as soon as it pays.
        for (int i = 0; i < 600; ++i) {
            e.pass({0, 5}, 227);
        }
        CHECK(e.gov.level().level() == guard_level::full);
        CHECK(e.rt->limits().prefetch && e.rt->limits().demand_copies && e.rt->limits().admission);
    }
}

// Another program's time slices hit plain llama.cpp as well: a rare layer far slower than planned is not held against a
// level, as long as it is rare.
void test_rare_slow_layers_are_not_judged() {
    governor_options untold; // costs stay as they are
    untold.live = false;
    for (const int every : {8, 1}) {
        engine e(layers::make_costs(machine(), n_layers), 0, untold);
        for (int i = 0; i < 300; ++i) {
            e.gov.begin_pass();
            for (int layer = 0; layer < n_layers; ++layer) {
                e.begin(layer, {0, 5});
                e.end(e.took(layer == 2 && i % every == 0 ? 3227 : 227));
            }
            e.gov.end_pass(true, e.change);
        }
        CHECK_EQ(e.gov.level().n_changes() == 0, every == 8);
    }
}

void test_who_is_judged() {
    engine prompts(layers::make_costs(machine(), n_layers), 0);
    governor_options off;
    off.guard = false;
    engine unguarded(layers::make_costs(machine(), n_layers), 0, off);
    for (int i = 0; i < 200; ++i) {
        CHECK(!prompts.pass({0, 5}, 5000, 0, false));
        CHECK(!unguarded.pass({0, 5}, 5000));
    }
    CHECK_NEAR(prompts.gov.floor_us(), 4 * 227, 1e-9);
}

// ---- trials ----

void test_a_prompt_is_not_tried_with() {
    for (const int n_rows : {1, 16, 17, 200}) {
        engine e(layers::make_costs(machine(), n_layers), 4);
        const std::vector<int32_t> ids(static_cast<size_t>(n_rows * top_k), 5);
        bool is_wanted = false;
        for (int i = 0; i < 10; ++i) {
            e.gov.begin_pass();
            for (int layer = 0; layer < n_layers; ++layer) {
                e.begin(layer, ids, n_rows);
                is_wanted = is_wanted || e.event.trial.wanted;
                CHECK(e.event.calibrated == &e.gov.estimator().calibrated());
                e.end(e.took(100));
            }
            e.gov.end_pass(false, e.change);
        }
        CHECK_EQ(is_wanted, n_rows <= governor::most_decode_tokens);
    }
    governor_options off;
    off.live = false;
    engine e(layers::make_costs(machine(), n_layers), 4, off);
    for (int i = 0; i < 100; ++i) {
        e.pass({0, 5}, 100);
        CHECK(!e.event.trial.wanted);
    }
}

void test_price_of_a_trial() {
    layers::costs c = machine();
    c.gpu_fixed     = 500;
    engine e(layers::make_costs(c, n_layers), 4, {}, "two-threshold");
    bool is_tried = false;
    for (int i = 0; i < 400 && !is_tried; ++i) {
        e.gov.begin_pass();
        for (int layer = 0; layer < n_layers; ++layer) {
            is_tried          = e.begin(layer, {0, 5}).is_tried && e.event.trial.what.kind == resource_kind::gpu;
            layer_timing t    = e.took(227 + 50, 50);
            t.cpu_us          = 227;
            t.gpu_is_known[0] = is_tried;
            if (is_tried) {
                CHECK_NEAR(e.made->untried_us, 227, 1e-9);
                t                   = e.took(600 + 50, 50); // longer than its plan, and the overhead is no price
                t.gpu_us[0]         = 600;
                t.gpu_is_known[0]   = true;
                const double before = e.gov.tried().spent_us();
                e.end(t);
                e.gov.end_pass(true, e.change);
                CHECK_NEAR(e.gov.tried().spent_us() - before, 600 - 227, 1e-9);
                CHECK_EQ(e.gov.estimator().state(gpu).n_samples, 1);
                break;
            }
            e.end(t);
        }
        e.gov.end_pass(true, e.change);
    }
    CHECK(is_tried);
}

// ---- what timings teach ----

void test_costs_follow_and_the_runtime_has_them() {
    for (const bool is_live : {true, false}) {
        governor_options options;
        options.live = is_live;
        engine e(layers::make_costs(machine(), n_layers), 0, options);
        for (int i = 0; i < 60; ++i) {
            e.gov.begin_pass();
            for (int layer = 0; layer < n_layers; ++layer) {
                e.begin(layer, {0, 5});
                layer_timing t = e.took(2270);
                t.cpu_us       = 2270;
                e.end(t);
            }
            e.gov.end_pass(true, e.change);
        }
        const auto batch = [](const cost_model & m) {
            return m.step_us(cpu_device) + m.t_cpu(0, 1, true) + m.t_cpu(0, 1, false);
        };
        CHECK_NEAR(batch(e.gov.costs()), is_live ? 2270 : 227, 0.03);
        CHECK_EQ(batch(e.rt->costs()), batch(e.gov.costs()));
        CHECK_NEAR(e.gov.floor_us(), 4 * batch(e.gov.costs()), 1e-9); // with today's costs
    }
}

void test_what_teaches_nothing() {
    governor_options untried;
    untried.trials.on = false;
    engine e(layers::make_costs(machine(), n_layers), 4, untried, "gpu-only");
    for (int i = 0; i < 50; ++i) {
        e.gov.begin_pass();
        for (int layer = 0; layer < n_layers; ++layer) {
            // All on the accelerator, one of them after its copy: the wait is the link's.
            const decision & made = e.begin(layer, {0, (i % 2) * 2 + 4 + layer % 2});
            layer_timing t        = e.took(5000);
            CHECK_EQ(made.plan.n_gpu, 2);
            t.gpu_us[0]       = 5000;
            t.gpu_is_known[0] = made.plan.n_copies > 0 || made.n_late > 0;
            t.is_complete     = t.gpu_is_known[0];
            e.end(t);
            while (!e.rt->in_flight().empty()) {
                CHECK_OK(e.rt->on_complete(e.rt->in_flight()[0].id, e.now_us));
            }
        }
        e.gov.end_pass(true, e.change);
    }
    engine failed(layers::make_costs(machine(), n_layers), 0);
    for (int i = 0; i < 50; ++i) {
        failed.gov.begin_pass();
        failed.begin(0, {0, 5});
        layer_timing t = failed.took(5000);
        t.cpu_us       = 5000;
        t.is_complete  = false;
        failed.end(t);
        failed.gov.end_pass(true, failed.change);
    }
    for (const engine * one : {&e, &failed}) {
        CHECK_EQ(one->gov.estimator().state(gpu).n_samples, 0);
        CHECK_EQ(one->gov.estimator().state(cpu).n_samples, 0);
        CHECK_EQ(one->gov.estimator().state(link).n_samples, 0);
    }
}

// A copy that begins with a CPU batch and ends within it, under a ceiling that both of them share in proportion to what
// they ask for. `link_us`: what it takes alone.
void share_the_ceiling(engine & e, double link_us, double ceiling, int n_passes) {
    const double cpu_us = 227, cpu_asks = 2e6 / cpu_us, link_asks = 1e6 / link_us;
    const double speed = std::min(1.0, ceiling / (cpu_asks + link_asks));
    const double copy  = link_us / speed;
    const double batch = copy + (cpu_us - link_us); // the rest of it has the memory alone
    for (int i = 0; i < n_passes; ++i) {
        e.gov.begin_pass();
        for (int layer = 0; layer < n_layers; ++layer) {
            e.begin(layer, {0, 5});
            const double begin_us = e.now_us;
            layer_timing t        = e.took(batch);
            t.cpu_us              = batch;
            e.end(t);
            e.gov.on_copy(0, 1e6, copy, begin_us + copy);
            e.now_us += 1000.0;
        }
        e.gov.end_pass(true, e.change);
    }
}

void test_contention_is_the_ceilings() {
    layers::costs c = machine();
    c.dram          = 12e3; // 8.8e3 and 1e4 are asked for
    engine e(layers::make_costs(c, n_layers), 0);
    share_the_ceiling(e, 100, 12e3, 300);
    CHECK_EQ(e.gov.estimator().state(link).n_samples, 1200);
    CHECK_NEAR(e.gov.estimator().state(link).slowdown, 1.0, 0.05);
    CHECK_NEAR(e.gov.estimator().state(cpu).slowdown, 1.0, 0.05);
    CHECK_NEAR(e.gov.costs().t_copy(0, 1e6), 100, 0.05);
    CHECK_NEAR(e.gov.costs().dram_bytes_per_us(), 12e3, 0.05);
}

// What a link would not reach alone is its own cost.
void test_slow_link_beside_the_cpu_is_the_links() {
    layers::costs c = machine();
    c.dram          = 12e3;
    engine e(layers::make_costs(c, n_layers), 0);
    share_the_ceiling(e, 100, 12e3, 30);
    share_the_ceiling(e, 200, 12e3, 300);
    CHECK_NEAR(e.gov.estimator().state(link).slowdown, 2.0, 0.15);
    CHECK_NEAR(e.gov.estimator().state(cpu).slowdown, 1.0, 0.1);
}

// ---- slots of the static layers ----

using slots = std::vector<std::vector<int>>;

void test_static_slots() {
    CHECK(static_slots({{4, 4, 4, 4}}, {1, 1, 1, 1}, {8, 8, 8, 8}) == (slots{{8, 8, 0, 0}}));
    CHECK(static_slots({{8, 8, 8, 8}}, {1, 1, 1, 1}, {8, 8, 8, 8}) == (slots{{8, 8, 8, 8}}));
    CHECK(static_slots({{1, 1, 1, 1}}, {1, 1, 1, 1}, {8, 8, 8, 8}) == (slots{{0, 0, 0, 0}}));
    CHECK(static_slots({{2, 2, 2, 2}}, {0.1, 0.1, 0.1, 0.1}, {8, 8, 8, 8}) == (slots{{8, 0, 0, 0}})); // rounding
    // Bytes count, not slots: the second layer does not fit, the third one does.
    CHECK(static_slots({{4, 4, 4}}, {1, 2, 1}, {8, 8, 8}) == (slots{{8, 0, 8}}));
    CHECK(static_slots({{4, 4}}, {1, 3}, {8, 4}) == (slots{{8, 0}}));
    CHECK(static_slots({{4, 2}}, {1, 3}, {8, 2}) == (slots{{8, 0}}));
    // A layer that has no slots there is not that device's.
    CHECK(static_slots({{0, 8, 8}}, {1, 1, 1}, {8, 8, 8}) == (slots{{0, 8, 8}}));
    // No layer is on two devices.
    CHECK(static_slots({{4, 4, 4, 4}, {4, 4, 4, 4}}, {1, 1, 1, 1}, {8, 8, 8, 8}) ==
          (slots{{8, 8, 0, 0}, {0, 0, 8, 8}}));
    CHECK(static_slots({{2, 2, 2, 2}, {6, 6, 6, 6}}, {1, 1, 1, 1}, {8, 8, 8, 8}) ==
          (slots{{8, 0, 0, 0}, {0, 8, 8, 8}}));
    CHECK(static_slots({}, {1, 1}, {8, 8}).empty());
}

} // namespace

int main() {
    test_floor_by_hand();
    test_floor_of_two_devices();
    test_floor_is_that_of_the_pass();
    test_overhead_is_excluded();
    test_limits_follow_the_level();
    test_rare_slow_layers_are_not_judged();
    test_who_is_judged();
    test_a_prompt_is_not_tried_with();
    test_price_of_a_trial();
    test_costs_follow_and_the_runtime_has_them();
    test_what_teaches_nothing();
    test_contention_is_the_ceilings();
    test_slow_link_beside_the_cpu_is_the_links();
    test_static_slots();
    return check::report("governor");
}
