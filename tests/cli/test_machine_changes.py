"""`hybrimoe simulate --machine-changes` as users type it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from core.conftest import core_library  # noqa: F401

Call = Callable[..., Any]
CHANGES: dict[str, Any] = {
    "profile": "rtx3060-pcie4-ddr4",
    "phases": [{"from_token": 0}, {"from_token": 100, "link": 20}, {"from_token": 160}],
}


@pytest.fixture
def changes(tmp_path: Path) -> Path:
    path = tmp_path / "changes.json"
    path.write_text(json.dumps(CHANGES), encoding="utf-8")
    return path


def test_json_has_every_window(call: Call, trace: Path, changes: Path) -> None:
    outcome = call("simulate", str(trace), "--machine-changes", str(changes), "--json")
    assert outcome.code == 0 and "replayed as decode" in outcome.err
    data = json.loads(outcome.out)
    # The engine's policy and half of the 16 experts; 512 tokens after the last change.
    assert (data["policy"], data["n_slots"], data["n_tokens"], data["simulated"]) == ("mrs", 8, 672, True)
    assert [w["first_token"] for w in data["windows"]] == list(range(0, 672, 32))
    assert set(data["windows"][0]) == {
        "first_token", "us_per_token", "oracle_us_per_token", "plain_us_per_token", "to_oracle", "to_plain", "trying",
        "guard", "n_trials", "experts_gpu", "copies", "believed",
    }  # fmt: skip
    assert set(data["windows"][0]["believed"]) == {"cpu", "gpu", "link", "dram"}
    assert data["worst_to_oracle_last_third"] == max(w["to_oracle"] for w in data["windows"][14:])
    assert call("simulate", str(trace), "--machine-changes", str(changes), "--format", "json").out == outcome.out


def test_a_table_and_a_picture(call: Call, trace: Path, changes: Path, tmp_path: Path) -> None:
    arguments = ("simulate", str(trace), "--machine-changes", str(changes), "--tokens", "1000", "--expert-cache", "4")
    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    outcome, again = (call(*arguments, "--cache-policy", "lru", "--plot", str(p)) for p in pictures)
    assert outcome.code == 0 and outcome.out == again.out
    lines = outcome.out.splitlines()
    assert "1000 tokens, 4 slots per layer, lru" in lines[0] and "times are simulated" in lines[0]
    assert lines[-1].startswith("worst to oracle in the last third: ")
    rows = [line.split() for line in lines if line[:1].isdigit()]
    # 32 windows, folded: the rows follow on one another from the first token to the last.
    assert 2 < len(rows) < 32 and rows[0][0].startswith("0-") and rows[-1][0].endswith("-999")
    edges = [tuple(map(int, row[0].split("-"))) for row in rows]
    assert all(after[0] == before[1] + 1 for before, after in itertools.pairwise(edges))
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert pictures[0].read_bytes().startswith(b"\x89PNG")
    written = tmp_path / "table.txt"
    assert call(*arguments, "--cache-policy", "lru", "-o", str(written)).out == ""
    assert written.read_text(encoding="utf-8") == outcome.out


def test_a_trace_without_scores(call: Call, trace: Path, changes: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.trace"
    without = [part for name in ("weights", "scores", "lookahead") for part in ("--without", name)]
    assert call("trace", "convert", str(trace), "-o", str(bare), *without).code == 0
    arguments = ("simulate", str(bare), "--machine-changes", str(changes), "--json")
    outcome = call(*arguments)
    assert json.loads(outcome.out)["policy"] == "ema:alpha=0.1" and "cache policy ema:alpha=0.1: " in outcome.err
    refused = call(*arguments, "--cache-policy", "mrs")
    refused.assert_two_lines(2)
    assert "'bare.trace' has none" in refused.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("{trace}", "{trace}"), 2, "replays one trace, not 2"),
        ((), 2, "replays one trace, not 0"),
        (("{trace}", "--profile", "rtx3060-pcie4-ddr4"), 2, "has no use for --machine"),
        (("{trace}", "--cold"), 2, "has no use for --cold"),
        (("{trace}", "--kept"), 2, "has no use for --kept"),
        (("{trace}", "--recorded"), 2, "has no use for --recorded"),
        (("{trace}", "--html", "x.html"), 2, "has no use for --html"),
        (("{trace}", "--lookahead", "perfect"), 2, "has no use for --lookahead"),
        (("{trace}", "--gap-us", "3"), 2, "has no use for --gap-us"),
        (("{trace}", "-ub", "3"), 2, "has no use for -ub"),
        (("{trace}", "--no-pay-back"), 2, "has no use for --pay-back"),
        (("{trace}", "-j", "1"), 2, "has no use for -j"),
        (("{trace}", "--format", "csv"), 2, "there is no 'csv' with --machine-changes"),
        (("{trace}", "--expert-cache", "4,8"), 2, "replays one cache size, not 2"),
        (("{trace}", "--expert-cache", "17"), 2, "has 16 experts per layer"),
        (("{trace}", "--cache-policy", "lru,lfu"), 2, "replays one --cache-policy, not 2"),
        (("{trace}", "--cache-policy", "belady"), 2, "no policy that the engine could follow"),
        (("{trace}", "--cache-policy", "lur"), 2, "there is no 'lur'"),
        (("{trace}", "--schedule", "exhaustive"), 2, "no policy that the engine could follow"),
        (("{trace}", "--admission", "always,pays"), 2, "replays one --admission, not 2"),
        (("{trace}", "--prefetch", "impact"), 2, "--prefetch impact needs look-ahead"),
        (("{trace}", "--tokens", "0"), 2, "invalid value for '--tokens'"),
        (("absent.trace",), 3, "no such trace"),
        (("{trace}", "-o", "{folder}/missing/x.txt"), 1, "cannot write"),
    ],
)
def test_bad_command_lines(
    call: Call, trace: Path, changes: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    outcome = call(
        "simulate", "--machine-changes", str(changes), *(a.format(trace=trace, folder=trace.parent) for a in arguments)
    )
    if code == 2 or "absent" in arguments[0]:
        outcome.assert_two_lines(code)
    assert outcome.code == code and message in outcome.err and "Traceback" not in outcome.err


def test_bad_files(call: Call, trace: Path, changes: Path) -> None:
    for content, message in (
        ("no JSON", "is not valid JSON"),
        ('{"profile": "rtx1", "phases": [{"from_token": 0}]}', "no such machine: 'rtx1'"),
        ('{"profile": "cpu-only-ddr5", "phases": [{"from_token": 0}]}', "has no card"),
        ('{"profile": "rtx3060-pcie4-ddr4:gpus=0", "phases": [{"from_token": 0}]}', "must be from 1 to"),
        ('{"profile": "rtx3060-pcie4-ddr4:gpus=x", "phases": [{"from_token": 0}]}', "must be from 1 to"),
        ('{"profile": "rtx3060-pcie4-ddr4:gpus=9", "phases": [{"from_token": 0}]}', "more than 8 cards"),
        ('{"profile": "rtx3060-pcie4-ddr4", "phases": [{"from_token": 5}]}', "must begin with token 0"),
    ):
        changes.write_text(content, encoding="utf-8")
        outcome = call("simulate", str(trace), "--machine-changes", str(changes))
        outcome.assert_two_lines(2)
        assert message in outcome.err
    outcome = call("simulate", str(trace), "--machine-changes", "absent.json")
    outcome.assert_two_lines(1)
    outcome = call("simulate", str(trace), "--tokens", "5")
    outcome.assert_two_lines(2)
    assert "--tokens is of no use without --machine-changes" in outcome.err


def test_a_trace_that_does_not_know_its_bytes(call: Call, changes: Path, deepseek: Path) -> None:
    outcome = call("simulate", str(deepseek), "--machine-changes", str(changes))
    outcome.assert_two_lines(2)
    assert "import it with --expert-bytes" in outcome.err
