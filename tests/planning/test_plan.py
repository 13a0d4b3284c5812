"""Plans of well-known models on machines of all sizes, from their headers alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hybrimoe.gguf_model import GgufModel, inspect
from hybrimoe.machine.describe import describe
from hybrimoe.machine.machine import Machine
from hybrimoe.planning import ModelPlan, Setting, make_plan

# Megabytes per expert of the usual 4-bit file, as published shapes give them: (MoE layers, experts, top-k, MB).
SHAPES = {
    "mixtral-8x7b": (32, 8, 2, 99.0),
    "qwen3-30b-a3b": (48, 128, 8, 2.7),
    "gpt-oss-120b": (36, 128, 4, 13.2),
    "deepseek-v3": (58, 256, 8, 24.8),
}
CARDS = {
    8: "rtx3060-pcie4-ddr4:vram=8GiB",
    12: "rtx3060-pcie4-ddr4",
    16: "rtx4090-pcie4-ddr5:vram=16GiB",
    24: "rtx4090-pcie4-ddr5",
}
Header = Callable[[str], Path]


def model_of(header: Header, name: str) -> GgufModel:
    return inspect(header(name), header_only=True)


def machine_of(vram_gib: int, ram_gib: int = 512) -> Machine:
    """A machine with that card, and memory for anything."""
    return replace(describe(CARDS[vram_gib]), ram_bytes=ram_gib << 30)


def with_cards(machine: Machine, *sizes: int) -> Machine:
    """With cards like its first, of these bytes."""
    return replace(machine, cards=tuple(replace(machine.cards[0], memory_bytes=size) for size in sizes))


def plan_of(header: Header, name: str, vram_gib: int, n_ctx: int = 8192) -> ModelPlan:
    return make_plan(model_of(header, name), Setting(n_ctx=n_ctx), machine_of(vram_gib))


@pytest.mark.parametrize("name", SHAPES)
def test_headers_give_the_published_expert_bytes(header: Header, name: str) -> None:
    n_layers, n_experts, top_k, megabytes = SHAPES[name]
    model = model_of(header, name)
    layers = model.moe_layers
    assert (len(layers), model.n_experts, model.n_experts_used) == (n_layers, n_experts, top_k)
    (each,) = {layer.bytes_per_expert for layer in layers}
    assert each == pytest.approx(megabytes * 1e6, rel=0.03)
    assert model.expert_bytes == pytest.approx(n_layers * n_experts * megabytes * 1e6, rel=0.03)


@pytest.mark.parametrize("vram_gib", CARDS)
@pytest.mark.parametrize("name", SHAPES)
def test_what_is_placed_adds_up(header: Header, name: str, vram_gib: int) -> None:
    made = plan_of(header, name, vram_gib)
    memory, needs = made.memory, made.needs
    assert made.header_only
    assert needs.exact, needs.source
    assert needs.weight_bytes == made.model.total_bytes
    each = [layer.bytes_per_expert for layer in made.model.moe_layers]
    assert memory.cache_bytes == sum(n * size for n, size in zip(memory.n_slots, each, strict=True))
    fixed = needs.dense_bytes + needs.kv_bytes + needs.compute_bytes + memory.margin_bytes
    assert memory.vram_need == fixed
    assert memory.fits_vram == (fixed <= vram_gib << 30)
    if memory.fits_vram:
        assert fixed + memory.cache_bytes <= vram_gib << 30
        # One more expert would not fit, unless all are there already.
        full = memory.n_slots == tuple(layer.n_experts for layer in made.model.moe_layers)
        assert full or fixed + memory.cache_bytes + max(each) > vram_gib << 30


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-120b"])
def test_a_larger_card_is_never_slower(header: Header, name: str) -> None:
    model = model_of(header, name)
    speeds = []
    for vram_gib in (8, 12, 16, 24):
        machine = with_cards(machine_of(24), vram_gib << 30)
        made = make_plan(model, Setting(n_ctx=4096), machine)
        assert made.ours is not None and made.stock is not None
        for speed in (*made.ours, *made.stock):
            assert 0 < speed.low <= speed.per_s <= speed.high
        # Where a card holds everything, plain llama.cpp submits a token as one graph; the plan says that it is faster.
        resident = set(made.memory.n_slots) == {model.n_experts}
        assert made.plain_is_faster == resident
        assert resident or made.ours[1].per_s >= made.stock[1].per_s * 0.99
        speeds.append(made.ours[1].per_s)
    assert speeds == sorted(speeds)


def test_without_a_card_decode_is_bound_by_memory(header: Header) -> None:
    """One token reads its experts once: no plan may be faster than memory, nor far slower."""
    machine = describe("cpu=16-core,ghz=5,ram=ddr5-5600x2:64GiB")
    made = make_plan(model_of(header, "qwen3-30b-a3b"), Setting(n_ctx=4096), machine)
    assert made.ours is not None and made.stock is not None
    active = 48 * 8 * made.model.moe_layers[0].bytes_per_expert + made.needs.dense_bytes
    bound = 0.8 * machine.ram.peak_bytes_per_s / active
    assert 0.5 * bound <= made.ours[1].per_s <= bound
    assert made.ours[1].per_s == pytest.approx(made.stock[1].per_s, rel=0.02)
    changes = {advice.change: advice.gain for advice in made.advice}
    assert 1.2 < changes["twice the RAM channels"] <= 2.0


def test_the_nearest_context_fits(header: Header) -> None:
    model = model_of(header, "mixtral-8x7b")
    machine = machine_of(8)
    made = make_plan(model, Setting(n_ctx=32768), with_cards(machine, 5 << 30))
    assert not made.memory.fits and made.ours is None
    flag, n_ctx = made.memory.nearest.split()
    assert flag == "-c"
    near = make_plan(model, Setting(n_ctx=int(n_ctx)), with_cards(machine, 5 << 30))
    assert near.memory.fits
    more = make_plan(model, Setting(n_ctx=int(n_ctx) + 2048), with_cards(machine, 5 << 30))
    assert not more.memory.fits


def test_too_little_memory_asks_for_a_smaller_quantisation(header: Header) -> None:
    machine = describe("cpu-only-ddr5")
    made = make_plan(model_of(header, "qwen3-30b-a3b"), Setting(n_ctx=4096), replace(machine, ram_bytes=14 << 30))
    assert not made.memory.fits
    assert "of main memory are needed" in made.memory.reason
    assert made.memory.nearest.startswith("experts in Q3_K")
    hopeless = make_plan(model_of(header, "deepseek-v3"), Setting(n_ctx=4096), machine)
    assert "GiB more main memory" in hopeless.memory.nearest


def test_experts_that_are_all_on_the_card_need_no_memory(header: Header) -> None:
    machine = replace(with_cards(machine_of(24), 48 << 30), ram_bytes=4 << 30)
    made = make_plan(model_of(header, "qwen3-30b-a3b"), Setting(n_ctx=4096), machine)
    assert made.memory.fits
    assert set(made.memory.n_slots) == {128}
    assert made.ours is not None and made.ours[1].limit == "GPU"


def test_two_cards_are_filled_together(header: Header) -> None:
    one = plan_of(header, "gpt-oss-120b", 24)
    two = make_plan(one.model, one.setting, with_cards(one.machine, 24 << 30, 24 << 30))
    assert two.memory.margin_bytes == 2 * one.memory.margin_bytes
    assert sum(two.memory.n_slots) > 2 * sum(one.memory.n_slots)


def test_smaller_kv_types_take_less(header: Header) -> None:
    model = model_of(header, "qwen3-30b-a3b")
    full = make_plan(model, Setting(n_ctx=8192), machine_of(12))
    small = make_plan(model, Setting(n_ctx=8192, cache_type_k="q8_0", cache_type_v="q8_0"), machine_of(12))
    assert small.needs.kv_bytes == pytest.approx(full.needs.kv_bytes * 34 / 64, rel=1e-3)
    assert small.flags[-6:-2] != full.flags[-6:-2] and "-ctk" in small.flags


def test_what_does_not_fit_into_memory_runs_from_the_disk(header: Header) -> None:
    """Two of three experts find no room: a token waits for the disk, and every plan says so."""
    whole = describe("cpu-only-ddr5")
    model = model_of(header, "qwen3-30b-a3b")
    full = make_plan(model, Setting(n_ctx=4096), whole)
    made = make_plan(model, Setting(n_ctx=4096), replace(whole, ram_bytes=8 << 30))
    assert not made.memory.fits and made.memory.runs and 0.4 < made.memory.missing < 0.8
    assert full.ours is not None and made.ours is not None and made.stock is not None
    assert made.ours[1].limit == "disk" and made.ours[1].per_s < full.ours[1].per_s / 3
    missing_bytes = made.memory.missing * 48 * 8 * model.moe_layers[0].bytes_per_expert
    term = next(term.us for term in made.ours[1].terms if term.name == "disk")
    assert term == pytest.approx(missing_bytes / whole.disk_rate)
    hopeless = make_plan(model, Setting(n_ctx=4096), replace(whole, ram_bytes=1 << 30))
    assert not hopeless.memory.runs and hopeless.ours is None


def test_a_machine_that_nobody_probed_is_estimated(header: Header) -> None:
    from hybrimoe.machine.here import this_machine

    made = make_plan(model_of(header, "qwen3-30b-a3b"), Setting(n_ctx=4096), replace(this_machine(), ram_bytes=1 << 40))
    assert made.ours is not None and not made.machine.is_measured
    assert "ram" in made.machine.assumed
    assert made.ours[1].high / made.ours[1].low > 1.5
    assert made.ours[1].widest and made.ours[1].narrows
