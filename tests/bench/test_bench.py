"""`hybrimoe bench` as a user runs it, on tiny models. No speed is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybrimoe.bench.rows import FIELDS, KEY_FIELDS
from hybrimoe.gguf_model import inspect

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def rows_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_test_has_a_plain_row_beside(bench: Run, tiny_model: Callable[..., Path]) -> None:
    model = tiny_model("qwen3moe", "Q4_0")
    rows = rows_of(bench(model, "-p", 40, "-n", 3, "-pg", "8,2", "-d", "0,16", "-r", 2, "-o", "jsonl"))
    assert len(rows) == 12 and all(set(FIELDS) <= row.keys() for row in rows)
    for stock, ours in zip(rows[::2], rows[1::2], strict=True):
        assert stock["build_commit"].startswith("llama.cpp") and ours["build_commit"].startswith("hybrimoe")
        assert len(stock["build_commit"]) == len(ours["build_commit"])
        assert {k: stock[k] for k in KEY_FIELDS} == {k: ours[k] for k in KEY_FIELDS}
        assert "HybriMoE" not in ours["cpu_info"] + ours["backends"]
        assert len(stock["samples_ns"]) == len(ours["samples_ns"]) == 2
        assert stock["n_expert_cpu"] is None
        assert ours["sched_policy"] == "cpu-only" and ours["n_expert_gpu"] == ours["n_slots"] == 0
    info = inspect(model)
    generated = rows[3]
    assert (generated["n_prompt"], generated["n_gen"]) == (0, 3)
    assert generated["n_expert_cpu"] == 3 * len(info.moe_layers) * info.n_experts_used


def test_slots_and_hits_are_counted(bench: Run, tiny_model: Callable[..., Path]) -> None:
    model = tiny_model("qwen3moe", "Q4_0")
    options = ["--device", "CPU", "-ec", "2,4", "--guard", "off", "--admission", "always", "--no-keep-residency"]
    rows = rows_of(bench(model, "-p", 0, "-n", 24, "-r", 1, "-o", "jsonl", "--no-stock", *options))
    assert [row["n_slots"] for row in rows] == [2, 4]
    assert all(row["cache_bytes"] > 0 and 0 <= row["hit_rate"] <= 1 for row in rows)
    info = inspect(model)
    for row in rows:
        assert row["n_expert_cpu"] + row["n_expert_gpu"] == 24 * len(info.moe_layers) * info.n_experts_used
    assert rows[0]["cache_policy"] == "mrs" and rows[0]["prompt_source"] == "corpus"


def test_rows_after_a_long_prompt_use_the_cache(bench: Run, long_prompt: Any) -> None:
    """A prompt of several micro-batches is no reason to measure the CPU."""
    options = ["-p", 3000, "-n", 24, "-r", 1, "--no-stock", "-o", "jsonl"]
    done = bench(long_prompt.model, *options, *long_prompt.sharing)
    rows = rows_of(done)
    assert [(row["n_prompt"], row["n_gen"]) for row in rows] == [(3000, 0), (0, 24)]
    assert all(row["sched_policy"] in ("two-threshold", "gpu-only") for row in rows), rows
    assert all(row["hit_rate"] > 0 and row["n_expert_gpu"] > 0 for row in rows), rows
    assert "not used" not in done.stderr


@pytest.mark.parametrize(
    ("faults", "why"),
    [
        # In the warm-up, for longer than the test takes.
        ({"fail_step": 2, "pause_us": 600_000_000}, "sharing is paused: a step that fails on purpose"),
        ({"fail_alloc_from": 1}, "CPU has no memory left"),
    ],
    ids=["paused", "given up"],
)
def test_a_cache_that_is_not_used_is_said(
    bench: Run, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, faults: dict[str, int], why: str
) -> None:
    monkeypatch.setenv("HYBRIMOE_CONFIG", json.dumps({"faults": faults}))
    model = tiny_model("qwen3moe", "Q4_0")
    done = bench(model, "-p", 8, "-n", 4, "-r", 1, "--no-stock", "--device", "CPU", "-ec", 2, "-o", "jsonl")
    rows = rows_of(done)
    assert [row["sched_policy"] for row in rows] == ["cpu-only (cache not used)"] * 2
    assert all(row["n_expert_gpu"] == 0 and row["hit_rate"] is None for row in rows)
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert [line.split(": ")[1] for line in warnings] == ["pp8", "tg4"]
    assert all("asked for and not used" in line and why in line for line in warnings)


def test_one_process_at_a_time(bench: Run, tiny_model: Callable[..., Path]) -> None:
    done = bench(tiny_model("mixtral", "Q4_0"), "-p", 8, "-n", 2, "-r", 3, "--interleave", "process", "-o", "jsonl")
    rows = rows_of(done)
    assert [row["n_gen"] for row in rows] == [0, 0, 2, 2]
    assert all(len(row["samples_ns"]) == 3 for row in rows)


def test_trace_of_a_bench(bench: Run, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from hybrimoe.trace.format import read

    trace = tmp_path / "b.trace"
    model = tiny_model("qwen3moe", "Q4_0")
    done = bench(model, "-p", 8, "-n", 4, "-r", 2, "--no-stock", "--trace", trace, "--no-warmup")
    assert done.returncode == 0, done.stderr
    assert read(trace).n_tokens == 2 * (8 + 4)
    again = bench(model, "-p", 8, "-n", 4, "--trace", trace)
    assert again.returncode == 2 and "exists already" in again.stderr


def test_both_streams(bench: Run, tiny_model: Callable[..., Path]) -> None:
    done = bench(tiny_model("mixtral", "Q4_0"), "-p", 4, "-n", 0, "-r", 1, "-oe", "jsonl", "--progress")
    assert done.returncode == 0 and done.stdout.startswith("| model")
    assert "machine: " in done.stdout and "command: " in done.stdout
    lines = done.stderr.splitlines()
    assert sum(line.startswith("{") for line in lines) == 2
    assert any(line.startswith("bench: pp4, hybrimoe, 1 of 1") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nothing.gguf"], 3),
        (["{model}", "-p", "x"], 2),
        (["{model}", "-p", "0", "-n", "0"], 2),
        (["{model}", "-r", "0"], 2),
        (["{model}", "-o", "xml"], 2),
        (["{model}", "--prompt-source", "nowhere.txt"], 2),
        (["{model}", "-ub", "128,256", "--trace", "x.trace"], 2),
        (["{model}", "-p", "4", "-n", "0", "-ot", "nonsense"], 2),
        (["{model}", "-p", "4", "-n", "0", "--cache-policy", "best"], 2),
        (["{model}", "-p", "99999", "-n", "0"], 2),
        (["--compare", "one.jsonl"], 2),
        (["--compare", "one.jsonl", "two.jsonl"], 1),
    ],
)
def test_errors(bench: Run, tiny_model: Callable[..., Path], arguments: list[str], code: int) -> None:
    model = str(tiny_model("mixtral", "Q4_0"))
    done = bench(*(a.format(model=model) for a in arguments))
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code, done
    assert done.stdout == ""
    assert len(lines) in (1, 2) and lines[0].startswith("error: "), done.stderr


def test_dense_models_are_refused(bench: Run, tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "dense.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    done = bench(path)
    assert done.returncode == 3 and "no experts" in done.stderr


def test_llama_cpps_own_script_shows_a_speedup(
    bench: Run, tiny_model: Callable[..., Path], tmp_path: Path, compare_script: Path
) -> None:
    done = bench(tiny_model("mixtral", "Q4_0"), "-p", 16, "-n", 4, "-r", 1, "-o", "jsonl")
    rows = rows_of(done)
    (tmp_path / "r.jsonl").write_text(done.stdout)
    stock, ours = (row["build_commit"] for row in rows[:2])
    command = [sys.executable, compare_script, "--tool", "llama-bench", "-i", "r.jsonl", "-b", stock, "-c", ours]
    table = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=tmp_path)
    assert table.returncode == 0, table.stderr
    head, _, *lines = table.stdout.splitlines()
    assert "Speedup" in head and stock in head and ours in head
    assert len(lines) == 2 and "pp16" in lines[0] and "tg4" in lines[1]
    assert all(float(line.split("|")[-2]) > 0 for line in lines)
