#!/usr/bin/env python3
"""Holds `hybrimoe plan` against speeds that others measured: `make field LIST=FILE`.

FILE is a list of points as tools/field/speeds.json (tools/field/README.md describes the format). Each point becomes a
header without weights and one command line, whose prediction for plain llama.cpp with the user's own placement is
compared.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from field_models import write_header

from hybrimoe.errors import HybrimoeError, UsageError, as_script, from_os_error

PUBLIC_LIST = Path(__file__).resolve().parent / "field" / "speeds.json"
# Of an answer whose length is not told.
_USUAL_ANSWER = 512
_MOST_LAYERS = 512
_HINT = "tools/field/README.md describes the format"


def read_list(path: Path) -> list[dict[str, Any]]:
    """The points of a list. Raises UsageError, HybrimoeError."""
    try:
        points = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise from_os_error(error, f"read '{path}'") from error
    except ValueError as error:
        raise UsageError(
            f"'{path}' is not valid JSON: {error}", "tools/field/README.md describes the format"
        ) from error
    if not isinstance(points, list) or not all(isinstance(p, dict) and "id" in p and "cpu" in p for p in points):
        raise UsageError(f"'{path}' is not a list of points", _HINT)
    return points


def machine_text(point: dict[str, Any]) -> str:
    """The point's machine as `--machine` takes it."""
    from hybrimoe.machine.parts import find_cpu

    parts = []
    gpu, cpu, ram, link = point.get("gpu"), point["cpu"], point["ram"], point.get("link")
    if gpu:
        parts.append(f"gpu={gpu.get('count', 1)}*{gpu['name']}")
    name, n_sockets = _sockets(str(cpu["name"]).split(",")[0])
    if name.lower().startswith("not stated"):
        name = "unknown"
    sockets = f"{n_sockets}*" if n_sockets > 1 else ""
    parts.append(f"cpu={sockets}{name}")
    try:
        find_cpu(name)
        known = name != "unknown"
    except HybrimoeError:
        known = False
    if not known:
        parts.append(f"cores={max(1, cpu['cores'] // n_sockets)}")
    kind = ram["type"].lower().split()[0]
    parts.append(f"ram={kind}-{ram['mts']:g}x{ram['channels']}:{ram['gib']:g}GiB")
    if link and "gen" in link:
        parts.append(f"link=pcie{link['gen']}x{link.get('lanes', 16)}")
    if link and "gbs" in link:
        parts.append(f"link-gbs={link['gbs']}")
    return ",".join(parts)


def _sockets(name: str) -> tuple[str, int]:
    """'2x EPYC 7742', 'dual EPYC 7742', 'EPYC 7742 x2': the name, and how many."""
    for pattern in (r"(?P<n>\d)\s*[x\u00d7*]\s+(?P<name>.+)", r"(?P<name>.+?)\s+[x\u00d7]\s*(?P<n>\d)"):
        if match := re.fullmatch(pattern, name.strip(), re.IGNORECASE):
            return match["name"], int(match["n"])
    if name.lower().startswith("dual "):
        return name[5:], 2
    return name, 1


