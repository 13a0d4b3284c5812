// Counters: sums, layers outside the range, readers beside the one writer, and what a pass counts as.
#include "check.h"
#include "counters.h"
#include "pass_meter.h"

#include <atomic>
#include <thread>
#include <vector>

using namespace hybrimoe;

namespace {

void test_sums() {
    counters data;
    CHECK(data.n_layers() == 0);
    layer_counters & layer = data.layer(5);
    add(layer.n_steps, 1);
    add(layer.n_tokens, 33);
    add(layer.n_blocks, 1);
    add(layer.n_blocks_delegated, 2);
    add(layer.n_experts_cpu, 8);
    add(layer.n_experts_gpu, 4);
    add(layer.router_ns, 1500);
    add(layer.experts_ns, 2000000);
    add(layer.merge_ns, 250);
    CHECK(data.n_layers() == 6);
    const layer_counts out = data.read(5);
    CHECK(out.n_steps == 1 && out.n_tokens == 33 && out.n_blocks == 1 && out.n_blocks_delegated == 2);
    CHECK(out.n_experts_cpu == 8 && out.n_experts_gpu == 4);
    CHECK(out.router_us == 1.5 && out.experts_us == 2000.0 && out.merge_us == 0.25);
    CHECK(data.read(4).n_steps == 0);
}

void test_layers_outside_the_range() {
    counters data;
    CHECK(&data.layer(max_counted_layers + 1000) == &data.layer(max_counted_layers - 1));
    CHECK(&data.layer(-3) == &data.layer(0));
    CHECK(data.n_layers() == max_counted_layers);
}

// Readers see counts that only grow; nothing of the one writer is lost.
void test_readers_beside_a_writer() {
    constexpr int n_rounds       = 20000;
    constexpr int n_layers       = 4;
    const instance_ticket ticket = register_instance();
    std::atomic<bool> done{false};

    std::vector<std::thread> readers;
    for (int i = 0; i < 3; i++) {
        readers.emplace_back([&] {
            uint64_t last = 0;
            while (!done.load()) {
                const auto seen = find_instance(ticket.id);
                CHECK(seen != nullptr);
                for (int layer = 0; layer < seen->n_layers(); layer++) {
                    (void)seen->read(layer);
                }
                const uint64_t now = seen->n_nodes_delegated.load();
                CHECK(now >= last);
                last = now;
            }
        });
    }
    // Others come and go meanwhile, as contexts of a server do.
    std::thread others([&] {
        while (!done.load()) {
            forget_instance(register_instance().id);
        }
    });
    for (int round = 0; round < n_rounds; round++) {
        for (int layer = 0; layer < n_layers; layer++) {
            add(ticket.data->layer(layer).n_steps, 1);
            add(ticket.data->layer(layer).experts_ns, 3);
        }
        add(ticket.data->n_nodes_delegated, 2);
    }
    done = true;
    for (std::thread & reader : readers) {
        reader.join();
    }
    others.join();
    for (int layer = 0; layer < n_layers; layer++) {
        CHECK(ticket.data->read(layer).n_steps == n_rounds);
        CHECK(ticket.data->read(layer).experts_us == 3.0 * n_rounds / 1000.0);
    }
    CHECK(ticket.data->n_nodes_delegated.load() == 2 * n_rounds);
    forget_instance(ticket.id);
    CHECK(find_instance(ticket.id) == nullptr);
}

// Steps of up to 16 rows are generation; time between two passes counts unless it is longer than the first of them.
void test_passes() {
    pass_counters counts;
    pass_meter meter;
    const auto run = [&](int64_t n_tokens, int ms) {
        for (const int layer : {0, 1}) {
            meter.begin_block(layer, n_tokens, counts);
            std::this_thread::sleep_for(std::chrono::milliseconds(ms));
            meter.end_block(counts);
        }
    };
    run(17, 10);
    run(1, 10);
    run(16, 10);
    CHECK(counts.n_passes == 3 && counts.n_prompt_tokens == 17 && counts.n_generated_tokens == 17);
    const uint64_t busy_ns = counts.generation_ns;
    CHECK(counts.prompt_ns >= 20000000 && busy_ns >= 40000000);
    std::this_thread::sleep_for(std::chrono::milliseconds(500));
    run(1, 1);
    CHECK(counts.generation_ns - busy_ns < 400000000);
}

} // namespace

int main() {
    test_sums();
    test_layers_outside_the_range();
    test_readers_beside_a_writer();
    test_passes();
    return check::report();
}
