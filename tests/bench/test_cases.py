"""Lists, tests and setups as llama-bench reads them; rows and formats."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybrimoe.bench.cases import Setup, int_ranges, list_tests, prompt_and_gen, setups_of
from hybrimoe.bench.cases import Test as Case
from hybrimoe.bench.compare import compare, read_rows, render
from hybrimoe.bench.formats import make_printer, shown_fields
from hybrimoe.bench.rows import FIELDS, LLAMA_BENCH_FIELDS, Row, ratios
from hybrimoe.bench.tokens import token_stream
from hybrimoe.cli.bench import _DEFAULTS
from hybrimoe.errors import UsageError


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("512", (512,)),
        ("128,256", (128, 256)),
        ("1-4", (1, 2, 3, 4)),
        ("64-512*2", (64, 128, 256, 512)),
        ("512-2048+512,7", (512, 1024, 1536, 2048, 7)),
        ("0", (0,)),
    ],
)
def test_lists_are_llama_benchs(text: str, values: tuple[int, ...]) -> None:
    assert int_ranges(0)(text) == values


@pytest.mark.parametrize("text", ["", "x", "1,", "4-1", "1-8*1", "1-99999", "-3", "1.5", "1-2-3"])
def test_bad_lists_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        int_ranges(0)(text)


def test_names_of_tests() -> None:
    tests = list_tests([512, 0], [128], [(16, 4), (0, 0)], [0, 64])
    names = ["pp512", "tg128", "pp16+tg4", "pp512 @ d64", "tg128 @ d64", "pp16+tg4 @ d64"]
    assert [t.name for t in tests] == names
    assert tests[5].n_ctx == 84
    with pytest.raises(UsageError):
        list_tests([0], [0], [], [0])
    assert prompt_and_gen("512, 128") == (512, 128)
    with pytest.raises(ValueError):
        prompt_and_gen("512")


def values_of(**changes: Any) -> dict[str, list[Any]]:
    values = {name: [value] for name, value in _DEFAULTS.items()} | {"model": ["m.gguf"], "n_threads": [2]}
    return values | changes


def test_setups_are_all_combinations() -> None:
    setups = setups_of(values_of(n_ubatch=[256, 512], expert_cache=["0", "auto"]))
    assert [(s.n_ubatch, s.expert_cache) for s in setups] == [(256, "0"), (256, "auto"), (512, "0"), (512, "auto")]


def facts(plugin: bool) -> dict[str, Any]:
    return {
        "build_commit": "hybrimoe-1234567" if plugin else "llama.cpp-0.3.36",
        "build_number": 0,
        "cpu_info": 'a "fast" CPU',
        "gpu_info": "",
        "backends": "CPU",
        "model_type": "toy's model",
        "model_size": 1 << 20,
        "model_n_params": 2_500_000,
        "n_layers": 12,
        "prompt_source": "corpus",
        "placement": "llama.cpp",
    }


def row(plugin: bool, *ns: int, **changes: Any) -> Row:
    setup = setups_of(values_of())[0]
    made = Row(plugin, Case(100, 0), replace(setup, **changes), facts(plugin))
    experts = {
        "n_hits": 30,
        "n_misses": 10,
        "h2d_bytes": 5 << 20,
        "n_experts_cpu": 25,
        "n_experts_gpu": 75,
        "n_slots": 8,
        "cache_bytes": 1000,
        "prefetch_used": 3,
        "why_unused": "",
    }
    for n in ns:
        made.samples.append({"ns": n, "ttft_ns": n, "experts": experts if plugin else None})
    return made


def test_values_of_a_row() -> None:
    values = row(True, 10**9, 2 * 10**9).values()
    assert list(values) == list(FIELDS) and len(LLAMA_BENCH_FIELDS) == 42
    # The mean of the speeds, as llama-bench has it, not the speed of the mean time.
    assert values["avg_ts"] == pytest.approx(75.0) and values["stddev_ts"] == pytest.approx(35.355, abs=0.01)
    assert values["avg_ns"] == 15 * 10**8 and values["ttft_ms"] == 1500.0
    assert values["hit_rate"] == 0.75 and values["sched_policy"] == "two-threshold"
    stock = row(False, 10**9).values()
    assert stock["stddev_ts"] == 0.0 and stock["hit_rate"] is None and stock["sched_policy"] == "llama.cpp"
    assert row(True, 1, n_cpu_moe=-1).values()["n_cpu_moe"] == 12


@pytest.mark.parametrize(
    ("changes", "is_marked"),
    [
        ({"device": "CUDA0", "expert_cache": "auto"}, True),
        ({"device": "CUDA0", "expert_cache": "0"}, False),
        ({"device": "CUDA0", "expert_cache": "0%"}, False),
        ({"device": "none", "expert_cache": "6"}, False),
        ({"device": None, "expert_cache": "6"}, True),
        ({"device": None, "expert_cache": "auto"}, False),
        ({"device": "CUDA0", "n_cpu_moe": -1}, False),
        ({"device": "CUDA0", "n_cpu_moe": 12}, False),
        ({"device": "CUDA0", "n_cpu_moe": 11}, True),
    ],
)
def test_a_cache_that_was_asked_for_and_not_used(changes: dict[str, Any], is_marked: bool) -> None:
    """Slots that never came count as well as slots that nobody asked."""
    none = {"n_hits": 0, "n_misses": 0, "n_slots": 0, "cache_bytes": 0, "why_unused": "no memory"}
    for counts in (none, none | {"n_slots": 8, "cache_bytes": 1000}):
        made = row(True, 1, **changes)
        made.samples[0]["experts"] |= counts
        assert made.is_cache_unused == is_marked
        assert made.why_unused == ("no memory" if is_marked else "")
        assert (made.values()["sched_policy"] == "cpu-only (cache not used)") == is_marked
    assert not row(True, 1, **changes).is_cache_unused


def test_a_gpu_is_asked_for_a_cache_by_default() -> None:
    made = row(True, 1)
    made.samples[0]["experts"] |= {"n_hits": 0, "n_misses": 0}
    assert not made.is_cache_unused
    made.facts = {**made.facts, "gpu_info": "a card"}
    assert made.is_cache_unused


def test_ratios_are_paired() -> None:
    assert list(ratios(row(True, 10, 40), row(False, 20, 20))) == [2.0, 0.5]


def text_of(name: str, rows: list[Row]) -> str:
    printer = make_printer(name)
    return printer.head() + printer.rows(rows[:1]) + printer.rows(rows[1:]) + printer.foot()


def test_formats_hold_the_same() -> None:
    rows = [row(False, 10**9), row(True, 10**9)]
    as_json = json.loads(text_of("json", rows))
    assert as_json == [json.loads(line) for line in text_of("jsonl", rows).splitlines()]
    assert list(as_json[0])[:42] == list(LLAMA_BENCH_FIELDS)
    assert as_json[1]["samples_ns"] == [10**9] and as_json[1]["n_slots"] == 8 and as_json[0]["n_slots"] is None
    in_csv = list(csv.DictReader(io.StringIO(text_of("csv", rows))))
    assert in_csv[0]["cpu_info"] == 'a "fast" CPU' and in_csv[0]["cpu_strict"] == "0" and in_csv[0]["hit_rate"] == ""
    database = sqlite3.connect(":memory:")
    database.executescript(text_of("sql", rows))
    found = database.execute("SELECT model_type, avg_ts, hit_rate FROM llama_bench ORDER BY hit_rate").fetchall()
    assert found == [("toy's model", 100.0, None), ("toy's model", 100.0, 0.75)]


def test_table_shows_who_ran_and_the_ratio() -> None:
    printer = make_printer("md", ["n_ubatch"], ["machine: this"])
    text = printer.head() + printer.rows([row(False, 2 * 10**9), row(True, 10**9)]) + printer.foot()
    head, rule, stock, ours, *rest = text.splitlines()
    assert head.count("|") == rule.count("|") == stock.count("|") == ours.count("|")
    assert "llama.cpp" in stock and stock.split("|")[-2].strip() == ""
    assert "hybrimoe" in ours and ours.split("|")[-2].strip() == "2.00"
    assert any("8 slots a layer, 75% hit" in line for line in rest) and "machine: this" in rest
    assert shown_fields(values_of(n_ubatch=[512, 256]), _DEFAULTS | {"n_threads": 2}) == ["n_ubatch"]


def written(path: Path, rows: list[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_comparison(tmp_path: Path) -> None:
    a = [json.loads(line) for line in text_of("jsonl", [row(False, 10**9), row(True, 10**9)]).splitlines()]
    b = [json.loads(line) for line in text_of("jsonl", [row(False, 10**9), row(True, 5 * 10**8)]).splitlines()]
    b[1]["cache_policy"] = "lru"
    pairs = compare(read_rows(written(tmp_path / "a.jsonl", a)), read_rows(written(tmp_path / "b.jsonl", b)))
    assert [(p.run_by, p.ratio) for p in pairs] == [("llama.cpp", 1.0), ("hybrimoe", 2.0)]
    assert "cache_policy: mrs / lru" in pairs[1].differs
    assert json.loads(render(pairs, "json", "a", "b"))[1]["ratio"] == 2.0
    assert "cache_policy: mrs / lru" in render(pairs, "md", "a", "b")
    b[0]["n_prompt"] = b[1]["n_prompt"] = 7
    with pytest.raises(UsageError, match="no row in common"):
        compare(a, b)


@pytest.mark.parametrize("content", ["", "{}", "[1]", "not json", '{"a": 1}\n{"b": 2}', "\xff"])
def test_files_without_results_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UsageError):
        read_rows(path)


def test_tokens_of_a_source(tmp_path: Path) -> None:
    def tokenize(text: str) -> list[int]:
        return [ord(c) for c in text]

    assert token_stream("random", 5, tokenize, 10) == token_stream("random", 5, tokenize, 10)
    corpus = token_stream("corpus", 100_000, tokenize, 10)
    assert len(corpus) == 100_000 and len(set(corpus)) > 60
    file = tmp_path / "text.txt"
    file.write_text("abc")
    assert token_stream(str(file), 7, tokenize, 10) == [97, 98, 99, 97, 98, 99, 97]
    file.write_text("")
    with pytest.raises(UsageError):
        token_stream(str(file), 7, tokenize, 10)


def test_setup_round_trip() -> None:
    setup = setups_of(values_of())[0]
    assert Setup(**json.loads(json.dumps(setup.to_dict()))) == setup