def plan_flags(point: dict[str, Any]) -> list[str]:
    """Setting and placement as flags of `hybrimoe plan`."""
    flags, prompt = point.get("flags", {}), point.get("pp", {}).get("tokens")
    n_ubatch = min(flags.get("ub", 512), max(prompt or 512, 32))
    answer = point.get("tg", {}).get("tokens") or _USUAL_ANSWER
    words: list[Any] = ["-c", flags.get("ctx", 1024), "-ub", n_ubatch, "-b", max(2048, n_ubatch)]
    words += ["-p", prompt or n_ubatch, "-d", flags.get("depth", 0) + answer // 2]
    words += ["-ctk", flags.get("ctk", "f16"), "-ctv", flags.get("ctv", "f16")]
    if point.get("gpu"):
        words += ["-ngl", min(flags.get("ngl", _MOST_LAYERS), _MOST_LAYERS)]
    if flags.get("cmoe"):
        words.append("-cmoe")
    elif flags.get("ncmoe"):
        words += ["-ncmoe", flags["ncmoe"]]
    rules = flags.get("ot", [])
    for rule in [rules] if isinstance(rules, str) else rules:
        words += ["-ot", rule]
    return [str(word) for word in words]


def price(point: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One point: its command, and of decode and prefill what was measured and predicted."""
    result: dict[str, Any] = {"id": point["id"], "class": group(point), "kin": bool(point.get("kin"))}
    try:
        header = folder / f"{point['model']}-{point['quant'].replace('+', 'p')}.gguf"
        if not header.exists():
            part = folder / f".{point['id']}.part"
            write_header(part, point["model"], point["quant"])
            part.replace(header)
        command = ["plan", str(header), "--machine", machine_text(point), *plan_flags(point)]
    except KeyError as error:
        return {**result, "error": f"unknown: {error}"}
    result["command"] = shlex.join(["hybrimoe", *command]).replace(str(folder) + "/", "")
    done = subprocess.run(
        [sys.executable, "-m", "hybrimoe.cli.main", *command, "--json"], capture_output=True, text=True,
        env={**os.environ, "XDG_CONFIG_HOME": str(folder)},
    )  # fmt: skip
    try:
        plan = json.loads(done.stdout)
    except ValueError:
        return {**result, "error": (done.stderr.strip().splitlines() or ["no answer"])[0]}
    stock = plan["speed"]["stock"]
    result["fits"] = plan["ways"][0]["fits"] if plan["ways"] else None
    for name, key in (("decode", "tg"), ("prefill", "pp")):
        measured = point.get(key, {}).get("tps")
        if measured and stock:
            scored = not point[key].get("unscored")
            result[name] = {"measured": measured, "scored": scored, **stock[name]}
            result[name]["error"] = stock[name]["tokens_per_s"] / measured - 1
    return result


def group(point: dict[str, Any]) -> str:
    """Where the experts were: 'CPU only', 'all on the card' or 'hybrid'."""
    if not point.get("gpu"):
        return "CPU only"
    flags = point.get("flags", {})
    return "hybrid" if flags.get("cmoe") or flags.get("ncmoe") or flags.get("ot") else "all on the card"


GROUPS: tuple[tuple[str, Callable[[dict[str, Any]], bool]], ...] = (
    ("all", lambda p: True),
    ("all on the card", lambda p: group(p) == "all on the card"),
    ("CPU only", lambda p: group(p) == "CPU only"),
    ("hybrid", lambda p: group(p) == "hybrid"),
    ("hybrid or CPU, DDR4", lambda p: group(p) != "all on the card" and p["ram"]["type"] == "DDR4"),
    ("hybrid or CPU, DDR5", lambda p: group(p) != "all on the card" and p["ram"]["type"] != "DDR4"),
    ("gpt-oss", lambda p: p["model"].startswith("gpt-oss")),
    ("Qwen3", lambda p: p["model"].startswith(("qwen3-30b", "qwen3-235b"))),
    ("Qwen3-Next, 3.5, 3.6", lambda p: p["model"].startswith(("qwen3-next", "qwen3.5"))),
    ("latent attention", lambda p: p["model"].startswith(("deepseek", "kimi", "glm-4.7-flash"))),
)


def scores(points: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Errors by group of 'decode' or 'prefill'."""
    by_id = {p["id"]: p for p in points}
    rows = []
    for label, belongs in GROUPS:
        found = [
            r[name] for r in results if name in r and r[name]["scored"] and belongs(by_id[r["id"]])
        ]  # fmt: skip
        if found:
            rows.append({"group": label, **summary(found)})
    return rows


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of predictions with their measurements: median absolute error, bias, spread, and what the range holds."""
    errors = [one["error"] for one in found]
    return {
        "n": len(found),
        "median_error": statistics.median(abs(e) for e in errors),
        "bias": statistics.median(errors),
        "mean_log_error": statistics.fmean(abs(math.log1p(e)) for e in errors),
        "inside": sum(one["low"] <= one["measured"] <= one["high"] for one in found) / len(found),
        "width": statistics.median(one["high"] / one["low"] for one in found),
    }


HEAD = ["group", "n", "median error", "bias", "inside", "high/low"]


def score_cells(row: dict[str, Any]) -> list[str]:
    return [
        row["group"], str(row["n"]), f"{row['median_error']:.0%}", f"{row['bias']:+.0%}", f"{row['inside']:.0%}",
        f"{row['width']:.2f}",
    ]  # fmt: skip


def report(points: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]]) -> str:
    """Tables of points and groups."""
    from hybrimoe.cli.report import table

    rows = []
    for r in results:
        cells = [r["id"]]
        for name in ("decode", "prefill"):
            one = r.get(name)
            if one is None:
                cells += ["", r.get("error", "")[:60] if name == "decode" else "", ""]
                continue
            mark = "" if one["scored"] else "*"
            predicted = f"{one['tokens_per_s']:.4g} ({one['low']:.3g}-{one['high']:.3g})"
            cells += [f"{one['measured']:g}{mark}", predicted, f"{one['error']:+.0%}"]
        rows.append(cells)
    head = ["point", "decode", "predicted", "error", "prefill", "predicted", "error"]
    parts = [table(head, rows), "* not scored"]
    for name in ("decode", "prefill"):
        if found := scores(points, results, name):
            parts.append(f"{name}\n" + table(HEAD, [score_cells(row) for row in found]))
    return "\n\n".join(parts)


@as_script
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", nargs="?", type=Path, default=PUBLIC_LIST, help="default: the public list")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the points as JSON")
    parser.add_argument("--only", default="", metavar="ID,ID", help="these points")
    args = parser.parse_args(argv)
    points = read_list(args.list)
    if args.only:
        points = [p for p in points if p["id"] in args.only.split(",")]
    with tempfile.TemporaryDirectory(prefix="hybrimoe-field-") as folder, ThreadPoolExecutor(2) as pool:
        results = []
        for i, result in enumerate(pool.map(lambda p: price(p, Path(folder)), points)):
            results.append(result)
            if sys.stderr.isatty():
                print(f"\r{i + 1} of {len(points)} points", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(report(points, results))
    if args.json is not None:
        groups = {name: scores(points, results, name) for name in ("decode", "prefill")}
        try:
            args.json.write_text(json.dumps({"points": results, "groups": groups}, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise from_os_error(error, f"write '{args.json}'") from error
    return 0 if not any("error" in r for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
