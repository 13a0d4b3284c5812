"""`hybrimoe profile` on tiny models: what it says must agree with its own recording. No time is judged."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from profile_checks import STAND_IN, Made

from hybrimoe.gguf_model import inspect
from hybrimoe.profiling.analysis import BEGIN, GPU, MERGE, PLAN, blocks_of, copies_of
from hybrimoe.trace.events import EventType, Note
from hybrimoe.trace.format import read

Run = Callable[..., "subprocess.CompletedProcess[str]"]
N_TEXTS = 7


def test_phases_of_every_block_are_recorded(shared: Made, alone: Made) -> None:
    for made in (shared, alone):
        trace = read(made.folder / "run.trace")
        assert trace.events is not None
        events = trace.events
        phases = events[events["type"] == Note.PHASES]
        planned = np.isin(events["type"], [EventType.LAYER, Note.ROUTED])
        assert len(phases) == planned.sum() > 0
        ends = phases["gpu_ready_us"]
        assert (np.diff(ends[:, : MERGE + 1], axis=1) >= 0).all(), "one phase begins where the one before it ended"
        assert (ends[:, GPU] >= ends[:, PLAN]).all()
        assert (np.diff(ends[:, BEGIN]) > 0).all() and (ends[1:, BEGIN] >= ends[:-1, MERGE]).all()


def test_copies_are_those_that_were_issued(shared: Made) -> None:
    trace = read(shared.folder / "run.trace")
    copies = copies_of(trace)
    assert len(copies.layer) and (copies.end >= copies.begin).all()
    assert set(copies.n_bytes.tolist()) == set(map(float, trace.model.expert_bytes))
    assert trace.events is not None
    issued = trace.events[trace.events["type"] == Note.TRANSFER]
    assert {*zip(copies.layer, copies.expert, strict=True)} <= {*zip(issued["layer"], issued["a"], strict=True)}


def test_parts_add_up_to_the_time_of_a_token(shared: Made, alone: Made) -> None:
    for made in (shared, alone):
        for phase in made.data["phases"].values():
            total_ms = sum(phase["critical_us_per_token"].values()) / 1e3
            assert total_ms == pytest.approx(phase["ms_per_token"], rel=1e-6)
            assert all(us >= 0 for us in phase["critical_us_per_token"].values())
            assert all(0 <= share <= 1 for share in phase["busy"].values())
            assert phase["limit"]["sentence"].endswith(".") and phase["limit"]["share"] > 0


def test_counts_agree_with_the_recording(shared: Made, tiny_model: Callable[..., Path]) -> None:
    info = inspect(tiny_model("qwen3moe", "Q4_0"))
    n_layers, top_k = len(info.moe_layers), info.n_experts_used
    decode = shared.data["phases"]["decode"]
    assert decode["n_tokens"] == decode["n_steps"] == N_TEXTS * 12
    experts = decode["experts"]
    assert experts["n_hits"] + experts["n_misses"] == decode["n_tokens"] * n_layers * top_k
    assert experts["n_experts_cpu"] + experts["n_experts_gpu"] == decode["n_tokens"] * n_layers * top_k
    blocks = blocks_of(trace := read(shared.folder / "run.trace"), copies_of(trace))
    chosen = blocks.of(1) & blocks.planned
    assert blocks.n_gpu[chosen].sum() == experts["n_experts_gpu"]
    heat = np.asarray(shared.data["heat"]["decode"])
    assert heat.shape == (n_layers, info.n_experts) and (heat.sum(axis=1) == decode["n_tokens"] * top_k).all()
    prefill = shared.data["phases"]["prefill"]
    assert prefill["n_tokens"] == N_TEXTS * 24 and prefill["experts"]["n_copies"] >= 0
    assert [row["layer"] for row in decode["layers"]] == list(info.moe_layer_indices)


def test_who_is_there_is_busy(shared: Made, alone: Made) -> None:
    assert set(shared.data["phases"]["decode"]["busy"]) == {"CPU", "GPU", "link"}
    assert set(alone.data["phases"]["decode"]["busy"]) == {"CPU"}
    assert shared.data["phases"]["decode"]["busy"]["GPU"] > 0
    assert alone.data["phases"]["decode"]["experts"]["hit_rate"] is None
    assert shared.data["devices"][0]["label"] == "stand-in GPU"


def test_plain_llama_cpp_is_measured(alone: Made, shared: Made) -> None:
    assert alone.data["stock"]["prefill"] > 0 and alone.data["stock"]["decode"] > 0
    assert shared.data["stock"] is None


def test_predictions_of_the_plans(shared: Made) -> None:
    prediction = shared.data["prediction"]
    assert prediction["median_error"] >= 0 and prediction["token_predicted_us"] > 0
    assert len(prediction["layers"]) == len(shared.data["layers"])


def test_report_is_one_file_without_network(shared: Made, alone: Made) -> None:
    for made, has_device in ((shared, True), (alone, False)):
        page = (made.folder / "r.html").read_text()
        own = page.replace(page[page.index("<script>") : page.index("</script>")], "")
        assert " src=" not in own and "<link" not in own and "@import" not in own
        sentence = made.data["phases"]["decode"]["limit"]["sentence"].replace("'", "&#x27;")
        assert sentence in page
        assert ("Which experts were on the accelerator?" in page) == has_device
        assert ("How busy were CPU, GPU and link?" in page) == has_device


def test_timeline_is_a_chrome_trace(shared: Made) -> None:
    trace = json.loads((shared.folder / "t.json").read_text())
    bars = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert all(e["dur"] >= 0 and e["ts"] > 0 for e in bars)
    threads = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert set(threads.values()) == {"CPU", "experts on stand-in GPU", "copies to stand-in GPU"}
    assert sum(e["name"] == "token" for e in bars) == N_TEXTS * 12
    # Bars of one thread lie in each other or apart, as the format demands.
    cpu = sorted((e for e in bars if threads[e["tid"]] == "CPU"), key=lambda e: (e["ts"], -e["dur"]))
    open_until: list[float] = []
    for bar in cpu:
        while open_until and open_until[-1] <= bar["ts"] + 0.002:
            open_until.pop()
        assert not open_until or bar["ts"] + bar["dur"] <= open_until[-1] + 0.002
        open_until.append(bar["ts"] + bar["dur"])


def test_own_text_and_no_files(profile: Run, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("One short text.")
    done = profile(tiny_model("mixtral", "Q4_0"), "-f", text, "-p", 40, "-n", 0, "--no-stock", "--no-files", *STAND_IN)
    assert done.returncode == 0, done.stderr
    assert "Reading the prompt is limited by" in done.stdout and "1 text, 40 tokens of prompt" in done.stdout
    assert max(map(len, done.stdout.splitlines()[4:])) <= 140
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["mine.txt"]


def test_spans_can_be_left_out(tiny_model: Callable[..., Path]) -> None:
    from hybrimoe.native.plugin import load_plugin

    plugin = load_plugin()
    plugin.configure(trace_spans=False)
    plugin.configure(trace_spans=True)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["absent.gguf"], 3),
        (["{model}", "two"], 2),
        (["{model}", "-p", "0"], 2),
        (["{model}", "-f", "absent.txt"], 1),
        (["{model}", "-f", "{empty}"], 2),
        (["{model}", "--html", "absent/r.html"], 1),
        (["{model}", "--html", "."], 2),
        (["{model}", "-p", "60000"], 2),
        (["{model}", "--device", "TPU9"], 2),
    ],
)
def test_errors(profile: Run, tiny_model: Callable[..., Path], tmp_path: Path, arguments: list[str], code: int) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    model = tiny_model("mixtral", "Q4_0")
    done = profile(*(a.format(model=model, empty=empty) for a in arguments))
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code, done
    assert 1 <= len(lines) <= 2 and lines[0].startswith("error: "), done.stderr
    assert not list(tmp_path.glob("*.html")) and not list(tmp_path.glob("*perfetto*"))
