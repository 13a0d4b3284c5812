#!/usr/bin/env python3
"""Fits the constants of the speed model that have no source, on the public list, and prints how well that carries over.

Each machine (card, CPU, memory) is left out in turn: the constants are fitted to the others, and its points priced with
them. That error is what another machine has to expect. `--terms` shows what each fitted constant is good
for (the error when it stays at its first guess), and whether fitting others would help.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from field_models import write_header
from price_field import (
    HEAD,
    PUBLIC_LIST,
    group,
    machine_text,
    plan_flags,
    read_list,
    score_cells,
    scores,
)

from hybrimoe.errors import as_script
from hybrimoe.machine.constants import CONSTANTS, FITTED, Constants

# Where a fit begins and, with the weight of a twentieth of a point, is drawn to: half of what is ideal for arithmetic,
# matrix products that are half full at one tile of 32, one read and one write of activations.
_GUESS = {"streaming_share": 0.5, "half_tokens": 32.0, "activation_moves": 2.0}
# Not fitted, for `--terms`: would fitting them help?
_OTHERS = ("node_us", "handover_us", "matrix_share", "card_bandwidth_share", "dram_share", "attention_share")
_PULL, _PULL_SIGMA = 0.05, 0.5
_MOST_SHARE = 0.95
_FIRST_STEP, _LAST_STEP = 0.4, 0.05
# Constants that a speed does not depend on.
_NO_MATTER = {
    "decode": {"half_tokens", "activation_moves", "matrix_share", "attention_share"},
    "prefill": {"handover_us"},
}
# Beyond this logarithm an error counts linearly: a machine that is described wrongly must not decide.
_BEND = 0.15


@dataclass
class Point:
    """One measurement with all that its prediction needs."""

    data: dict[str, Any]
    work: Any
    machine: Any
    place: Any
    depth: int
    n_prompt: int
    priced: dict[tuple[Any, ...], dict[str, Any]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The machine: same card, CPU and memory."""
        p = self.data
        return json.dumps([p.get("gpu"), p["cpu"]["name"], {k: p["ram"][k] for k in ("type", "mts", "channels")}])

    def has(self, name: str) -> bool:
        one = self.data.get({"decode": "tg", "prefill": "pp"}[name], {})
        return bool(one.get("tps")) and not one.get("unscored")

    def price(self, name: str, k: Constants) -> dict[str, Any]:
        """Prediction and measurement of 'decode' or 'prefill'; kept, since a fit comes back to the same constants."""
        seen = (name, *(getattr(k, one) for one in (*FITTED, *_OTHERS) if one not in _NO_MATTER[name]))
        if seen not in self.priced:
            self.priced[seen] = self._price(name, k)
        return self.priced[seen]

    def _price(self, name: str, k: Constants) -> dict[str, Any]:
        from hybrimoe.planning.speed import SpeedModel

        model = SpeedModel(self.work, self.machine, self.depth, k)
        speed = model.stock_decode(self.place) if name == "decode" else model.stock_prefill(self.place, self.n_prompt)
        measured = self.data[{"decode": "tg", "prefill": "pp"}[name]]["tps"]
        return {
            "measured": measured, "scored": True, "error": speed.per_s / measured - 1, "low": speed.low,
            "high": speed.high,
        }  # fmt: skip


def load(points: Sequence[dict[str, Any]], folder: Path) -> list[Point]:
    """Asks llama.cpp for each model's buffers and graph."""
    from hybrimoe.dry_load import dry_load
    from hybrimoe.gguf_model import inspect
    from hybrimoe.machine.describe import describe
    from hybrimoe.planning import Request, Setting
    from hybrimoe.planning.placement import LayerPlacement
    from hybrimoe.planning.work import ModelWork

    found = []
    for p in points:
        path = folder / f"{p['model']}-{p['quant'].replace('+', 'p')}.gguf"
        if not path.exists():
            write_header(path, p["model"], p["quant"])
        info = inspect(path, header_only=True)
        words = plan_flags(p)
        value = {words[i]: words[i + 1] for i in range(len(words) - 1) if words[i].startswith("-")}
        setting = Setting(
            int(value["-c"]), int(value["-b"]), int(value["-ub"]), "auto", value["-ctk"], value["-ctv"]
        ).of_model(info)  # fmt: skip
        work = ModelWork(info, setting, dry_load(info, setting.load_shape()))
        request = Request(
            int(value.get("-ngl", 0)), "-cmoe" in words, int(value.get("-ncmoe", 0)), p.get("flags", {}).get("ot", ())
        )
        place = LayerPlacement.of(work, request)
        machine = describe(machine_text(p))
        found.append(Point(p, work, machine, place, int(value["-d"]), int(value["-p"])))
    return found


