"""Each term of the speed model against a case computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hybrimoe.machine import rates
from hybrimoe.machine.constants import CONSTANTS
from hybrimoe.machine.describe import describe
from hybrimoe.machine.parts import Card, Cpu, Link, Ram
from hybrimoe.machine.rates import ExpertShape

# Easy numbers: all constants that a case divides by are 1, a half or a power of ten.
K = replace(
    CONSTANTS, streaming_share=0.5, node_us=1.0, handover_us=50.0, matrix_share=0.25, half_tokens=30.0,
    activation_moves=2.0, launch_us=1.0, card_bandwidth_share=0.5, dram_share=0.8, server_dram_share=0.7,
    second_socket=0.2, pageable_passes=3.0, popularity_shape=0.5, attention_share=0.5, knee=2.0, cpu_node_us=0.5,
    barrier_us=0.1,
)  # fmt: skip
# Zen 3, so that a core's speed is its clock.
CPU = Cpu("a cpu", "zen3", n_cores=8, n_efficiency_cores=0, ghz=3.4)
RAM = Ram("ddr4", 3125, 2, 64 << 30)  # 50 GB/s at most
CARD = Card("a card", "ampere", 8 << 30, 400e9, 10e12)  # INT8 8 x FP32: 40e6 multiplications a microsecond


def test_main_memory_gives_a_share_of_its_peak() -> None:
    assert RAM.peak_bytes_per_s == 50e9
    assert rates.dram_bytes_per_us(CPU, RAM, K) == pytest.approx(40_000)  # 0.8 of 50 GB/s
    eight = replace(RAM, n_channels=8)
    assert rates.dram_bytes_per_us(CPU, eight, K) == pytest.approx(140_000)  # 0.7 of 200
    measured = replace(RAM, measured_bytes_per_s=44e9)
    assert rates.dram_bytes_per_us(CPU, measured, K) == pytest.approx(44_000)


def test_one_chiplet_reads_no_more_than_its_fabric_carries() -> None:
    fast = replace(RAM, kind="ddr5", mts=6250)  # 100 GB/s, 80 reached
    one = replace(CPU, family="zen4", n_cores=8)
    assert rates.dram_bytes_per_us(one, fast, K) == pytest.approx(64_000)
    assert rates.dram_bytes_per_us(replace(one, n_cores=12), fast, K) == pytest.approx(80_000)


def test_a_second_socket_adds_little() -> None:
    sixteen = replace(RAM, n_channels=16)  # 400 GB/s of both, 280 reached: 140 of each
    assert rates.dram_bytes_per_us(replace(CPU, n_sockets=2), sixteen, K) == pytest.approx(140_000 * 1.2)


def test_dot_products_have_a_cost_by_row_and_by_weight() -> None:
    assert rates.dot_ns("Q4_K", 2048, 100) == pytest.approx(100 * (2048 * 0.030 + 15))
    # Short rows pay more for the same weights, low-bit types more than their size suggests.
    assert rates.dot_ns("Q4_K", 512, 400) > rates.dot_ns("Q4_K", 2048, 100)
    assert rates.dot_ns("IQ2_S", 2048, 1) > 2 * rates.dot_ns("Q4_K", 2048, 1)
    assert rates.dot_ns("a type of tomorrow", 2048, 1) > 0


def test_a_cpu_product_is_bound_by_memory_and_by_arithmetic() -> None:
    # 400 kB at 40 GB/s: 10 us. 96,000 ns on one core at 3.4 GHz are 12 us on eight, twice that while streaming.
    assert CPU.speed == pytest.approx(8 * 3.4)
    assert rates.cpu_us(400_000, 96_000, 1, CPU, RAM, K) == pytest.approx((10**2 + 24**2) ** 0.5)
    # Ten tokens: 2 x 12 for the first, 9 x 12 for those that find the weights in the cache.
    assert rates.cpu_us(400_000, 96_000, 10, CPU, RAM, K) == pytest.approx((10**2 + 132**2) ** 0.5)


def test_measured_arithmetic_is_a_roofline() -> None:
    measured = replace(CPU, measured_macs_per_us=1e6)
    shape = ExpertShape(400_000, 2e6, 0.0)
    assert rates.cpu_expert_us(shape, 1, measured, RAM, K) == pytest.approx(10)
    assert rates.cpu_expert_us(shape, 8, measured, RAM, K) == pytest.approx(16)


def test_nodes_on_a_cpu_end_with_a_barrier_of_all_threads() -> None:
    assert rates.cpu_nodes_us(10, CPU, K) == pytest.approx(10 * (0.5 + 8 * 0.1))
    many = replace(CPU, n_cores=96)
    assert rates.cpu_nodes_us(10, many, K) > 5 * rates.cpu_nodes_us(10, CPU, K)


def test_a_handover_is_quicker_with_faster_cores() -> None:
    assert rates.handover_us(CPU, K) == pytest.approx(50 * 4.95 / 3.4)
    assert rates.handover_us(replace(CPU, ghz=4.95), K) == pytest.approx(50)


def test_a_card_reads_a_share_of_its_bandwidth() -> None:
    assert rates.card_bytes_per_us(CARD, K) == pytest.approx(200_000)
    assert rates.card_bytes_per_us(replace(CARD, measured_bytes_per_s=300e9), K) == pytest.approx(300_000)


def test_kernels_are_launched_one_by_one_where_no_graph_holds_them() -> None:
    launch = 4.95 / 3.4
    assert rates.card_nodes_us(100, CARD, CPU, split=False, k=K) == pytest.approx(100)
    assert rates.card_nodes_us(100, CARD, CPU, split=True, k=K) == pytest.approx(100 * (1 + launch))
    for architecture in ("turing", "rdna4"):
        old = replace(CARD, architecture=architecture)
        assert rates.card_nodes_us(100, old, CPU, split=False, k=K) == pytest.approx(100 * (1 + launch))


def test_a_cards_products_are_better_when_they_are_larger() -> None:
    assert CARD.int8_macs_per_us == pytest.approx(40e6)
    # A quarter of 40e6: 10e6 a microsecond. 30 tokens reach half of it: 30 x 1e6 in 6 us.
    assert rates.card_products_us(1e6, 30, CARD, K) == pytest.approx(6)
    assert rates.card_dense_products_us(1e6, 30, CARD, K) == pytest.approx(3)


def test_an_expert_on_a_card_reads_its_weights_once() -> None:
    shape = ExpertShape(200_000, 1e6, 0.0)
    assert rates.card_expert_us(shape, 1, CARD, K) == pytest.approx(1)
    # Two tokens: another matrix-vector product is cheaper than a matrix product that is far from full.
    assert rates.card_expert_us(shape, 2, CARD, K) == pytest.approx(2)
    assert rates.card_expert_us(shape, 170, CARD, K) == pytest.approx(1 + 20)


def test_attention_runs_at_the_cards_fp16_rate() -> None:
    assert CARD.fp16_macs_per_us == pytest.approx(10e6)
    assert rates.card_attention_us(50e6, CARD, K) == pytest.approx(10)
    workstation = replace(CARD, architecture="ampere-pro")  # sums in FP32 at full rate
    assert rates.card_attention_us(50e6, workstation, K) == pytest.approx(5)


def test_activations_are_read_and_written() -> None:
    # 10 nodes x 2 moves x 512 tokens x 2,048 floats of 4 bytes at 200 GB/s
    assert rates.card_activations_us(10, 512, 2048, CARD, K) == pytest.approx(10 * 2 * 512 * 2048 * 4 / 200_000)


def test_a_link_is_slower_from_pageable_memory() -> None:
    link = Link(4, 16)
    assert rates.link_bytes_per_us(link, CPU, RAM, pinned=True, k=K) == pytest.approx(25_000)
    assert rates.link_bytes_per_us(link, CPU, RAM, pinned=False, k=K) == pytest.approx(40_000 / 3)
    narrow = Link(3, 4)
    assert rates.link_bytes_per_us(narrow, CPU, RAM, pinned=False, k=K) == pytest.approx(2_750)
    measured = Link(4, 16, 14.5e9)
    assert rates.link_bytes_per_us(measured, CPU, RAM, pinned=False, k=K) == pytest.approx(14_500)


def test_a_prompt_asks_for_a_share_of_the_experts() -> None:
    # 128 tokens x 8 of 256: each expert 4 times on average, s = 0.5: 1 - (1 + 8)^-0.5
    assert rates.active_share(128, 8, 256, K) == pytest.approx(1 - 1 / 3)
    # One token asks for its top-k, whatever the skew; never more than all.
    assert rates.active_share(1, 8, 256, K) >= 8 / 256
    assert rates.active_share(1e9, 8, 8, K) <= 1


def test_the_shape_of_popularity_fits_real_routing() -> None:
    """Shares of experts measured in 128 tokens of one text: Qwen3-30B 0.588 (top-6 of 128), gpt-oss 0.482 (top-2)."""
    assert rates.active_share(128, 6, 128) == pytest.approx(0.588, abs=0.06)
    assert rates.active_share(128, 2, 128) == pytest.approx(0.482, abs=0.06)


def test_a_cost_table_has_these_terms() -> None:
    machine = describe("gpu=2*rtx3060,cpu=5600x,ram=ddr4-3200x2:64GiB,link=pcie4")
    shapes = [ExpertShape.of_bytes(2e6)] * 2 + [ExpertShape.of_bytes(4e6)]
    table = machine.price(shapes)
    assert table.layer_class == (0, 0, 1) and len(table.devices) == 2
    one = table.classes[0]
    assert one.cpu[0] == (1.0, pytest.approx(rates.cpu_expert_us(shapes[0], 1, machine.cpu, machine.ram)))
    assert one.gpu[0][0] == (1.0, pytest.approx(2e6 / 360e3 / CONSTANTS.card_bandwidth_share))
    assert table.cpu_step_us == pytest.approx(rates.handover_us(machine.cpu))
    assert table.devices[0].bytes_per_us == pytest.approx(51.2e3 * CONSTANTS.dram_share / 3)
    assert describe("cpu=5600x").price(shapes).devices == ()
    assert type(table).from_json(table.to_json()) == table


def test_twice_as_many_bytes_take_longer() -> None:
    machine = describe("gpu=rtx3060,cpu=5600x,ram=ddr4-3200x2:64GiB")
    table = machine.price([ExpertShape.of_bytes(2e6), ExpertShape.of_bytes(4e6)])
    for device in (None, 0):
        assert table.one_token_us(1, device) == pytest.approx(2 * table.one_token_us(0, device), rel=0.01)
    points = table.classes[0].cpu
    assert points[-1][1] > 10 * points[0][1]  # and tokens in the end
