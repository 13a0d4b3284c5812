"""The context that nobody asked for, and the one memory rule behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hybrimoe.gguf_model import GgufModel, inspect
from hybrimoe.machine.describe import describe
from hybrimoe.planning import Asked, Setting, make_plan
from hybrimoe.planning.context import choose_context, needs_no_choice
from hybrimoe.planning.speed import SpeedModel
from hybrimoe.planning.work import ModelWork

Header = Callable[[str], Path]
CARD = describe("gpu=rtx3060,cpu=5600x,ram=ddr4-3200x2:64GiB,link=pcie4")


@pytest.fixture(scope="module")
def lite(header: Header) -> GgufModel:
    """Latent attention: 163,840 tokens are 4.8 GiB of cache."""
    return inspect(header("deepseek-v2-lite"), header_only=True)


@pytest.fixture(scope="module")
def mixtral(header: Header) -> GgufModel:
    return inspect(header("mixtral-8x7b"), header_only=True)


def test_it_costs_at_most_a_twentieth_of_decode(lite: GgufModel) -> None:
    choice = choose_context(lite, Setting(), CARD)
    n_ctx = choice.setting.n_ctx
    assert 8192 <= n_ctx < lite.n_ctx_train
    assert f"context {n_ctx} of {lite.n_ctx_train} tokens" in choice.reason and "-c sets it" in choice.reason

    def decode(n: int) -> float:
        at = make_plan(lite, Setting(n_ctx=n), CARD, advise=False)
        return SpeedModel(ModelWork(lite, at.setting, at.needs.buffers), CARD).decode(at.memory.n_slots).per_s

    assert decode(n_ctx) >= 0.949 * decode(8192)
    assert decode(2 * n_ctx) < 0.951 * decode(8192)


def test_a_card_with_room_takes_all(lite: GgufModel) -> None:
    large = describe("gpu=a100-80gb,cpu=5600x,ram=ddr4-3200x2:64GiB")
    choice = choose_context(lite, Setting(), large)
    assert choice.setting.n_ctx == lite.n_ctx_train and "all that it was trained with" in choice.reason


def test_main_memory_bounds_it_without_a_card(mixtral: GgufModel) -> None:
    """32,768 tokens are 4 GiB of cache beside 24.6 GiB of weights."""
    machine = describe("cpu=5600x,ram=ddr4-3200x2:64GiB")
    assert choose_context(mixtral, Setting(), machine).setting.n_ctx == 32768
    small = replace(machine, ram_bytes=30 << 30)
    tight = choose_context(mixtral, Setting(), small)
    assert 8192 <= tight.setting.n_ctx < 32768 and "no room in main memory" in tight.reason
    assert tight.memory.missing == 0
    # Quantised, more of it fits.
    quantised = Setting(cache_type_k="q8_0", cache_type_v="q8_0")
    assert choose_context(mixtral, quantised, small).setting.n_ctx > tight.setting.n_ctx


def test_slots_share_it(lite: GgufModel) -> None:
    one, four = choose_context(lite, Setting(), CARD), choose_context(lite, Setting(), CARD, n_parallel=4)
    assert four.setting.n_ctx >= one.setting.n_ctx and four.setting.n_ctx >= 4 * 8192
    assert f"{four.setting.n_ctx // 4} for each of 4 slots" in four.reason


def test_a_card_that_is_too_small_gets_less(mixtral: GgufModel) -> None:
    machine = replace(CARD, cards=(replace(CARD.cards[0], memory_bytes=2900 << 20),))
    choice = choose_context(mixtral, Setting(), machine)
    assert 512 <= choice.setting.n_ctx < 8192 and choice.memory.runs
    assert "no more" in choice.reason


def test_plan_takes_it_where_no_context_is_given(lite: GgufModel) -> None:
    made = make_plan(lite, Setting(), CARD, Asked(n_parallel=2), advise=False)
    assert made.setting == choose_context(lite, Setting(), CARD, 2).setting
    assert made.context_reason and made.to_dict()["setting"]["context_reason"] == made.context_reason
    assert made.flags[:2] == ["-c", str(made.setting.n_ctx)]
    given = make_plan(lite, Setting(n_ctx=1000), CARD, advise=False)
    assert given.setting.n_ctx == 1024 and given.context_reason == ""


def test_nothing_is_asked_where_all_fits_twice(lite: GgufModel) -> None:
    machine = describe("cpu=5600x,ram=ddr4-3200x2:64GiB")
    assert needs_no_choice(lite, Setting(), machine)
    assert not needs_no_choice(lite, Setting(), replace(machine, ram_bytes=16 << 30))
    assert not needs_no_choice(lite, Setting(), CARD)
