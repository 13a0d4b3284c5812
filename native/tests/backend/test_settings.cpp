// Settings: the JSON that the host sends, and the defaults from the environment.
#include "check.h"
#include "kernels/moe_kernels.h"
#include "settings.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

using namespace hybrimoe;

namespace {

// The message with which `json` is refused; empty when it is accepted.
std::string refusal(const std::string & json) {
    try {
        parse_settings(json, settings());
        return "";
    } catch (const std::invalid_argument & error) {
        return error.what();
    }
}

bool contains(const std::string & text, const char * part) {
    return text.find(part) != std::string::npos;
}

void test_valid() {
    CHECK(parse_settings("{}", settings()).kernels == settings().kernels);
    settings ggml;
    ggml.kernels = cpu_kernels::ggml;
    CHECK(parse_settings("{}", ggml).kernels == cpu_kernels::ggml);
    CHECK(parse_settings("{\"cpu_kernels\": \"auto\"}", ggml).kernels == cpu_kernels::best);
    for (const char * const * name = kernels::available_kernel_sets(); *name != nullptr; name++) {
        const settings named = parse_settings("{\"cpu_kernels\": \"" + std::string(*name) + "\"}", ggml);
        CHECK(named.kernels == cpu_kernels::named && named.kernel_set == *name);
        CHECK(parse_settings("{\"cpu_kernels\": \"ggml\"}", named).kernels == cpu_kernels::ggml);
    }
    CHECK(parse_settings(" {\"cpu_kernels\" : \"ggml\"}\n", settings()).kernels == cpu_kernels::ggml);
}

void test_not_json() {
    for (const char * json :
         {"", " ", "{", "{\"cpu_kernels\": }", "nonsense", "{} {}", "{\"cpu_kernels\": \"\xff\"}"}) {
        CHECK(contains(refusal(json), "not JSON"));
    }
    CHECK(contains(refusal(std::string("{\0}", 3)), "not JSON"));
}

void test_wrong_type() {
    for (const char * json : {"[]", "null", "3", "\"cpu_kernels\""}) {
        CHECK(contains(refusal(json), "object"));
    }
    for (const char * value : {"1", "null", "true", "[\"ggml\"]", "{}"}) {
        CHECK(contains(refusal("{\"cpu_kernels\": " + std::string(value) + "}"), "cpu_kernels must be a string"));
    }
}

void test_unknown() {
    const std::string key = refusal("{\"cpu_kernels\": \"ggml\", \"treads\": 2}");
    CHECK(contains(key, "treads") && contains(key, "known"));
    const std::string value = refusal("{\"cpu_kernels\": \"abacus\"}");
    CHECK(contains(value, "abacus") && contains(value, "\"ggml\""));
    CHECK(!refusal("{\"cpu_kernels\": \"GGML\"}").empty());
    CHECK(!refusal("{\"\": 0}").empty());
}

void test_huge() {
    const size_t depth = 1 << 17; // enough to overflow the stack of a recursive parser
    CHECK(contains(refusal(std::string(depth, '[')), "not JSON"));
    CHECK(contains(refusal(std::string(depth, '[') + std::string(depth, ']')), "nests too deeply"));
    const size_t n = 1 << 18;
    CHECK(!refusal("{\"cpu_kernels\": \"" + std::string(n, 'g') + "\"}").empty());
    CHECK(refusal("{" + std::string(n, ' ') + "}").empty());
}

std::string quoted(std::string json) { // ' for "
    for (char & c : json) {
        c = c == '\'' ? '"' : c;
    }
    return json;
}

settings parse(const char * json) {
    return parse_settings(quoted(json), settings());
}

void test_expert_cache() {
    using kind = expert_cache_size::kind;
    CHECK(settings().expert_cache.is == kind::automatic && !settings().expert_cache.is_off());
    CHECK(parse("{'expert_cache': 'auto'}").expert_cache.is == kind::automatic);
    const expert_cache_size slots = parse("{'expert_cache': 7}").expert_cache;
    CHECK(slots.is == kind::slots && slots.n_slots == 7 && !slots.is_off());
    CHECK(parse("{'expert_cache': 0}").expert_cache.is_off());
    const expert_cache_size bytes = parse("{'expert_cache': {'bytes': 3e9}}").expert_cache;
    CHECK(bytes.is == kind::bytes && bytes.n_bytes == 3e9);
    const expert_cache_size part = parse("{'expert_cache': {'fraction': 0.25}}").expert_cache;
    CHECK(part.is == kind::fraction && part.fraction == 0.25);
    for (const char * value : {"-1", "1.5", "'all'", "true", "null", "[]", "{}", "{'bytes': -1}", "{'fraction': 1.5}",
                               "{'bytes': 1, 'fraction': 1}", "{'slots': 3}", "{'fraction': 'x'}", "1e300"}) {
        CHECK(contains(refusal(quoted(std::string("{'expert_cache': ") + value + "}")), "expert_cache"));
    }
}

void test_devices() {
    CHECK(settings().all_devices);
    const settings two = parse("{'devices': ['CPU', 'CUDA0']}");
    CHECK(!two.all_devices && two.devices.size() == 2 && two.devices[1] == "CUDA0");
    CHECK(parse_settings(quoted("{'devices': 'auto'}"), two).devices.empty());
    CHECK(!parse("{'devices': []}").all_devices); // none
    for (const char * value : {"'CUDA0'", "3", "[3]", "null", "{}"}) {
        CHECK(contains(refusal(quoted(std::string("{'devices': ") + value + "}")), "devices"));
    }
}

void test_costs() {
    CHECK(!settings().simple && settings().costs_json.empty());
    const settings simple = parse("{'costs': {'cpu_us': 40, 'gpu_us': 5, 'copy_us': 80.5}}");
    CHECK(simple.simple && simple.simple->cpu_us == 40.0 && simple.simple->copy_us == 80.5);
    CHECK(simple.simple->cpu_first_us == 0.0);
    CHECK(!parse_settings(quoted("{'costs': null}"), simple).simple);
    const settings calibrated = parse_settings(quoted("{'costs': {'classes': []}}"), simple);
    CHECK(!calibrated.simple && contains(calibrated.costs_json, "classes"));
    for (const char * value : {"3", "[]", "'auto'", "{'cpu_us': 1, 'gpu_us': 1}", "{'cpu_us': -1, 'copy_us': 1}",
                               "{'cpu_us': 1, 'copy_us': 0}", "{'cpu_us': 1, 'copy_us': 1, 'nonsense': 1}"}) {
        CHECK(contains(refusal(quoted(std::string("{'costs': ") + value + "}")), "costs"));
    }
}

void test_numbers_and_flags() {
    const settings all = parse(
        "{'fit_margin_bytes': 0, 'max_batch_tokens': 1, 'throttle_link_bytes_per_s': 1e9,"
        " 'guard': false, 'live_costs': false, 'pin_experts': true, 'pin_threads': [0, 5], 'log_to_stderr': false,"
        " 'state_path': 'a', 'route_trace': 'b', 'cache_policy': 'lru', 'schedule': 'c',"
        " 'prefetch': 'none', 'admission': 'pays:stay=3'}");
    CHECK(all.fit_margin_bytes == 0 && all.max_batch_tokens == 1 && all.throttle_bytes_per_s == 1e9);
    CHECK(!all.guard && !all.live_costs && all.pin_experts && !all.log_to_stderr);
    CHECK((all.pin_threads == std::vector<int>{0, 5}));
    CHECK(all.state_path == "a" && all.route_trace == "b" && all.cache_policy == "lru" && all.schedule == "c");
    CHECK(all.prefetch == "none" && all.admission == "pays:stay=3");
    for (const char * pair :
         {"'fit_margin_bytes': -1", "'fit_margin_bytes': 1.5", "'fit_margin_bytes': 1e18", "'max_batch_tokens': 0",
          "'throttle_link_bytes_per_s': -1", "'throttle_link_bytes_per_s': 'x'", "'guard': 1", "'live_costs': 'yes'",
          "'pin_experts': null", "'pin_threads': 1", "'pin_threads': [-1]", "'pin_threads': ['a']", "'state_path': 3",
          "'cache_policy': []"}) {
        CHECK(!refusal(quoted(std::string("{") + pair + "}")).empty());
    }
}

void test_reproducible() {
    CHECK(!settings().reproducible);
    const settings given =
        parse("{'reproducible': true, 'state_path': 'a', 'cache_policy': 'lru', 'schedule': 'gpu-only',"
              " 'prefetch': 'path', 'admission': 'pays', 'costs': {'classes': []}, 'devices': ['CPU'],"
              " 'expert_cache': 5, 'n_cpu_layers': 2, 'trace': 9, 'pin_threads': [1], 'cpu_kernels': 'ggml'}");
    CHECK(given.reproducible);
    CHECK(given.state_path == "a" && given.cache_policy == "lru"); // parsing changes no other key
    CHECK(!parse_settings(quoted("{'reproducible': false}"), given).reproducible);
    for (const char * value : {"1", "0", "'true'", "'on'", "null", "[]", "{}"}) {
        CHECK(refusal(quoted(std::string("{'reproducible': ") + value + "}")) == "reproducible must be true or false");
    }

    const settings held = in_force(given);
    CHECK(held.reproducible && held.state_path.empty() && held.costs_json.empty() && held.simple);
    CHECK(held.cache_policy == "static" && held.schedule == "cpu-only" && held.prefetch == "none");
    CHECK(held.admission == "always" && !held.guard && !held.live_costs);
    CHECK(held.devices == given.devices && held.expert_cache.n_slots == 5 && held.n_cpu_layers == 2);
    CHECK(held.trace_bytes == 9 && held.pin_threads == given.pin_threads && held.kernels == cpu_kernels::ggml);

    const settings other = parse_settings(quoted("{'reproducible': false}"), given);
    const settings same  = in_force(other);
    CHECK(same.state_path == "a" && same.cache_policy == "lru" && same.schedule == "gpu-only");
    CHECK(same.prefetch == "path" && same.guard && same.live_costs && same.costs_json == other.costs_json);
}

void test_faults() {
    CHECK(settings().faults.free_bytes == -1 && settings().faults.fail_alloc_from == 0);
    const settings some = parse("{'faults': {'fail_copy_every': 3, 'stick_copy': 2, 'stick_us': 9, 'free_bytes': 0}}");
    CHECK(some.faults.fail_copy_every == 3 && some.faults.stick_us == 9 && some.faults.free_bytes == 0);
    CHECK(parse_settings(quoted("{'faults': {}}"), some).faults.fail_copy_every == 0); // not kept from before
    for (const char * value : {"3", "[]", "{'nonsense': 1}", "{'stick_us': -1}", "{'stick_us': 'x'}"}) {
        CHECK(contains(refusal(quoted(std::string("{'faults': ") + value + "}")), "faults"));
    }
}

void test_one_bad_key_changes_nothing() {
    settings before;
    before.cache_policy = "lfu";
    try {
        before = parse_settings(quoted("{'cache_policy': 'lru', 'guard': 3}"), before);
        CHECK(false);
    } catch (const std::invalid_argument &) {
        CHECK(before.cache_policy == "lfu");
    }
}

void test_current() {
    CHECK(current_settings().kernels == settings().kernels);
    settings ggml;
    ggml.kernels = cpu_kernels::ggml;
    set_current_settings(ggml);
    CHECK(current_settings().kernels == cpu_kernels::ggml);
    CHECK(parse_settings("{}", current_settings()).kernels == cpu_kernels::ggml);
}

} // namespace

int main(int argc, char ** argv) {
    const std::string test = argc > 1 ? argv[1] : "plain";
    if (test == "environment") {
        setenv("HYBRIMOE_CPU", "ggml", 1);
        CHECK(current_settings().kernels == cpu_kernels::ggml);
    } else if (test == "bad-environment") {
        setenv("HYBRIMOE_CPU", "abacus", 1);
        for (int again = 0; again < 2; again++) {
            std::string message;
            try {
                current_settings();
            } catch (const std::exception & error) {
                message = error.what();
            }
            CHECK(message.empty() && current_settings().kernels == settings().kernels); // said on stderr
        }
    } else {
        unsetenv("HYBRIMOE_CPU");
        test_valid();
        test_not_json();
        test_wrong_type();
        test_unknown();
        test_huge();
        test_expert_cache();
        test_devices();
        test_costs();
        test_numbers_and_flags();
        test_reproducible();
        test_faults();
        test_one_bad_key_changes_nothing();
        test_current();
    }
    return check::report();
}
