"""Snapshots of real engines, and chats that are watched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


def sampler_of(engine: Any) -> Any:
    from hybrimoe.live.host import Host
    from hybrimoe.live.snapshot import LiveSampler

    return LiveSampler(Host(engine, "chat").read)


def test_a_snapshot_counts_what_was_done(tiny_model: Callable[..., Path]) -> None:
    with make_engine(tiny_model("mixtral"), observe=True) as engine:
        sampler = sampler_of(engine)
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


def test_a_host_that_says_nothing_is_shown_by_what_it_does(tiny_model: Callable[..., Path]) -> None:
    from hybrimoe.live.snapshot import live_snapshot
    from hybrimoe.native.plugin import plugin_library

    with make_engine(tiny_model("mixtral"), observe=True) as engine:

        def raw() -> dict[str, Any]:
            found = plugin_library().snapshot(f"instance={engine.plugin_instance}")
            return {**found, "host": None, "program": "llama-server"}

        before = raw()
        answer(engine, 20, "word " * 40)
        time.sleep(0.1)
        now = raw()
        assert now["model_file"] == str(engine.info.path)
        shown = live_snapshot(now, before)
        assert shown["command"] == "llama-server" and shown["phase"] == "generating" and shown["context"] is None
        info = engine.info
        expected = {"name": info.path.stem, "n_experts": info.n_experts, "top_k": info.n_experts_used}
        assert expected.items() <= shown["model"].items()
        passes = [one["instances"][0]["passes"] for one in (before, now)]
        grown = {name: passes[1][name] - passes[0][name] for name in passes[0]}
        assert grown["n_prompt_tokens"] == engine.n_prompt_tokens and grown["n_generated_tokens"] == engine.n_generated
        # Without what llama.cpp does before a pass's first layer and after its last one.
        assert 0 < grown["generation_s"] < 1.2 * engine.generation_s
        assert shown["rates"]["generation_per_s"] == pytest.approx(grown["n_generated_tokens"] / grown["generation_s"])
        assert live_snapshot(now, now)["phase"] == "idle"


def test_a_snapshot_without_instances_is_of_a_host_that_loads() -> None:
    from hybrimoe.live.snapshot import live_snapshot

    raw = {"pid": 1, "program": "llama-cli", "uptime_s": 2.0, "at_s": 5.0, "host": None, "instances": []}
    assert live_snapshot(raw, None)["phase"] == "loading"


def test_counters_that_are_reset_do_not_go_back(tiny_model: Callable[..., Path]) -> None:
    with make_engine(tiny_model("mixtral")) as engine:
        sampler = sampler_of(engine)
        seen = []
        for _ in range(3):
            engine.reset_counters()
            assert engine.counters() == []
            answer(engine, 4)
            time.sleep(0.25)  # snapshots within that time are the same one
            seen.append(sampler.snapshot()["totals"]["experts_cpu"])
        assert seen[0] > 0 and seen == sorted(set(seen))


def test_events_come_once_and_begin_anew_with_another_instance(tiny_model: Callable[..., Path]) -> None:
    from hybrimoe.live.snapshot import LiveSampler

    def raw(instance: int, events: list[Any]) -> dict[str, Any]:
        instances = [{"id": instance, "events": events}]
        return {"pid": 1, "program": "x", "uptime_s": 0, "at_s": time.monotonic(), "host": None, "instances": instances}

    asked = []
    current = (1, ["a", "b"])

    def read(after: int) -> dict[str, Any]:
        asked.append(after)
        return raw(current[0], [[n, text] for n, text in enumerate(current[1], 1) if n > after])

    sampler = LiveSampler(read)
    assert [e["text"] for e in sampler.snapshot()["events"]] == ["a", "b"]
    time.sleep(0.25)
    current = (2, ["c"])
    assert sampler.snapshot()["events"] == [{"number": 1, "text": "c"}] and asked == [0, 2, 0]


def test_an_accelerator_shows_with_slots_and_residency(tiny_model: Callable[..., Path]) -> None:
    from hybrimoe.expert_options import CacheSize, ExpertOptions

    experts = ExpertOptions(devices=("CPU",), cache=CacheSize(n_slots=2), guard=False)
    with make_engine(tiny_model("mixtral"), experts=experts, observe=True) as engine:
        answer(engine, 20)
        found = sampler_of(engine).snapshot()
        (device,) = found["devices"]
        assert device["n_slots"] == 2 * len(found["experts"]["layers"])
        assert all(sum(on >= 0 for on in row) <= 2 for row in found["experts"]["on"])
        assert found["totals"]["hits"] + found["totals"]["misses"] > 0 and found["guard"]["on"] is False


def test_being_watched_changes_no_answer(tiny_model: Callable[..., Path]) -> None:
    from hybrimoe.generation import Sampling

    found = []
    for observe in (False, True):
        with make_engine(tiny_model("mixtral"), observe=observe) as engine:
            done = engine.answer(engine.text_prompt("hello"), Sampling(temp=0), 16)
            list(done)
            found.append(list(done.tokens))
    assert found[0] == found[1]


def test_a_recording_by_the_host_and_one_by_others_are_whole(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from hybrimoe.live.sockets import Observer
    from hybrimoe.native.plugin import plugin_library
    from hybrimoe.trace.attach import attach
    from hybrimoe.trace.format import read

    own, other = tmp_path / "own.trace", tmp_path / "other.trace"
    with make_engine(tiny_model("mixtral"), observe=True, trace=own) as engine:
        socket = plugin_library().snapshot("events")["socket"]
        with ThreadPoolExecutor(1) as pool:
            attached = pool.submit(attach, Path(socket), other, 20)
            with Observer(Path(socket)) as observer:
                until = time.monotonic() + DEADLINE_S
                while not attached.done() and time.monotonic() < until:
                    answer(engine, 8)
                    heat = observer.ask(f"snapshot heat instance={engine.plugin_instance}")["instances"][0]["heat"]
            assert attached.result().recorder.n_tokens >= 20 and all(sum(row) > 0.9 for row in heat)
    mine, theirs = read(own), read(other)
    assert theirs.n_tokens >= 20 and theirs.model == mine.model and mine.n_tokens >= theirs.n_tokens
    window = theirs.experts.tobytes()
    assert window in mine.experts.tobytes(), "a stretch of the same tokens, none of them missing"


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
