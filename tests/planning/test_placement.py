"""Placements of plain llama.cpp: which layers they put where, what that takes, how fast it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from hybrimoe.dry_load import Buffers
from hybrimoe.errors import UsageError
from hybrimoe.gguf_model import GgufModel, inspect
from hybrimoe.machine.describe import describe
from hybrimoe.machine.machine import Machine
from hybrimoe.planning.memory import Setting, measure_needs, placed_memory
from hybrimoe.planning.placement import LayerPlacement, Request
from hybrimoe.planning.speed import SpeedModel
from hybrimoe.planning.ways import best_way, price, usual_ways
from hybrimoe.planning.work import ModelWork

Header = Callable[[str], Path]
SETTING = Setting(n_ctx=4096)
BIG = describe("gpu=rtx4090,cpu=7950x,ram=ddr5-6000x2:512GiB,link=pcie4")


@pytest.fixture(scope="module")
def qwen3(header: Header) -> tuple[GgufModel, ModelWork]:
    model = inspect(header("qwen3-30b-a3b"), header_only=True)
    return model, ModelWork(model, SETTING, measure_needs(model, SETTING).buffers)


@pytest.fixture(scope="module")
def lite(header: Header) -> ModelWork:
    """A dense layer first, latent attention."""
    model = inspect(header("deepseek-v2-lite"), header_only=True)
    return ModelWork(model, SETTING, measure_needs(model, SETTING).buffers)


def on_card(work: ModelWork, **request: object) -> tuple[int, int]:
    """Layers whose dense weights, and whose experts are on the card."""
    place = LayerPlacement.of(work, Request(**request))  # type: ignore[arg-type]
    experts = [e for e, layer in zip(place.experts, work.layers, strict=True) if layer.moe]
    return sum(place.dense), sum(experts)


def test_flags_place_layers_as_llama_cpp_does(qwen3: tuple[GgufModel, ModelWork]) -> None:
    work = qwen3[1]
    assert on_card(work) == (48, 48)
    assert on_card(work, cpu_moe=True) == (48, 0)
    assert on_card(work, n_cpu_moe=30) == (48, 18)
    assert on_card(work, n_cpu_moe=100) == (48, 0)
    assert on_card(work, n_gpu_layers=0) == (0, 0)
    # The output counts as one layer, and the last ones go first.
    assert on_card(work, n_gpu_layers=49) == (48, 48)
    assert on_card(work, n_gpu_layers=11) == (10, 10)
    place = LayerPlacement.of(work, Request(n_gpu_layers=11))
    assert place.dense[:38] == (False,) * 38 and place.output
    assert not LayerPlacement.of(work, Request(n_gpu_layers=0)).output


def test_overrides_come_first_and_the_first_that_matches_decides(qwen3: tuple[GgufModel, ModelWork]) -> None:
    work = qwen3[1]
    assert on_card(work, overrides=("exps=CPU",)) == (48, 0)
    assert on_card(work, overrides=(r"blk\.(\d|1\d)\.ffn_.*_exps.=CPU",)) == (48, 28)
    assert on_card(work, overrides=(r"blk\.4[0-7]\.ffn_.*_exps.=CUDA0,exps=CPU",)) == (48, 8)
    assert on_card(work, overrides=(r"blk\.4[0-7]\..*exps=CUDA0",), cpu_moe=True) == (48, 8)
    for bad in ("exps", "=CPU", "(=CPU"):
        with pytest.raises(UsageError, match="-ot"):
            LayerPlacement.of(work, Request(overrides=(bad,)))


def test_dense_layers_count_for_ncmoe(lite: ModelWork) -> None:
    assert on_card(lite, n_cpu_moe=1) == (27, 26)  # the first layer has no experts
    assert on_card(lite, n_cpu_moe=11) == (27, 16)


def test_a_placements_bytes_add_up(qwen3: tuple[GgufModel, ModelWork]) -> None:
    model, work = qwen3
    needs = measure_needs(model, SETTING)

    def memory(**request: object) -> tuple[int, int]:
        found = placed_memory(work, needs, BIG, LayerPlacement.of(work, Request(**request)))  # type: ignore[arg-type]
        return found.vram_need, found.ram_need

    layer = model.moe_layers[0].expert_bytes
    all_on, none_on = memory(), memory(cpu_moe=True)
    assert all_on[0] - none_on[0] == model.expert_bytes == none_on[1] - all_on[1]
    some = memory(n_cpu_moe=10)
    assert some[0] == all_on[0] - 10 * layer and some[1] == all_on[1] + 10 * layer
    nothing = memory(n_gpu_layers=0)
    assert nothing[0] == 0 and nothing[1] >= model.total_bytes + needs.kv_bytes


def test_more_on_the_card_is_faster(qwen3: tuple[GgufModel, ModelWork]) -> None:
    speed = SpeedModel(qwen3[1], BIG)
    decode, prefill = [], []
    for n in (48, 32, 16, 0):
        place = LayerPlacement.of(qwen3[1], Request(n_cpu_moe=n))
        decode.append(speed.stock_decode(place).per_s)
        prefill.append(speed.stock_prefill(place, 512).per_s)
    assert decode == sorted(decode) and prefill == sorted(prefill)
    none = LayerPlacement.of(qwen3[1], Request(n_gpu_layers=0))
    assert speed.stock_decode(none).per_s < decode[0]


def test_terms_of_a_hybrid_token(qwen3: tuple[GgufModel, ModelWork]) -> None:
    """20 layers of experts on the CPU: 20 handovers, 20 times top-8 there, the rest of the weights on the card."""
    from hybrimoe.machine import rates

    model, work = qwen3
    speed = SpeedModel(work, BIG, depth=1000).stock_decode(LayerPlacement.of(work, Request(n_cpu_moe=20)))
    terms = {term.name: term.us for term in speed.terms}
    assert terms["handover"] == pytest.approx(20 * rates.handover_us(BIG.cpu))
    expert = work.layers[0].expert
    assert expert is not None
    assert terms["CPU experts"] == pytest.approx(20 * 8 * rates.cpu_expert_us(expert, 1, BIG.cpu, BIG.ram))
    dense = sum(layer.dense.n_bytes for layer in work.layers) + work.output.n_bytes
    card = dense + 28 * 8 * model.moe_layers[0].bytes_per_expert
    assert terms["card weights"] == pytest.approx(card / rates.card_bytes_per_us(BIG.cards[0]))
    # K and V of 1,000 tokens: 48 layers x 4 heads x 128 x 2 x 2 bytes
    kv = 1000 * 48 * 4 * 128 * 2 * 2
    assert terms["KV cache"] == pytest.approx(kv / rates.card_bytes_per_us(BIG.cards[0]), rel=0.01)
    assert sum(terms.values()) == pytest.approx(1e6 / speed.per_s)


def test_depth_makes_tokens_slower(qwen3: tuple[GgufModel, ModelWork]) -> None:
    place = LayerPlacement.of(qwen3[1], Request())
    shallow, deep = SpeedModel(qwen3[1], BIG, 0), SpeedModel(qwen3[1], BIG, 30000)
    assert deep.stock_decode(place).per_s < 0.7 * shallow.stock_decode(place).per_s
    assert deep.stock_prefill(place, 512).per_s < 0.8 * shallow.stock_prefill(place, 512).per_s


def test_a_sliding_window_bounds_what_a_token_reads(header: Header) -> None:
    model = inspect(header("gpt-oss-120b"), header_only=True)
    setting = Setting(n_ctx=32768)
    work = ModelWork(model, setting, measure_needs(model, setting).buffers)
    row = 36 * 8 * 64 * 2 * 2  # every second layer sees 128 tokens
    assert work.kv_read_bytes(20000) == pytest.approx(row * (0.5 * 20000 + 0.5 * 128), rel=0.01)
    assert work.kv_read_bytes(100) == pytest.approx(row * 100, rel=0.01)


def test_a_prompt_in_several_batches_copies_several_times(qwen3: tuple[GgufModel, ModelWork]) -> None:
    place = LayerPlacement.of(qwen3[1], Request(cpu_moe=True))
    speed = SpeedModel(qwen3[1], BIG)

    def copies(n_prompt: int) -> float:
        return next(term.us for term in speed.stock_prefill(place, n_prompt).terms if term.name == "copies")

    assert copies(1024) == pytest.approx(2 * copies(512))
    assert copies(512) < copies(544) < copies(1024)
    # Below 32 tokens the CPU computes and nothing is copied.
    assert all(term.name != "copies" for term in speed.stock_prefill(place, 31).terms)


def test_unequal_cards_compute_in_turn(qwen3: tuple[GgufModel, ModelWork]) -> None:
    fast = replace(BIG, cards=BIG.cards * 2)
    slow = describe("gpu=2*rtx3060,cpu=7950x,ram=ddr5-6000x2:512GiB,link=pcie4")
    mixed = describe("gpu=rtx4090:12GiB+rtx3060,cpu=7950x,ram=ddr5-6000x2:512GiB,link=pcie4")
    place = LayerPlacement.of(qwen3[1], Request())
    speeds = [SpeedModel(qwen3[1], machine).stock_decode(place).per_s for machine in (slow, mixed, fast)]
    assert speeds == sorted(speeds)
    times = [1 / speed for speed in speeds]
    assert times[1] == pytest.approx((times[0] + times[2]) / 2)


@cache
def ways_on(text: str, path: Path) -> list[str]:
    model = inspect(path, header_only=True)
    needs = measure_needs(model, SETTING)
    work = ModelWork(model, SETTING, needs.buffers)
    return [way.flags for way in usual_ways(SpeedModel(work, describe(text)), needs, 512)]


def test_the_usual_ways(header: Header) -> None:
    path = header("qwen3-30b-a3b")
    small, large = ways_on("gpu=rtx3060,cpu=5600x", path), ways_on("gpu=a6000,cpu=5600x", path)
    assert [flags.split()[0] for flags in small] == ["-ngl", "-ncmoe", "-cmoe"]
    assert large == ["-ngl 49"]
    assert ways_on("cpu=5600x", path) == ["-ngl 0"]


def test_the_best_way_fits_and_is_the_fastest(qwen3: tuple[GgufModel, ModelWork]) -> None:
    model, work = qwen3
    machine: Machine = describe("gpu=rtx3060,cpu=5600x,ram=ddr4-3200x2:64GiB,link=pcie4")
    needs = measure_needs(model, SETTING)
    speed = SpeedModel(work, machine)
    ways = list(usual_ways(speed, needs, 512))
    best = best_way(ways)
    assert best is not None and best.flags.startswith("-ncmoe")
    assert all(best.decode.per_s >= way.decode.per_s for way in ways if way.fits)
    # One layer fewer on the CPU would not fit.
    fewer = price(speed, needs, Request(n_cpu_moe=best.request.n_cpu_moe - 1), 512)
    assert best.fits and not fewer.memory.fits_vram
    assert best_way([fewer]) is None


def test_without_a_graph_nodes_are_estimated(qwen3: tuple[GgufModel, ModelWork], lite: ModelWork) -> None:
    model, work = qwen3
    bare = ModelWork(model, SETTING, Buffers(0, 0, 0))
    assert bare.n_nodes == pytest.approx(work.n_nodes, rel=0.3)
    assert {layer.kind for layer in work.layers} == {"attention"}
    assert {layer.kind for layer in lite.layers} == {"latent"}
