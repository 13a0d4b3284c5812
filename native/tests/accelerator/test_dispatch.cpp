// The whole dispatch on hand-made layers: whatever happens to copies and memory, results equal those of ggml's CPU
// backend alone, bit for bit with its kernels. Other threads ask for state, residency, counters and events meanwhile.
#include "../backend/check.h"
#include "counters.h"
#include "dispatch.h"
#include "observer/trace_feed.h"
#include "settings.h"
#include "small_model.h"
#include "test_device.h"

#include "ggml-backend.h"

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>
#include <thread>

using namespace hybrimoe;

namespace {

constexpr int n_threads = 2;
bool is_late            = false; // the accelerators are test devices

// Settings with test devices in the place of CPUs.
std::string with_devices(std::string json) {
    const std::string cpu = "\"CPU\"";
    for (int i = 0; is_late && json.find(cpu) != std::string::npos; i++) {
        json.replace(json.find(cpu), cpu.size(), "\"TEST" + std::to_string(i) + "\"");
    }
    return json;
}

struct expectation {
    double nmse    = 0.0;  // 0: the same bits
    bool uses      = true; // experts are computed on the accelerator
    bool evicts    = true;
    int n_passes   = 40;
    bool no_prompt = false;
};

class reference {
public:
    reference() : backend_(ggml_backend_dev_init(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), nullptr)) {}
    void compute(ggml_cgraph * graph) const {
        CHECK(ggml_backend_graph_compute(backend_.get(), graph) == GGML_STATUS_SUCCESS);
    }

private:
    backend_ptr backend_;
};

double nmse_of(const std::vector<float> & exact, const std::vector<float> & got) {
    double error = 0.0, power = 0.0;
    for (size_t i = 0; i < exact.size(); i++) {
        error += std::pow(static_cast<double>(got[i]) - static_cast<double>(exact[i]), 2);
        power += std::pow(static_cast<double>(exact[i]), 2);
    }
    return std::isfinite(error) ? error / power : INFINITY;
}

// Asks for everything that a host may ask for, until told to stop.
class onlooker {
public:
    onlooker(const dispatcher & what, const counters & data) : thread_([&] { look(what, data); }) {}
    ~onlooker() {
        stop_ = true;
        thread_.join();
    }

private:
    void look(const dispatcher & what, const counters & data) {
        uint64_t number = 0;
        std::string line;
        while (!stop_) {
            const instance_report report = what.report(report_state | report_residency | report_trace);
            CHECK(report.state.size() > 10 && report.residency.front() == '[' && report.trace.front() == '{');
            CHECK(what.feed() != nullptr && what.feed()->heat().size() <= 16);
            while (what.next_event(number, number, line)) {
            }
            for (int layer = 0; layer < data.n_layers(); layer++) {
                data.read(layer);
            }
            std::this_thread::sleep_for(std::chrono::microseconds(200));
        }
    }

    std::atomic<bool> stop_{false};
    std::thread thread_;
};

void play(const char * name, const small_model::shape & shape, const std::string & more, const expectation & expected) {
    const int n_failed_before = check::n_failed();
    const small_model::model model(shape, 5);
    const reference plain;
    const settings usual  = parse_settings(with_devices(small_model::settings_json("\"observe\": true")), settings());
    const settings config = more.empty() ? usual : parse_settings(with_devices("{" + more + "}"), usual);
    auto data             = std::make_shared<counters>();
    double worst          = 0.0;
    bool is_equal         = true;
    std::string state;
    {
        dispatcher ours(config, data);
        ours.set_n_threads(n_threads);
        const onlooker other(ours, *data);
        std::mt19937_64 rng(17);
        std::normal_distribution<float> normal;
        for (int pass = 0; pass < expected.n_passes; pass++) {
            const size_t n_tokens = expected.no_prompt || rng() % 4 != 0 ? 1 : 2 + rng() % 12;
            std::vector<float> x(n_tokens * static_cast<size_t>(shape.n_embd));
            for (float & v : x) {
                v = normal(rng);
            }
            for (int layer = 0; layer < shape.n_layers; layer++) {
                const std::vector<float> exact =
                    model.forward(layer, x, [&](ggml_cgraph * graph) { plain.compute(graph); });
                const std::vector<float> got = model.forward(
                    layer, x, [&](ggml_cgraph * graph) { CHECK(ours.compute(graph, {}) == GGML_STATUS_SUCCESS); });
                is_equal = is_equal && std::memcmp(exact.data(), got.data(), exact.size() * sizeof(float)) == 0;
                worst    = std::max(worst, nmse_of(exact, got));
                x        = exact;
            }
        }
        state = ours.report(report_state).state;
    }
    layer_counts sum;
    for (int layer = 0; layer < shape.n_layers; layer++) {
        const layer_counts one = data->read(layer);
        sum.n_blocks += one.n_blocks;
        sum.n_blocks_delegated += one.n_blocks_delegated;
        sum.n_experts_gpu += one.n_experts_gpu;
        sum.n_evictions += one.n_evictions;
        sum.h2d_bytes += one.h2d_bytes;
    }
    CHECK(sum.n_blocks == static_cast<uint64_t>(expected.n_passes * shape.n_layers) && sum.n_blocks_delegated == 0);
    CHECK(expected.nmse > 0.0 ? worst <= expected.nmse : is_equal);
    CHECK((sum.n_experts_gpu > 0) == expected.uses);
    CHECK((sum.n_evictions > 0) == expected.evicts && (sum.h2d_bytes > 0) == expected.evicts);
    if (check::n_failed() != n_failed_before) {
        std::fprintf(stderr, "  in %s: NMSE %g, %llu experts on the accelerator, %llu evictions, %s\n", name, worst,
                     static_cast<unsigned long long>(sum.n_experts_gpu),
                     static_cast<unsigned long long>(sum.n_evictions), state.c_str());
    }
}

