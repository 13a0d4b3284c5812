"""Snapshots of real engines, and chats that are watched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

COMMAND = [sys.executable, "-m", "hybrimoe.cli.main"]
DEADLINE_S = 90


def make_engine(model: Path, **options: Any) -> Any:
    from hybrimoe.engine import Engine, EngineOptions

    return Engine(model, EngineOptions(n_ctx=512, n_threads=1, **options))


def answer(engine: Any, n: int, text: str = "hello") -> list[int]:
    done = engine.answer(engine.text_prompt(text), n_predict=n)
    for _ in done:
        pass
    return list(done.prompt) + list(done.tokens)


def test_a_snapshot_counts_what_was_done(tiny_model: Callable[..., Path]) -> None:
    from hybrimoe.live.snapshot import LiveSampler

    with make_engine(tiny_model("mixtral"), heat=True) as engine:
        sampler = LiveSampler(engine, "chat")
        first = sampler.snapshot()
        assert first["phase"] == "idle" and first["rates"] is None and first["totals"]["prompt_tokens"] == 0
        answer(engine, 20)
        time.sleep(0.6)
        second = sampler.snapshot()
        assert second["totals"]["prompt_tokens"] > 0 and second["totals"]["generated_tokens"] > 0
        assert second["rates"]["generation_per_s"] > 0 and 0 < second["rates"]["busy"]["cpu"] <= 1
        heat = second["experts"]["heat"]
        assert len(heat) == len(engine.info.moe_layers) and all(sum(row) == pytest.approx(1, abs=0.01) for row in heat)
        json.dumps(second, allow_nan=False)


def test_heat_is_what_the_router_chose(tiny_model: Callable[..., Path]) -> None:
    import numpy as np

    from hybrimoe.live.heat import ExpertHeat

    class Ring:
        """A recording of two steps in layer 1 of two: experts 3 and 5 in each, of 8."""

        def describe(self) -> dict[str, Any]:
            return {"layers": [0, 1]}

        def read(self) -> list[Any]:
            from hybrimoe.native.trace_ring import _EVENT, Pass
            from hybrimoe.trace.events import EventType

            events = np.zeros(1, np.dtype(_EVENT))
            events["type"], events["layer"], events["n_rows"] = EventType.LAYER, 1, 2
            empty = np.zeros(0, np.float32)
            ids = np.array([3, 5, 3, 5], np.int32)
            return [Pass(0, events, ids, empty, empty, empty, np.zeros(4, np.int8), b"")]

    with make_engine(tiny_model("mixtral")) as engine:
        heat = ExpertHeat(engine.info, Ring())  # type: ignore[arg-type]
        assert heat.matrix() == [[0.0] * 8, [0, 0, 0, 0.5, 0, 0.5, 0, 0]]


def test_counters_that_are_reset_do_not_go_back(tiny_model: Callable[..., Path]) -> None:
    from hybrimoe.live.snapshot import LiveSampler

    with make_engine(tiny_model("mixtral")) as engine:
        sampler = LiveSampler(engine, "chat")
        seen = []
        for _ in range(3):
            engine.reset_counters()
            answer(engine, 4)
            time.sleep(0.25)  # snapshots within that time are the same one
            seen.append(sampler.snapshot()["totals"]["experts_cpu"])
        assert seen[0] > 0 and seen == sorted(set(seen))


def test_an_accelerator_shows_with_slots_and_residency(tiny_model: Callable[..., Path]) -> None:
    from hybrimoe.expert_options import CacheSize, ExpertOptions
    from hybrimoe.live.snapshot import LiveSampler

    experts = ExpertOptions(devices=("CPU",), cache=CacheSize(n_slots=2), guard=False)
    with make_engine(tiny_model("mixtral"), experts=experts, heat=True) as engine:
        answer(engine, 20)
        found = LiveSampler(engine, "chat").snapshot()
        (device,) = found["devices"]
        assert device["n_slots"] == 2 * len(found["experts"]["layers"])
        assert all(sum(on >= 0 for on in row) <= 2 for row in found["experts"]["on"])
        assert found["totals"]["hits"] + found["totals"]["misses"] > 0 and found["guard"]["on"] is False


def test_heat_changes_no_answer(tiny_model: Callable[..., Path]) -> None:
    from hybrimoe.generation import Sampling

    found = []
    for heat in (False, True):
        with make_engine(tiny_model("mixtral"), heat=heat) as engine:
            done = engine.answer(engine.text_prompt("hello"), Sampling(temp=0), 16)
            list(done)
            found.append(list(done.tokens))
    assert found[0] == found[1]


def test_a_chat_can_be_watched(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folders = {f"XDG_{name}": str(tmp_path / name.lower()) for name in ("CONFIG_HOME", "STATE_HOME", "CACHE_HOME")}
    environment = {**os.environ, **folders, "XDG_RUNTIME_DIR": str(tmp_path / "run"), "OMP_WAIT_POLICY": "passive"}
    (tmp_path / "run").mkdir(mode=0o700)
    chat = subprocess.Popen(
        [*COMMAND, "chat", str(tiny_model("mixtral")), "-c", "512", "-n", "8"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        assert chat.stdin is not None and chat.stderr is not None
        chat.stdin.write("hello\n")
        chat.stdin.flush()
        while "t/s" not in chat.stderr.readline():
            pass
        command = [*COMMAND, "top", "--once", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=DEADLINE_S)
        found = json.loads(done.stdout)
        assert found["pid"] == chat.pid and found["command"] == "chat" and found["totals"]["prompt_tokens"] > 0
        command = [*COMMAND, "top", str(chat.pid), "--once"]
        narrow = {**environment, "COLUMNS": "20", "NO_COLOR": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=narrow, timeout=DEADLINE_S)
        assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= 20
    finally:
        chat.communicate(timeout=DEADLINE_S)
    assert not list((tmp_path / "run" / "hybrimoe").glob("*.sock"))
