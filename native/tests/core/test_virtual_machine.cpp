// The machine of the closed loop: the memory's ceiling by hand, the order of copies, equal noise for equal seeds.
#include "traffic.h"

#include "core/replay/closed_loop.h"
#include "core/replay/virtual_machine.h"

using namespace hybrimoe;

namespace {

constexpr double infinite = std::numeric_limits<double>::infinity();

void check_near(double value, double truth, int line) {
    if (!(std::fabs(value - truth) <= 1e-6 * std::fabs(truth) + 1e-6)) {
        std::ostringstream text;
        text << value << " is not " << truth;
        check::fail(__FILE__, line, text.str());
    }
}
#define CHECK_NEAR(value, truth) check_near(value, truth, __LINE__)

// Experts of 1e6 bytes: 100 us on the CPU, which asks for 1e4 bytes per us, 10 us on an accelerator.
struct bench {
    explicit bench(double copy_us, double dram = infinite, int n_devices = 1, double overhead_us = 0.0) {
        layers::costs c;
        c.cpu_per_token = 100, c.gpu_fixed = 10, c.gpu_step = 2, c.copy = copy_us, c.dram = dram,
        c.n_devices         = n_devices;
        phase.costs         = layers::make_costs(c, 4);
        options.overhead_us = overhead_us;
        machine             = std::make_unique<virtual_machine>(options, n_devices);
        machine->begin_phase(phase);
    }

    // A layer with one expert per entry of `devices`; those of `copied` need a demanded copy.
    void layer(const std::vector<int> & devices, const std::vector<bool> & copied = {}) {
        made        = decision();
        event       = layer_event();
        event.layer = n_layers++;
        for (size_t i = 0; i < devices.size(); ++i) {
            work_item w;
            w.expert = static_cast<int>(i);
            placement at;
            at.expert = w.expert;
            at.device = devices[i];
            at.copied = i < copied.size() && copied[i];
            made.items.push_back(w);
            made.plan.placements.push_back(at);
            if (at.copied) {
                copy(transfer_kind::demand, w.expert, at.device);
            }
        }
    }

    void copy(transfer_kind kind, int expert, int device) {
        transfer t;
        t.id     = next_id++;
        t.kind   = kind;
        t.layer  = event.layer;
        t.expert = expert;
        t.device = device;
        t.bytes  = 1e6;
        made.transfers.push_back(t);
    }

    void run() { machine->run_layer(event, made, {}, timing); }

    finished_copy ended(int64_t id) const {
        for (const finished_copy & c : machine->finished()) {
            if (c.id == id) {
                return c;
            }
        }
        return {};
    }

