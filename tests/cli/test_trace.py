"""`hybrimoe trace` and `hybrimoe simulate` as users type them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from core.conftest import core_library  # noqa: F401

Call = Callable[..., Any]


def test_the_documented_example(call: Call, deepseek: Path) -> None:
    """The figures are those of the shared traces' README, first 40 prompts, cold."""
    arguments = (
        "--cache-policy",
        "lru,lfu,belady",
        "--expert-cache",
        "16,32,48",
        "--cold",
        "--prompts",
        "40",
        "--json",
    )
    rows = json.loads(call("simulate", str(deepseek), *arguments).out)
    assert {row["queries"] for row in rows} == {744120}
    found = {(row["policy"], row["n_slots"]): row["hits"] for row in rows}
    assert [found["lru", n] for n in (16, 32, 48)] == [359098, 534125, 664979]
    assert [found["lfu", n] for n in (16, 32, 48)] == [374301, 547253, 667917]
    assert [found["belady", n] for n in (16, 32, 48)] == [496756, 643427, 711746]


def test_simulate_formats_agree(call: Call, trace: Path) -> None:
    arguments = ("simulate", str(trace), "--cache-policy", "lru,mrs", "--expert-cache", "2k,75%")
    as_json = json.loads(call(*arguments, "--json").out)
    as_csv = list(csv.DictReader(io.StringIO(call(*arguments, "--format", "csv").out)))
    assert [(r["policy"], r["n_slots"], r["hits"]) for r in as_json] == [
        ("lru", 8, 6125), ("lru", 12, 7199), ("mrs", 8, 6202), ("mrs", 12, 7233),
    ]  # fmt: skip
    assert [(r["policy"], int(r["n_slots"]), int(r["hits"])) for r in as_csv] == [
        (r["policy"], r["n_slots"], r["hits"]) for r in as_json
    ]
    markdown = call(*arguments, "--format", "md").out
    assert "| mrs | 8 (50 %) | 7952 | 6202 |" in markdown
    table = call(*arguments)
    assert "6202" in table.out and "pay with" in table.out and table.err == ""


def test_defaults_bring_the_usual_policies_and_belady(call: Call, trace: Path) -> None:
    rows = json.loads(call("simulate", str(trace), "--json").out)
    assert {row["policy"] for row in rows} == {"lru", "lfu", "lfru", "ema:alpha=0.1", "mrs", "belady"}
    assert sorted({row["n_slots"] for row in rows}) == [4, 8, 12]
    assert all(row["cold"] is False for row in rows)
    both = json.loads(call("simulate", str(trace), "--json", "--kept", "--cold", "--cache-policy", "lfu").out)
    assert [row["cold"] for row in both] == [False] * 3 + [True] * 3


def test_pictures_and_page(call: Call, trace: Path, tmp_path: Path) -> None:
    page, picture = tmp_path / "page.html", tmp_path / "a.png"
    arguments = ("--profile", "rtx3060-pcie3-ddr4", "--cache-policy", "lru,belady", "--expert-cache", "4,8")
    outcome = call("simulate", str(trace), *arguments, "--html", str(page), "--plot", str(picture))
    assert outcome.code == 0 and "t/s simulated" in outcome.out, outcome
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 4 and "http" not in text
    assert "never measured" in text and "timeline" in text and "Residency" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_info(call: Call, trace: Path) -> None:
    text = call("trace", "info", str(trace)).out
    assert "30 MoE layers, 16 experts" in text and "layer 29" in text
    data = json.loads(call("trace", "info", str(trace), "--metrics", "--json").out)
    assert data["n_tokens"] == 68 and data["n_prompts"] == 2 and data["arrays"] == [
        "weights", "scores", "lookahead", "is_decode",
    ]  # fmt: skip
    assert data["metrics"]["advice"].startswith("caches well")
    assert set(data["metrics"]["lookahead_recall"]) == {"1", "2", "3"}
    assert data["metrics"]["srp"]["256"] is None


def test_convert_and_import(call: Call, trace: Path, tmp_path: Path) -> None:
    as_csv, again = tmp_path / "a.csv", tmp_path / "again.trace"
    assert call("trace", "convert", str(trace), "-o", str(as_csv), "--prompts", "1").code == 0
    assert call("trace", "import", str(as_csv), "-o", str(again)).code == 0
    data = json.loads(call("trace", "info", str(again), "--json").out)
    assert data["n_prompts"] == 1 and data["model"]["expert_bytes"] == [1658880] * 30
    call("trace", "convert", str(trace), "-o", str(again)).assert_two_lines(2)  # it exists
    assert call("trace", "convert", str(trace), "-o", str(again), "--force", "--without", "lookahead").code == 0
    assert "lookahead" not in json.loads(call("trace", "info", str(again), "--json").out)["arrays"]


def test_two_commands_from_a_model_to_a_picture(call: Call, model: str, tmp_path: Path) -> None:
    recording, page = tmp_path / "tiny.trace", tmp_path / "tiny.html"
    arguments = ("-p", "hello there", "-p", "and again", "-n", "4", "-c", "64", "-t", "1", "--no-conversation")
    outcome = call("trace", "record", model, "-o", str(recording), *arguments)
    assert outcome.code == 0 and "hint: hybrimoe simulate" in outcome.err, outcome
    assert call("simulate", str(recording), "--profile", "rtx3060-pcie3-ddr4", "--html", str(page)).code == 0
    assert page.stat().st_size > 10_000
    assert call("trace", "info", str(recording), "-m", model).code == 0


