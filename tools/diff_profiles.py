#!/usr/bin/env python3
"""Compares two profiles: what became faster or slower, phase by phase and layer by layer.

`hybrimoe profile MODEL --json > A.json`, then the same with another build or other settings, then
`diff_profiles.py A.json B.json`. Differences are B minus A. Exit code 1 with --fail-above PERCENT when a token takes
that much longer in B.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hybrimoe.cli.report import table
from hybrimoe.errors import UsageError, as_script, from_os_error
from hybrimoe.profiling.limits import PATH_NAMES

PHASES = {"decode": "generation", "prefill": "prompt"}
LAYER_TIMES = ("router_us", "plan_us", "launch_us", "cpu_us", "gpu_us", "copies_us", "wait_us", "merge_us")


def read(path: Path) -> dict[str, Any]:
    """A profile. Raises UsageError for a file that holds none."""
    wrong = UsageError(f"'{path}' is no profile", "give files of 'hybrimoe profile --json'")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise from_os_error(error, f"read '{path}'") from error
    except ValueError:
        raise wrong from None
    if not isinstance(data, dict) or data.get("format") != 1 or "phases" not in data:
        raise wrong
    return data


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that both have, as JSON-able data. Raises UsageError when they are of different models."""
    if a["model"]["name"] != b["model"]["name"]:
        raise UsageError(
            f"the profiles are of different models: {a['model']['name']} and {b['model']['name']}",
            "profile the same model twice",
        )
    found: dict[str, Any] = {"model": a["model"]["name"], "settings": {}, "phases": {}}
    keys = sorted({*a["settings"], *b["settings"]})
    for key in keys:
        if a["settings"].get(key) != b["settings"].get(key):
            found["settings"][key] = [a["settings"].get(key), b["settings"].get(key)]
    for key in ("commit", "llama_cpp_python"):
        if a["tool"][key] != b["tool"][key]:
            found["settings"][key] = [a["tool"][key], b["tool"][key]]
    if a["machine"] != b["machine"]:
        found["settings"]["machine"] = [a["machine"], b["machine"]]
    for name in PHASES:
        if name in a["phases"] and name in b["phases"]:
            found["phases"][name] = _phase(a["phases"][name], b["phases"][name])
    if not found["phases"]:
        raise UsageError("the profiles have no phase in common", "profile both with the same -p and -n")
    return found


def _phase(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    of_b = {layer["layer"]: layer for layer in b["layers"]}
    layers = []
    for mine in a["layers"]:
        other = of_b.get(mine["layer"])
        if other is not None:
            changes = {key: other[key] - mine[key] for key in ("total_us", *LAYER_TIMES)}
            layers.append({"layer": mine["layer"], "a_us": mine["total_us"], **changes})
    return {
        "a_ms_per_token": a["ms_per_token"],
        "b_ms_per_token": b["ms_per_token"],
        "change": b["ms_per_token"] / a["ms_per_token"] - 1.0,
        "a_us": a["critical_us_per_token"],
        "b_us": b["critical_us_per_token"],
        "hit_rate": [a["experts"]["hit_rate"], b["experts"]["hit_rate"]],
        "h2d_bytes_per_token": [p["experts"]["h2d_bytes_per_token"] for p in (a, b)],
        "limit": [a["limit"]["what"], b["limit"]["what"]],
        "layers": layers,
    }


def text(found: Mapping[str, Any], n_layers: int) -> str:
    """The difference for people; the layers that changed most."""
    lines = [found["model"]]
    lines += [f"different {key}: {a} / {b}" for key, (a, b) in found["settings"].items()]
    for name, phase in found["phases"].items():
        title = PHASES[name]
        rows = []
        for part, label in PATH_NAMES.items():
            a, b = phase["a_us"][part], phase["b_us"][part]
            if max(a, b) > 0:
                rows.append([label, f"{a:.1f}", f"{b:.1f}", f"{b - a:+.1f}", f"{b / a - 1:+.0%}" if a else "new"])
        a, b = 1e3 * phase["a_ms_per_token"], 1e3 * phase["b_ms_per_token"]
        rows.append(["all", f"{a:.1f}", f"{b:.1f}", f"{b - a:+.1f}", f"{phase['change']:+.1%}"])
        lines += ["", table([f"{title}, us a token", "A", "B", "B - A", "change"], rows)]
        if phase["hit_rate"][0] is not None and phase["hit_rate"][1] is not None:
            lines.append(f"hit rate {phase['hit_rate'][0]:.0%} / {phase['hit_rate'][1]:.0%}")
        if phase["limit"][0] != phase["limit"][1]:
            lines.append(f"what limits: {phase['limit'][0]} / {phase['limit'][1]}")
        most = sorted(phase["layers"], key=lambda layer: -abs(layer["total_us"]))[:n_layers]
        head = [f"{title}, layer", "A us", "B - A", *(key.removesuffix("_us") for key in LAYER_TIMES)]
        rows = [
            [str(x["layer"]), f"{x['a_us']:.1f}", f"{x['total_us']:+.1f}", *(f"{x[key]:+.1f}" for key in LAYER_TIMES)]
            for x in most
        ]
        if rows:
            lines += ["", table(head, rows)]
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, metavar="A.json")
    parser.add_argument("b", type=Path, metavar="B.json")
    parser.add_argument("--layers", type=int, default=5, metavar="N", help="layers to show (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--fail-above", type=float, metavar="PERCENT", help="exit code 1 when B is that much slower")
    return parser.parse_args(argv)


@as_script
def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    found = difference(read(options.a), read(options.b))
    print(json.dumps(found, ensure_ascii=False) if options.json else text(found, options.layers))
    slower = max(100 * phase["change"] for phase in found["phases"].values())
    return 1 if options.fail_above is not None and slower > options.fail_above else 0


if __name__ == "__main__":
    sys.exit(main())
