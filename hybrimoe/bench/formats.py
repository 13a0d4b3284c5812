"""llama-bench's five formats: md, csv, json, jsonl, sql. Rows are written as they are finished."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from hybrimoe.bench.rows import FIELDS, LLAMA_BENCH_FIELDS, Row, ratios

__all__ = ["FORMATS", "Printer", "make_printer"]

_SQL_TYPES = {"s": "TEXT", "b": "INTEGER", "i": "INTEGER", "f": "REAL"}
_MIB, _GIB = 1 << 20, 1 << 30


class Printer(Protocol):
    """Text before, for each group of rows of one test, and after."""

    def head(self) -> str: ...
    def rows(self, rows: Sequence[Row]) -> str: ...
    def foot(self) -> str: ...


class _Csv:
    def head(self) -> str:
        return ",".join(FIELDS) + "\n"

    def rows(self, rows: Sequence[Row]) -> str:
        out = io.StringIO()
        writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
        for row in rows:
            writer.writerow(_texts(row.values()))
        return out.getvalue()

    def foot(self) -> str:
        return ""


class _Json:
    def __init__(self) -> None:
        self._first = True

    def head(self) -> str:
        return "[\n"

    def rows(self, rows: Sequence[Row]) -> str:
        parts = []
        for row in rows:
            text = json.dumps(_object(row), ensure_ascii=False, indent=2)
            parts.append(("" if self._first else ",\n") + "\n".join("  " + line for line in text.splitlines()))
            self._first = False
        return "".join(parts)

    def foot(self) -> str:
        return "\n]\n"


class _Jsonl:
    def head(self) -> str:
        return ""

    def rows(self, rows: Sequence[Row]) -> str:
        return "".join(json.dumps(_object(row), ensure_ascii=False) + "\n" for row in rows)

    def foot(self) -> str:
        return ""


class _Sql:
    def head(self) -> str:
        columns = ",\n".join(f"  {name} {_SQL_TYPES[kind]}" for name, kind in FIELDS.items())
        return f"CREATE TABLE IF NOT EXISTS llama_bench (\n{columns}\n);\n\n"

    def rows(self, rows: Sequence[Row]) -> str:
        lines = []
        for row in rows:
            texts = ["NULL" if v is None else _quoted(t) for v, t in _pairs(row.values())]
            lines.append(f"INSERT INTO llama_bench ({', '.join(FIELDS)}) VALUES ({', '.join(texts)});\n")
        return "".join(lines)

    def foot(self) -> str:
        return ""


# Columns of the table beside the usual ones: field of Setup, head; shown when it varies or is not the default.
_SHOWN = {
    "n_gpu_layers": "ngl",
    "n_cpu_moe": "n_cpu_moe",
    "n_batch": "n_batch",
    "n_ubatch": "n_ubatch",
    "type_k": "type_k",
    "type_v": "type_v",
    "flash_attn": "fa",
    "load_mode": "lm",
    "repack": "rpk",
    "overrides": "ot",
    "device": "dev",
    "expert_cache": "cache",
    "cache_policy": "cache_policy",
    "schedule": "schedule",
    "prefetch": "prefetch",
    "admission": "admission",
}


class _Markdown:
    """llama-bench's table with a column that says who ran, and the ratio to plain llama.cpp (paired, mean)."""

    def __init__(self, shown: Sequence[str], notes: Sequence[str]) -> None:
        self._shown = shown
        self._notes = notes
        self._head = ["model", "size", "params", "backend", "threads", *(_SHOWN[name] for name in shown)]
        self._head += ["run by", "test", "t/s", "x llama.cpp"]
        self._widths = [30, 10, 10, 10, 7, *(max(6, len(_SHOWN[name])) for name in shown), 9, 15, 20, 11]
        self._commits: dict[str, int] = {}
        self._details: list[str] = []

    def head(self) -> str:
        right = {"size", "params", "threads", "test", "t/s", "x llama.cpp"}
        lines = "|".join(
            f" {'-' * (w - 1)}{':' if name in right else '-'} "
            for name, w in zip(self._head, self._widths, strict=True)
        )
        return self._line(self._head) + f"|{lines}|\n"

    def rows(self, rows: Sequence[Row]) -> str:
        stock = next((row for row in rows if not row.is_ours), None)
        return "".join(self._row(row, stock) for row in rows)

    def _row(self, row: Row, stock: Row | None) -> str:
        v = row.values()
        self._commits[v["build_commit"]] = v["build_number"]
        size = v["model_size"]
        n = v["model_n_params"]
        cells = [
            v["model_type"],
            f"{size / _MIB:.2f} MiB" if size < _GIB else f"{size / _GIB:.2f} GiB",
            f"{n / 1e6:.2f} M" if n < 1e9 else f"{n / 1e9:.2f} B",
            v["backends"],
            str(v["n_threads"]),
        ]
        for name in self._shown:
            own = name in ("expert_cache", "cache_policy", "schedule", "prefetch", "admission")
            cells.append("" if own and not row.is_ours else str(getattr(row.setup, name)))
        ratio = "" if stock is None or row is stock else f"{statistics.fmean(ratios(row, stock)):.2f}"
        cells += [
            "hybrimoe" if row.is_ours else str(v["sched_policy"]),
            row.test.name,
            f"{v['avg_ts']:.2f} ± {v['stddev_ts']:.2f}",
            ratio,
        ]
        text = self._line(cells)
        if v["hit_rate"] is not None:
            moved = v["h2d_bytes"] / _MIB / max(1, row.test.n_tokens)
            experts = v["n_expert_gpu"] + v["n_expert_cpu"]
            self._details.append(
                f"{row.test.name}: {v['n_slots']} slots a layer, {v['hit_rate']:.0%} hit, "
                f"{v['n_expert_gpu'] / max(1, experts):.0%} of the experts on the GPU, {moved:.1f} MiB moved a token"
            )
        return text

    def _line(self, cells: Sequence[str]) -> str:
        left = {0, 3, len(self._head) - 4}
        padded = (
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, self._widths, strict=True))
        )
        return f"| {' | '.join(padded)} |\n"

    def foot(self) -> str:
        builds = ", ".join(f"{commit} ({number})" for commit, number in self._commits.items())
        return "\n".join(["", *self._details, f"build: {builds}", *self._notes]) + "\n"