@pytest.mark.parametrize("flag", ["--machines", "--list-profiles"])
def test_machines_are_listed(call: Call, flag: str) -> None:
    outcome = call("simulate", flag)
    assert outcome.code == 0 and "hybrimoe-paper" in outcome.out and "rtx5090" in outcome.out


def test_machines_in_words(call: Call, trace: Path) -> None:
    """Descriptions have commas, so each takes a flag; names may share one."""
    described = "gpu=rtx3060,cpu=5600x,ram=ddr4-3200x2:32GiB,link=pcie4"
    arguments = ("--cache-policy", "lru", "--expert-cache", "4", "--json")
    flags = ("--machine", described, "--machine", "rtx3060-pcie3-ddr4,rtx3060-pcie4-ddr4:link=pcie3x8")
    outcome = call("simulate", str(trace), *flags, *arguments)
    assert outcome.code == 0, outcome.err
    rows = json.loads(outcome.out)
    assert [row["profile"] for row in rows] == [described, "rtx3060-pcie3-ddr4", "rtx3060-pcie4-ddr4:link=pcie3x8"]
    assert all(row["ms_per_token"] > 0 for row in rows)
    call("simulate", str(trace), "--machine", "gpu=rtx3060,cpu=nothing", *arguments).assert_two_lines(2)


def test_a_cut_trace_is_used_with_a_warning(call: Call, trace: Path) -> None:
    trace.write_bytes(trace.read_bytes()[:-1])  # the end block
    outcome = call("simulate", str(trace), "--cache-policy", "lru", "--expert-cache", "8", "--json")
    assert outcome.code == 0 and json.loads(outcome.out)[0]["hits"] == 6125
    assert "warning: the trace 'demo.trace' ends in the middle of a block" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "simulate needs a trace"),
        (("absent.trace",), 3, "no such trace: 'absent.trace'"),
        (("{trace}", "--cache-policy", "lur"), 2, "there is no 'lur'"),
        (("{trace}", "--expert-cache", "17"), 2, "has 16 experts per layer"),
        (("{trace}", "--expert-cache", "much"), 2, "'much' is no cache size"),
        (("{trace}", "--schedule", "cpu-only"), 2, "need a machine"),
        (("{trace}", "--profile", "rtx1"), 2, "no such machine: 'rtx1'"),
        (("{trace}", "--profile", "a6000-pcie4-ddr4", "--prefetch", "guess"), 2, "--prefetch: there is no 'guess'"),
        (("{trace}", "--format", "xml"), 2, "--format: there is no 'xml'"),
        (
            ("{trace}", "--profile", "a6000-pcie4-ddr4", "--prefetch", "fate", "--lookahead", "no"),
            2,
            "'no' is not known",
        ),
        (("{trace}", "--recorded"), 2, "no live recording"),
        (("{trace}", "-m", "{model}"), 3, "of another model"),
        (("{trace}", "--prompts", "0"), 2, "invalid value for '--prompts'"),
        (("{trace}", "-o", "/nonexistent/x.txt"), 1, "cannot write"),
        (("{model}",), 3, "is no hybrimoe trace"),
    ],
)
def test_bad_simulations(
    call: Call, trace: Path, model: str, arguments: tuple[str, ...], code: int, message: str
) -> None:
    outcome = call("simulate", *(a.format(trace=trace, model=model) for a in arguments))
    outcome.assert_two_lines(code)
    assert message in outcome.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("info", "absent.trace"), 3, "no such trace"),
        (("info", "{model}"), 3, "is no hybrimoe trace"),
        (("import", "{trace}", "-o", "x.trace"), 3, "has no known trace format"),
        (("import", "absent.csv", "-o", "x.trace"), 3, "no such file"),
        (("import", "{trace}", "-o", "x.npz"), 2, "does not end in .trace"),
        (("convert", "{trace}", "-o", "x.json"), 2, "ends in no known format"),
        (("convert", "{trace}", "-o", "x.npz", "--without", "soul"), 2, "no array 'soul'"),
        (("record", "absent.gguf"), 3, "no such model"),
        (("record", "{model}", "-o", "{trace}"), 2, "exists already"),
        (("record", "{model}", "--scores", "f64"), 2, "'f64' is not known"),
        (("record", "{model}", "-p", " "), 2, "a prompt is empty"),
    ],
)
def test_bad_trace_commands(
    call: Call, trace: Path, model: str, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int,
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(trace.parent)
    before = sorted(trace.parent.iterdir())
    outcome = call("trace", *(a.format(trace=trace, model=model) for a in arguments))
    outcome.assert_two_lines(code)
    assert message in outcome.err
    assert sorted(trace.parent.iterdir()) == before


def test_a_machine_without_a_card(call: Call, trace: Path) -> None:
    outcome = call("simulate", str(trace), "--profile", "cpu-only-ddr5", "--cache-policy", "lru,belady", "--json")
    rows = json.loads(outcome.out)
    assert "has no card" in outcome.err and [row["n_slots"] for row in rows] == [0, 0]
    assert rows[0]["experts_gpu"] == 0 and rows[0]["tokens_per_s"] > 0 and rows[0]["of_limit"] <= 1
