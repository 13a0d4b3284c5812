"""Sharing with an accelerator in a server: long prompts do not end it, and a pause is shown while it lasts."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .conftest import COMMAND, DEADLINE_S, Server

Serve = Callable[..., Server]
STAND_IN = ("--device", "CPU", "--expert-cache", "2")
REASON = "a step that fails on purpose"


def failing(**faults: int) -> dict[str, str]:
    """An environment in which a step of the sharing fails."""
    return {"HYBRIMOE_CONFIG": json.dumps({"faults": faults})}


def asking(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 24, "temperature": 0}


def paused_metrics(server: Server) -> list[str]:
    return [line for line in server.ask("/metrics")[1].splitlines() if line.startswith("hybrimoe:paused")]


def lines_with(server: Server, part: str) -> list[str]:
    return [line for line in server.lines if part in line]


def test_a_pause_is_shown_wherever_one_looks(serve: Serve, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Metrics, the live view, `hybrimoe top` and the log, while a pause lasts that outlasts the test."""
    environment = failing(fail_step=20, pause_us=600_000_000)
    server = serve(str(tiny_model("qwen3moe", "Q4_0")), *STAND_IN, **environment).wait_until_ready()
    assert paused_metrics(server) == [] and server.ask("/live")[1]["paused"] == []
    assert server.chat(max_tokens=32, min_tokens=32)[0] == 200

    assert paused_metrics(server) == ['hybrimoe:paused{reason="failed-step"} 1.0']
    (pause,) = server.wait_until(lambda snapshot: snapshot["paused"])["paused"]
    assert (pause["kind"], pause["what"], pause["reason"]) == ("failed-step", "sharing", REASON)
    assert 0 < pause["retry_in_s"] <= 600
    command = [*COMMAND, "top", server.url, "--once"]
    environment = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path / "config"), "COLUMNS": "120", "NO_COLOR": "1"}
    page = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=DEADLINE_S).stdout
    assert f"sharing is paused: {REASON}" in page

    answer = server.chat(max_tokens=8)[1]
    experts = answer["timings"]["experts"]
    assert experts["cpu"] > 0 and experts["gpu"] == experts["hits"] == experts["misses"] == 0
    server.wait_for_line(REASON)
    assert len(lines_with(server, REASON)) == 1
    assert lines_with(server, "shared again") == []


def test_what_is_given_up_is_a_metric(serve: Serve, tiny_model: Callable[..., Path]) -> None:
    server = serve(str(tiny_model("qwen3moe", "Q4_0")), *STAND_IN, **failing(fail_set_up=1)).wait_until_ready()
    assert server.chat(max_tokens=8)[0] == 200
    (line,) = [line for line in server.ask("/metrics")[1].splitlines() if line.startswith("hybrimoe:given_up{")]
    assert line.endswith("} 1.0") and str(server.ask("/live")[1]["given_up"]) in line


def test_the_log_says_when_a_pause_begins_and_ends(serve: Serve, tiny_model: Callable[..., Path]) -> None:
    environment = failing(fail_step=20, pause_us=1)
    server = serve(str(tiny_model("qwen3moe", "Q4_0")), *STAND_IN, **environment).wait_until_ready()
    assert server.chat(max_tokens=32, min_tokens=32)[0] == 200
    server.wait_for_line("shared again")
    (begin,), (end,) = lines_with(server, REASON), lines_with(server, "shared again")
    assert server.lines.index(begin) < server.lines.index(end)
    assert "tried again in" in begin
    assert paused_metrics(server) == []
    experts: Any = server.chat(max_tokens=8)[1]["timings"]["experts"]
    assert experts["hits"] + experts["misses"] > 0


def test_later_requests_keep_the_cache(serve: Serve, long_prompt: Any) -> None:
    """What follows a prompt of several micro-batches."""
    server = serve(long_prompt.model, "-c", str(long_prompt.n_ctx), *long_prompt.sharing).wait_until_ready()
    before = server.ask("/live")[1]["totals"]
    for number, text in enumerate((long_prompt.text, "What is the sun?", "How old is it?")):
        status, answer = server.ask("/v1/chat/completions", asking(text), deadline_s=600)
        assert status == 200, answer
        timings = answer["timings"]
        assert number > 0 or timings["prompt_n"] >= 3000
        assert timings["experts"]["hits"] > 0 and timings["experts"]["gpu"] > 0, f"answer {number}"
        snapshot = server.wait_until(lambda s, n=number: s["requests"]["done"] > n)
        assert snapshot["totals"]["hits"] > before["hits"]
        assert snapshot["totals"]["experts_gpu"] > before["experts_gpu"]
        assert snapshot["paused"] == []
        before = snapshot["totals"]