def loss(points: Sequence[Point], k: Constants, free: Sequence[str]) -> float:
    """Sum over decode and prefill; a machine with several points counts as the root of their number."""
    total = 0.0
    for name in ("decode", "prefill"):
        chosen = [p for p in points if p.has(name)]
        keys = [p.key for p in chosen]
        for p in chosen:
            x = abs(math.log1p(p.price(name, k)["error"]))
            total += (x * x / (2 * _BEND) if x < _BEND else x - _BEND / 2) / math.sqrt(keys.count(p.key))
    start = {n: _GUESS.get(n, getattr(CONSTANTS, n)) for n in free}
    return total + _PULL * sum((math.log(getattr(k, n) / start[n]) / _PULL_SIGMA) ** 2 for n in free)


def fit(points: Sequence[Point], free: Sequence[str]) -> Constants:
    """Coordinate search in logarithms from the first guesses."""
    k = replace(CONSTANTS, **_GUESS)
    best, step = loss(points, k, free), _FIRST_STEP
    while step > _LAST_STEP:
        improved = False
        for name in free:
            for sign in (1, -1):
                value = getattr(k, name) * math.exp(sign * step)
                if name.endswith("_share") and value > _MOST_SHARE:
                    continue
                tried = replace(k, **{name: value})
                found = loss(points, tried, free)
                if found < best - 1e-9:
                    k, best, improved = tried, found, True
        step = step if improved else step / 2
    return k


def leave_one_out(points: Sequence[Point], free: Sequence[str]) -> list[dict[str, Any]]:
    """Each point priced with constants that have not seen its machine."""
    results = []
    for key in dict.fromkeys(p.key for p in points):
        k = fit([p for p in points if p.key != key], free)
        for p in points:
            if p.key == key:
                priced = {name: p.price(name, k) for name in ("decode", "prefill") if p.has(name)}
                results.append({"id": p.data["id"], "class": group(p.data), **priced})
    return results


def _print(title: str, points: Sequence[Point], results: Sequence[dict[str, Any]]) -> None:
    from hybrimoe.cli.report import table

    data = [p.data for p in points]
    for name in ("decode", "prefill"):
        rows = [score_cells(row) for row in scores(data, results, name)]
        print(f"\n{name}, {title}\n{table(HEAD, rows)}")


@as_script
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", nargs="?", type=Path, default=PUBLIC_LIST, help="default: the public list")
    parser.add_argument("--terms", action="store_true", help="also without each constant in turn")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="hybrimoe-fit-") as folder:
        points = load(read_list(args.list), Path(folder))
    k = fit(points, FITTED)
    print("fitted to all: " + ", ".join(f"{name} {getattr(k, name):.3g} ({getattr(CONSTANTS, name):g} in use)"
                                        for name in FITTED))  # fmt: skip
    used = [
        {"id": p.data["id"], **{n: p.price(n, CONSTANTS) for n in ("decode", "prefill") if p.has(n)}} for p in points
    ]
    _print("constants in use", points, used)
    left_out = leave_one_out(points, FITTED)
    _print("each machine left out", points, left_out)
    if args.terms:
        changes = [(f"without {name}", [n for n in FITTED if n != name]) for name in FITTED]
        changes += [(f"with {name} too", [*FITTED, name]) for name in _OTHERS]
        for title, free in changes:
            results = leave_one_out(points, free)
            both = []
            for what in ("decode", "prefill"):
                row = scores([p.data for p in points], results, what)[0]
                both.append(f"{what} {row['median_error']:.1%} (mean {row['mean_log_error']:.3f})")
            print(f"{title}: {', '.join(both)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
