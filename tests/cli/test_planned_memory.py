"""The context and the warnings that `run` takes from the plan: one rule, one code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybrimoe.cli import loading
from hybrimoe.cli.flags import RUN_COMMAND_OPTIONS
from hybrimoe.config import Settings, Sources, resolve
from hybrimoe.gguf_model import GgufModel, inspect
from hybrimoe.machine import here
from hybrimoe.machine.describe import describe
from hybrimoe.planning import make_plan
from hybrimoe.planning.memory import Setting


@pytest.fixture
def lite(tmp_path: Path) -> GgufModel:
    """DeepSeek-V2-Lite's header: 163,840 tokens of context."""
    from make_header_model import PRESETS, write_header

    return inspect(write_header(tmp_path / "lite.gguf", PRESETS["deepseek-v2-lite"]), header_only=True)


def settings(**flags: Any) -> Settings:
    return resolve(RUN_COMMAND_OPTIONS, flags, Sources(environment={}))


def planned(
    model: GgufModel, machine: str, monkeypatch: pytest.MonkeyPatch, ram_bytes: int | None = None, **flags: Any
) -> int:
    """`n_ctx` of the options that `run` would load with on a machine."""
    described = describe(machine)
    if ram_bytes is not None:
        described = replace(described, ram_bytes=ram_bytes)
    monkeypatch.setattr(here, "this_machine", lambda *_: described)
    given = settings(**flags)
    return loading.with_planned_memory(loading.engine_options(given), given, model).n_ctx


CARD = "gpu=rtx3060,cpu=5600x,ram=ddr4-3200x2:64GiB,link=pcie4"


def test_run_takes_the_context_of_the_plan(
    lite: GgufModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    n_ctx = planned(lite, CARD, monkeypatch)
    made = make_plan(lite, Setting(), describe(CARD), advise=False)
    assert n_ctx == made.setting.n_ctx < lite.n_ctx_train
    assert capsys.readouterr().err == f"note: {made.context_reason}\n"


def test_what_was_asked_for_is_taken(lite: GgufModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned(lite, CARD, monkeypatch, ctx_size="2048") == 2048
    assert planned(lite, CARD, monkeypatch, ctx_size="0") == 0  # all that it was trained with


def test_a_model_larger_than_memory_says_how_fast_the_disk_is(
    lite: GgufModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = (lite.total_bytes * 2) // 3
    n_ctx = planned(lite, "cpu=5600x,ram=ddr4-3200x2:64GiB", monkeypatch, small)
    text = capsys.readouterr().err
    assert 8192 <= n_ctx < lite.n_ctx_train
    assert "warning: the model is larger than main memory: " in text and "tokens/s" in text
    planned(lite, "cpu=5600x,ram=ddr4-3200x2:64GiB", monkeypatch, small, ctx_size="4096")
    assert "come from the disk" in capsys.readouterr().err


def test_where_there_is_room_nothing_is_asked_or_said(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hybrimoe.planning.context.choose_context", None)
    model = inspect(tiny_model("mixtral"))
    assert planned(model, "cpu=5600x,ram=ddr4-3200x2:64GiB", monkeypatch) == 0
    assert capsys.readouterr().err == ""