void play_all() {
    small_model::shape plain, merged, biased, quantised;
    merged.is_merged  = true;
    merged.type       = GGML_TYPE_Q8_0;
    biased.has_biases = true;
    biased.top_k      = 3;
    quantised.type    = GGML_TYPE_Q4_0;
    const expectation usual;
    expectation roomy;
    roomy.evicts = false;
    play("plain", plain, "", usual);
    play("merged", merged, "", usual);
    play("biased", biased, "", usual);
    play("one slot", quantised, "\"expert_cache\": 1", usual);
    play("all slots", quantised, "\"expert_cache\": 8", roomy);
    play("two accelerators", merged, "\"devices\": [\"CPU\", \"CPU\"], \"expert_cache\": 4", usual);
    play("slow copies", plain, "\"faults\": {\"delay_copy_us\": 300}, \"prefetch\": \"path\"", usual);
    play("failing copies", biased, "\"faults\": {\"fail_copy_every\": 3}", usual);
    play("slow, failing, two", quantised,
         "\"devices\": [\"CPU\", \"CPU\"], \"faults\": {\"delay_copy_us\": 200, \"fail_copy_every\": 5}", usual);
    play("measured", plain, "\"costs\": null, \"live_costs\": true, \"schedule\": \"gpu-only\"", usual);

    // Guarded against an estimate that nothing can meet: every level is passed, the last one moves whole layers.
    expectation guarded;
    guarded.n_passes  = 90;
    guarded.no_prompt = true;
    play("guard", quantised,
         "\"guard\": true, \"expert_cache\": 4, \"costs\": {\"cpu_us\": 0.002, \"gpu_us\": 0.0001, \"copy_us\": 0.001}",
         guarded);

    expectation ours;
    ours.nmse = 1e-6;
    play("own kernels", plain, "\"cpu_kernels\": \"auto\", \"prefetch\": \"impact\"", ours);
    play("own kernels, slow copies, two", biased,
         "\"cpu_kernels\": \"auto\", \"prefetch\": \"next-layer\", \"devices\": [\"CPU\", \"CPU\"],"
         " \"faults\": {\"delay_copy_us\": 300, \"fail_copy_every\": 7}",
         ours);
    ours.nmse = 1e-3;
    play("own kernels, quantised", quantised, "\"cpu_kernels\": \"auto\", \"prefetch\": \"fate\"", ours);
}

// At each allocation in turn the device has no memory left, for good or for once.
void play_without_memory() {
    small_model::shape shape;
    shape.n_layers = 2;
    for (int n = 1; n <= 12; n++) {
        for (const bool once : {false, true}) {
            expectation expected;
            expected.n_passes = 16;
            expected.uses = expected.evicts = once ? n > 1 : n > 2;
            const std::string from          = std::to_string(n);
            play(("allocation " + from).c_str(), shape,
                 "\"faults\": {\"fail_alloc_from\": " + from + (once ? ", \"fail_alloc_until\": " + from : "") + "}",
                 expected);
        }
    }
}

} // namespace

int main(int argc, char ** argv) {
    const std::string which = argc > 1 ? argv[1] : "";
    is_late                 = argc > 2 && std::string(argv[2]) == "late";
    if (is_late) {
        setenv("HYBRIMOE_TEST_DEVICES", "2", 1);
        ggml_backend_register(test_device_registry());
    }
    if (which.empty() || which == "all") {
        play_all();
    }
    if (which.empty() || which == "memory") {
        play_without_memory();
    }
    return check::report();
}
