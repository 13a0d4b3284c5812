"""Two files of results side by side."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hybrimoe.bench.cases import Test
from hybrimoe.bench.rows import COMMIT_PREFIX, KEY_FIELDS
from hybrimoe.errors import UsageError, from_os_error
from hybrimoe.files import read_text

__all__ = ["Pair", "compare", "read_rows", "render"]

_SETTINGS = ("sched_policy", "cache_policy", "prefetch_policy", "n_slots", "prompt_source")
# A build or a machine may differ: that is what one compares. The rest must be equal.
_MAY_DIFFER = ("cpu_info", "gpu_info", "backends", "model_filename")


@dataclass(frozen=True)
class Pair:
    """One test in both files; tokens per second with the deviation over the repetitions. `ratio` is b over a."""

    model: str
    run_by: str
    test: str
    a_ts: float
    a_stddev: float
    b_ts: float
    b_stddev: float
    ratio: float
    differs: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a jsonl or json file of bench or llama-bench. Raises UsageError for a file that holds none."""
    try:
        text = read_text(path)
    except UnicodeDecodeError:
        raise UsageError(f"'{path}' is no text", "give files of 'hybrimoe bench -o jsonl'") from None
    except OSError as error:
        raise from_os_error(error, f"read '{path}'", "give files of 'hybrimoe bench -o jsonl'") from error
    wrong = UsageError(f"'{path}' holds no results of bench", "give files of 'hybrimoe bench -o jsonl'")
    try:
        whole = json.loads(text)
        rows = whole if isinstance(whole, list) else [whole]
    except ValueError:
        try:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError:
            raise wrong from None
    needed = {*KEY_FIELDS, "build_commit", "avg_ts", "stddev_ts"}
    if not rows or not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        raise wrong
    return rows


def _run_by(row: Mapping[str, Any]) -> str:
    return "hybrimoe" if str(row["build_commit"]).startswith(COMMIT_PREFIX) else "llama.cpp"


def compare(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """Rows that both have: same model, settings, test and program. Raises UsageError when there is none."""

    def key(row: Mapping[str, Any], full: bool) -> tuple[Any, ...]:
        names = [name for name in KEY_FIELDS if name not in _MAY_DIFFER]
        return (_run_by(row), *(row[n] for n in names), *(row.get(n) for n in _SETTINGS if full))

    pairs = []
    for mine in a:
        found = [row for row in b if key(row, False) == key(mine, False)]
        # With several settings of ours the same one, otherwise the only one there is.
        same = [row for row in found if key(row, True) == key(mine, True)]
        others = [row for row in a if key(row, False) == key(mine, False)]
        if not same and (len(found) != 1 or len(others) != 1):
            continue
        other = (same or found)[0]
        names = (*_MAY_DIFFER, "build_commit", *_SETTINGS)
        differs = [f"{n}: {mine.get(n)} / {other.get(n)}" for n in names if mine.get(n) != other.get(n)]
        test = Test(int(mine["n_prompt"]), int(mine["n_gen"]), int(mine["n_depth"]))
        a_ts, b_ts = float(mine["avg_ts"]), float(other["avg_ts"])
        pairs.append(
            Pair(
                str(mine["model_type"]),
                _run_by(mine),
                test.name,
                a_ts,
                float(mine["stddev_ts"]),
                b_ts,
                float(other["stddev_ts"]),
                b_ts / a_ts if a_ts else 0.0,
                "; ".join(differs),
            )
        )
    if not pairs:
        raise UsageError(
            "the files have no row in common: model, test or settings differ", "measure both with the same flags"
        )
    return pairs


def render(pairs: Sequence[Pair], name: str, a: str, b: str) -> str:
    """The comparison as md, csv, json or jsonl. Raises UsageError for sql."""
    if name == "json":
        return json.dumps([p.to_dict() for p in pairs], ensure_ascii=False, indent=1)
    if name == "jsonl":
        return "\n".join(json.dumps(p.to_dict(), ensure_ascii=False) for p in pairs)
    if name == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, list(pairs[0].to_dict()), quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writeheader()
        writer.writerows(p.to_dict() for p in pairs)
        return out.getvalue().rstrip("\n")
    if name == "sql":
        raise UsageError("a comparison has no sql form", "use -o md, csv, json or jsonl")
    head = ["model", "run by", "test", f"t/s {a}", f"t/s {b}", "ratio"]
    cells = [
        [
            p.model,
            p.run_by,
            p.test,
            f"{p.a_ts:.2f} ± {p.a_stddev:.2f}",
            f"{p.b_ts:.2f} ± {p.b_stddev:.2f}",
            f"{p.ratio:.2f}",
        ]
        for p in pairs
    ]
    widths = [max(len(row[i]) for row in [head, *cells]) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, strict=True)
        return "| " + " | ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(cells)) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i < 2 else ":") for i, w in enumerate(widths)) + "|"
    notes = list(dict.fromkeys(f"different: {p.differs}" for p in pairs if p.differs))
    return "\n".join([line(head), rule, *(line(row) for row in cells), *([""] if notes else []), *notes])