    loop_options options;
    machine_phase phase;
    std::unique_ptr<virtual_machine> machine;
    decision made;
    layer_event event;
    layer_timing timing;
    int n_layers    = 0;
    int64_t next_id = 1;
};

// ---- the ceiling ----

void test_alone() {
    bench b(50, infinite, 1, 7);
    b.layer({cpu_device, cpu_device, 0});
    b.run();
    CHECK_NEAR(b.timing.cpu_us, 200);
    CHECK_NEAR(b.timing.span_us, 207);
    CHECK_NEAR(b.timing.overhead_us, 7);
    CHECK(b.timing.gpu_is_known[0] && b.timing.gpu_at_most[0]); // it had ended when the CPU had
    CHECK_NEAR(b.timing.gpu_us[0], 200);
    b.layer({0, 0});
    b.run();
    CHECK(b.timing.cpu_us < 0.0 && !b.timing.gpu_at_most[0]);
    CHECK_NEAR(b.timing.gpu_us[0], 22);
    CHECK_NEAR(b.timing.span_us, 29);
    // One that is looked at is timed by itself.
    b.layer({cpu_device, 0});
    b.event.trial.wanted = true;
    b.event.trial.what   = {resource_kind::gpu, 0};
    b.run();
    CHECK(!b.timing.gpu_at_most[0]);
    CHECK_NEAR(b.timing.gpu_us[0], 12);
    CHECK_NEAR(b.timing.cpu_us, 100);
}

// One reader alone may have what it asks for, whatever the ceiling is: its cost was measured under it.
void test_equal_shares() {
    bench b(100, 1e4); // each asks for all of it
    b.layer({cpu_device});
    b.copy(transfer_kind::admit, 9, 0);
    b.run();
    CHECK_NEAR(b.timing.cpu_us, 200);
    CHECK_EQ(b.machine->finished().size(), 1U);
    CHECK_NEAR(b.ended(1).us, 200);
    CHECK_NEAR(b.ended(1).end_us, 200);
}

void test_shares_in_proportion() {
    // The copy asks for 1e4 / 3: together 4 / 3 of the ceiling, so both run at 3 / 4 until the CPU is done.
    bench b(300, 1e4);
    b.layer({cpu_device});
    b.copy(transfer_kind::admit, 9, 0);
    b.run();
    CHECK_NEAR(b.timing.cpu_us, 400.0 / 3);
    CHECK(b.machine->finished().empty());
    b.machine->pass(199.0); // 200 us of it are left, and nothing else reads
    CHECK(b.machine->finished().empty());
    b.machine->pass(2.0);
    CHECK_EQ(b.machine->finished().size(), 1U);
    CHECK_NEAR(b.ended(1).end_us, 1000.0 / 3);
    CHECK_NEAR(b.ended(1).us, 1000.0 / 3);
    CHECK_NEAR(b.machine->now_us(), 400.0 / 3 + 201);

    // A copy that ends first: 100 us of it at half the speed, then the CPU alone.
    bench c(100, 1e4);
    c.layer({cpu_device, cpu_device, cpu_device});
    c.copy(transfer_kind::admit, 9, 0);
    c.run();
    CHECK_NEAR(c.timing.cpu_us, 200 + 200);
    CHECK_NEAR(c.ended(1).us, 200);
}

void test_two_links_share_it() {
    // 1e4 by the CPU and by each link: a third of 1e4 for each.
    bench b(100, 1e4, 2);
    b.layer({cpu_device});
    b.copy(transfer_kind::admit, 8, 0);
    b.copy(transfer_kind::admit, 9, 1);
    b.run();
    CHECK_NEAR(b.timing.cpu_us, 300);
    CHECK_NEAR(b.ended(1).us, 300);
    CHECK_NEAR(b.ended(2).us, 300);
    // Without the CPU each has half of it; one link's copies run one after the other.
    bench c(100, 1e4, 2);
    c.layer({0, 1, 0}, {true, true, true});
    c.run();
    CHECK_NEAR(c.ended(1).end_us, 200);
    CHECK_NEAR(c.ended(2).end_us, 200);
    CHECK_NEAR(c.ended(3).end_us, 300);
    CHECK_NEAR(c.ended(3).us, 100);      // from its own begin
    CHECK_NEAR(c.timing.gpu_us[1], 310); // device 0 is waited for first
    CHECK_NEAR(c.timing.gpu_us[0], 310);
    CHECK(c.timing.gpu_at_most[1]);
}

void test_changed_costs_hold_from_the_next_layer() {
    bench b(100);
    b.layer({cpu_device});
    b.run();
    CHECK_NEAR(b.timing.cpu_us, 100);
    machine_phase slow;
    layers::costs c;
    c.cpu_per_token = 2000, c.gpu_fixed = 10, c.copy = 100;
    slow.costs              = layers::make_costs(c, 4);
    slow.waits_every_layers = 2, slow.waits_us = 3000;
    b.machine->begin_phase(slow);
    b.layer({cpu_device, 0}); // layer 1
    b.run();
    CHECK_NEAR(b.timing.span_us, 2000);
    b.layer({cpu_device, 0}); // layer 2: the accelerator waits
    b.run();
    CHECK_NEAR(b.timing.span_us, 3010);
}

// ---- copies ----

void test_demanded_copies_go_first() {
    bench b(130);
    b.layer({cpu_device});
    b.copy(transfer_kind::admit, 8, 0);      // 1
    b.copy(transfer_kind::prefetch, 9, 0);   // 2
    b.run();                                 // to 100
    b.layer({0, 0, 0}, {true, false, true}); // 3 and 4
    b.copy(transfer_kind::admit, 7, 0);      // 5
    b.run();
    CHECK_NEAR(b.ended(1).end_us, 130);
    CHECK_NEAR(b.ended(3).us, 130);
    CHECK_NEAR(b.ended(3).end_us, 260);
    CHECK_NEAR(b.ended(4).end_us, 390);
    CHECK_NEAR(b.timing.gpu_us[0], 390 + 10 - 100); // the last copy, then its expert
    b.machine->drain();
    CHECK_NEAR(b.ended(2).end_us, 520);
    CHECK_NEAR(b.ended(5).end_us, 650);
}

void test_the_running_copy_is_not_interrupted() {
    bench b(300);
    b.layer({cpu_device});
    b.copy(transfer_kind::admit, 8, 0);    // 1: runs from 0 to 300
    b.copy(transfer_kind::prefetch, 9, 0); // 2
    b.run();                               // to 100
    b.layer({0}, {true});                  // 3
    b.run();
    CHECK_NEAR(b.ended(1).end_us, 300);
    CHECK_NEAR(b.ended(1).us, 300);
    CHECK_NEAR(b.ended(3).end_us, 600);
    CHECK_NEAR(b.timing.gpu_us[0], 600 - 100 + 10);
    b.machine->drain();
    CHECK_NEAR(b.ended(2).end_us, 900);
    CHECK_EQ(b.machine->finished().size(), 3U);
}

// An expert whose copy is under way is waited for; resident ones go before it.
void test_experts_under_way() {
    bench b(300);
    b.layer({cpu_device});
    b.copy(transfer_kind::prefetch, 1, 0);
    b.made.transfers[0].layer             = 1;
    const std::vector<transfer> in_flight = b.made.transfers;
    b.run(); // to 100
    b.layer({0, 0});
    b.machine->run_layer(b.event, b.made, in_flight, b.timing);
    CHECK_NEAR(b.timing.gpu_us[0], 200 + 10);
}

void test_fill() {
    bench b(100, 5e3, 2); // the ceiling is what limits a copy
    CHECK_NEAR(b.machine->fill({{1e6, 1e6, 1e6}, {1e6}}), 600);
    CHECK_NEAR(b.machine->now_us(), 600);
    CHECK_NEAR(b.machine->fill({{}, {}}), 0);
}

void test_plain_placements() {
    bench b(100, 4e3);
    b.layer({cpu_device, 0, 0});
    CHECK_NEAR(b.machine->plain_us(b.made, 0, cpu_device), 750); // 3e6 bytes under the ceiling
    CHECK_NEAR(b.machine->plain_us(b.made, 0, 0), 32);
}

// ---- noise ----

struct drawn_trace {
    drawn_trace() {
        traffic::options o;
        o.n_layers = 4, o.n_expert = 8, o.top_k = 2;
        traffic::routing r(o);
        for (int token = 0; token < n_tokens; ++token) {
            for (int layer = 0; layer < o.n_layers; ++layer) {
                r.draw(layer);
                experts.insert(experts.end(), r.ids.begin(), r.ids.end());
            }
        }
        trace.shape          = {o.n_layers, o.n_expert, o.top_k};
        trace.experts        = experts.data();
        trace.n_tokens       = n_tokens;
        trace.prompt_offsets = offsets;
        trace.n_prompts      = 1;
    }