FORMATS = ("csv", "json", "jsonl", "md", "sql")


def make_printer(name: str, shown: Sequence[str] = (), notes: Sequence[str] = ()) -> Printer:
    """The printer of a format; `shown` are fields of Setup that the table shows, `notes` lines below it."""
    if name == "md":
        return _Markdown(shown, notes)
    printers: dict[str, type[Printer]] = {"csv": _Csv, "json": _Json, "jsonl": _Jsonl, "sql": _Sql}
    return printers[name]()


def shown_fields(values: Mapping[str, Sequence[Any]], defaults: Mapping[str, Any]) -> list[str]:
    """Fields of Setup worth a column: several values, or one that is not the default."""
    return [name for name in _SHOWN if len(values[name]) > 1 or values[name][0] != defaults[name]]


def _object(row: Row) -> dict[str, Any]:
    """llama-bench's keys come first, in its order, as its readers expect."""
    values = row.values()
    return {
        **{name: values[name] for name in LLAMA_BENCH_FIELDS},
        "samples_ns": row.samples_ns,
        "samples_ts": row.samples_ts,
        **{name: values[name] for name in FIELDS if name not in LLAMA_BENCH_FIELDS},
    }


def _texts(values: Mapping[str, Any]) -> list[str]:
    return [text for _, text in _pairs(values)]


def _pairs(values: Mapping[str, Any]) -> list[tuple[Any, str]]:
    """(value, text as llama-bench writes it) of every field: bools as 0 and 1, floats with six places."""
    pairs = []
    for name, kind in FIELDS.items():
        value = values[name]
        if value is None:
            pairs.append((None, ""))
        elif kind == "b":
            pairs.append((value, str(int(value))))
        else:
            pairs.append((value, f"{value:.6f}" if kind == "f" else str(value)))
    return pairs


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