    static constexpr int n_tokens = 50;
    const int64_t offsets[2]      = {0, n_tokens};
    std::vector<int32_t> experts;
    replay_trace trace;
};

layers::costs loop_costs() {
    layers::costs c;
    c.cpu_per_token = 100, c.cpu_first = 20, c.gpu_fixed = 20, c.gpu_step = 10, c.copy = 100;
    return c;
}

std::vector<loop_token> run_loop(const loop_options & options, const char * schedule = "two-threshold",
                                 int n_slots = 4) {
    const drawn_trace drawn;
    traffic::options o;
    o.n_layers = 4, o.n_expert = 8, o.top_k = 2;
    o.n_slots = n_slots, o.schedule = schedule, o.preload = true;
    const cost_model believed         = options.phases[0].costs;
    const std::unique_ptr<runtime> rt = traffic::make_runtime(o, believed);
    governor gov;
    CHECK_OK(governor::create(believed, {}, *rt, gov));
    std::vector<loop_token> out(static_cast<size_t>(options.n_tokens));
    CHECK_OK(run_closed_loop(drawn.trace, options, *rt, gov, out.data()));
    return out;
}

loop_options noisy(uint64_t seed) {
    loop_options o;
    machine_phase p;
    p.costs = layers::make_costs(loop_costs(), 4);
    p.noise = 0.1, p.outlier_share = 0.01, p.outlier_factor = 30;
    o.phases.push_back(p);
    o.n_tokens = 300, o.gap_us = 20, o.overhead_us = 5, o.seed = seed;
    return o;
}

void test_equal_seeds_equal_noise() {
    const auto a = run_loop(noisy(1)), b = run_loop(noisy(1)), other = run_loop(noisy(2));
    // Noise does not depend on what is decided: plain placements take the same beside all policies.
    const auto decided_otherwise = run_loop(noisy(1), "gpu-only", 2);
    int n_equal = 0, n_equal_decisions = 0;
    for (size_t i = 0; i < a.size(); ++i) {
        CHECK_EQ(a[i].us, b[i].us);
        CHECK_EQ(a[i].n_copies, b[i].n_copies);
        CHECK_EQ(a[i].cpu_only_us, b[i].cpu_only_us);
        CHECK_EQ(a[i].cpu_only_us, decided_otherwise[i].cpu_only_us);
        n_equal += a[i].cpu_only_us == other[i].cpu_only_us ? 1 : 0;
        n_equal_decisions += a[i].us == decided_otherwise[i].us ? 1 : 0;
    }
    CHECK_EQ(n_equal, 0);
    CHECK(n_equal_decisions < 10);
}

void test_noise_is_as_told() {
    loop_options o = noisy(3);
    o.n_tokens     = 2000;
    // 4 layers of 220 us. One time in a hundred takes 30 times as long, the others vary by a tenth.
    double sum = 0.0, squares = 0.0;
    int n = 0, n_outliers = 0;
    for (const loop_token & t : run_loop(o, "cpu-only", 0)) {
        const double ratio = t.cpu_only_us / 880;
        if (ratio > 3.0) {
            ++n_outliers;
            continue;
        }
        ++n;
        sum += ratio;
        squares += ratio * ratio;
    }
    const double mean = sum / n, deviation = std::sqrt(squares / n - mean * mean);
    CHECK(std::fabs(mean - 1.005) < 0.01);
    CHECK(std::fabs(deviation - 0.05) < 0.005); // of four together
    CHECK(n_outliers > 50 && n_outliers < 115); // 4 % of the tokens
}

// Overlaps of all lengths: what the ceiling takes is believed to be the ceiling's. The link's cost stays its own.
void test_contention_teaches_no_link_cost() {
    for (const double dram : {15e3, 18e3}) {
        loop_options o;
        layers::costs c = loop_costs();
        c.dram          = dram;
        machine_phase p;
        p.costs = layers::make_costs(c, 4);
        p.noise = 0.03;
        o.phases.push_back(p);
        o.n_tokens = 1500, o.gap_us = 30;
        int n_copies = 0;
        for (const loop_token & t : run_loop(o)) {
            n_copies += t.n_copies;
            CHECK(std::fabs(t.believed_link - 1.0) < 0.05);
            CHECK(std::fabs(t.believed_cpu - 1.0) < 0.05);
            CHECK(std::fabs(t.believed_dram - 1.0) < 0.05);
        }
        CHECK(n_copies > 200);
    }
}

void test_bad_options_are_refused() {
    const drawn_trace drawn;
    traffic::options t;
    t.n_layers = 4, t.n_expert = 8, t.top_k = 2, t.n_slots = 4;
    const cost_model costs = layers::make_costs(loop_costs(), 4);
    std::vector<loop_token> rows(300);
    const auto is_refused = [&](const loop_options & o) {
        const std::unique_ptr<runtime> rt = traffic::make_runtime(t, costs);
        governor gov;
        CHECK_OK(governor::create(costs, {}, *rt, gov));
        return run_closed_loop(drawn.trace, o, *rt, gov, rows.data()).code() != error_code::none;
    };
    CHECK(!is_refused(noisy(1)));
    loop_options o = noisy(1);
    o.phases.clear();
    CHECK(is_refused(o));
    o                      = noisy(1);
    o.phases[0].from_token = 1;
    CHECK(is_refused(o));
    o = noisy(1);
    o.phases.push_back(o.phases[0]); // not after the first one
    CHECK(is_refused(o));
    o.phases[1].from_token = 10;
    CHECK(!is_refused(o));
    o.phases[1].noise = 1.0;
    CHECK(is_refused(o));
    o                 = noisy(1);
    o.phases[0].costs = layers::make_costs(loop_costs(), 3);
    CHECK(is_refused(o));
    CHECK_OK(cost_model::create(4, 1, 1, o.phases[0].costs));
    CHECK(is_refused(o));
    o          = noisy(1);
    o.n_tokens = 0;
    CHECK(is_refused(o));
    o        = noisy(1);
    o.gap_us = -1.0;
    CHECK(is_refused(o));
}

} // namespace

int main() {
    test_alone();
    test_equal_shares();
    test_shares_in_proportion();
    test_two_links_share_it();
    test_changed_costs_hold_from_the_next_layer();
    test_demanded_copies_go_first();
    test_the_running_copy_is_not_interrupted();
    test_experts_under_way();
    test_fill();
    test_plain_placements();
    test_equal_seeds_equal_noise();
    test_noise_is_as_told();
    test_contention_teaches_no_link_cost();
    test_bad_options_are_refused();
    return check::report("virtual_machine");
}
