#!/usr/bin/env python3
"""Predicted and measured decode time on the CPU, side by side: probes the machine, predicts, loads, generates.

For every model: a probe of its expert shapes, the plan's prediction from it, then a real run with the plug-in, whose
counters give the experts' share. Two probes before and after tell how far their parameters repeat. Run it on an idle
machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hybrimoe import calibration
from hybrimoe.errors import HybrimoeError, as_script
from hybrimoe.gguf_model import GgufModel, inspect
from hybrimoe.native.probe import FfnShape

_N_TRIES = 3  # a disturbed probe is refused
_PROMPT = "The history of computing begins with"


def predict(model: GgufModel, found: calibration.Calibration, n_ctx: int) -> dict[str, float]:
    """Microseconds of one decoded token: all of it, and its experts."""
    from hybrimoe.machine.here import this_machine
    from hybrimoe.planning import Setting, make_plan

    plan = make_plan(model, Setting(n_ctx=n_ctx), this_machine(found))
    if plan.ours is None:
        raise HybrimoeError(f"'{model.path.name}' does not fit: {plan.memory.reason}", plan.memory.nearest)
    decode = plan.ours[1]
    total = 1e6 / decode.per_s
    return {"token_us": total, "experts_us": total * decode.experts_share}


def measure(path: Path, n_threads: int, n_tokens: int, n_ctx: int) -> dict[str, float]:
    """The same, measured: the median over `n_tokens` decode steps."""
    from hybrimoe.engine import Engine, EngineOptions
    from hybrimoe.generation import Sampling

    with Engine(path, EngineOptions(n_ctx=n_ctx, n_threads=n_threads)) as engine:
        tokens = engine.text_prompt(_PROMPT)
        times: list[float] = []
        engine.eval(tokens)
        engine.reset_counters()
        token = tokens[-1]
        for i in range(n_tokens + 4):
            if i == 4:  # the first steps still find pages and threads cold
                engine.reset_counters()
                times.clear()
            start = time.perf_counter()
            engine.eval([token])
            times.append((time.perf_counter() - start) * 1e6)
            token = engine.sample(temp=Sampling().temp, top_k=40)  # not timed: no part of the model
            if engine.is_end(token):
                token = tokens[1 % len(tokens)]
        totals = engine.stats()["totals"]
        return {
            "token_us": statistics.median(times),
            "experts_us": (totals["experts_us"] + totals["merge_us"]) / n_tokens,
        }


def parameters(found: calibration.Calibration) -> dict[str, float]:
    """What two probes are compared by: per shape, at the last thread count."""
    out = {}
    for number, one in enumerate(found.fit["cpu"]):
        fit = one["by_threads"][str(found.n_threads)]
        out[f"shape {number}: one token us"] = fit["points"][0][1]
        out[f"shape {number}: {fit['points'][-1][0]:.0f} tokens us"] = fit["points"][-1][1]
        out[f"shape {number}: fixed us"] = fit["step_us"] + fit["first_us"]
    out["memory GB/s"] = found.fit["read_bytes_per_us"][str(found.n_threads)] / 1000
    return out


def _probe(shapes: Sequence[FfnShape], seconds: float, n_threads: int) -> calibration.Calibration:
    for _ in range(_N_TRIES - 1):
        with contextlib.suppress(calibration.CalibrationError):
            return calibration.probe(shapes, seconds=seconds, n_threads=n_threads, devices=())
    return calibration.probe(shapes, seconds=seconds, n_threads=n_threads, devices=())


def validate(path: Path, *, seconds: float, n_threads: int, n_tokens: int, n_ctx: int) -> dict[str, Any]:
    """One model. Raises HybrimoeError (a disturbed probe among others)."""
    model = inspect(path).require_moe()
    shapes = calibration.model_shapes(model)
    first = _probe(shapes, seconds, n_threads)
    measured = measure(path, n_threads, n_tokens, n_ctx)
    second = _probe(shapes, seconds, n_threads)
    predicted = predict(model, first, n_ctx)
    one, two = parameters(first), parameters(second)
    return {
        "model": model.path.name,
        "cpu": first.data["key"]["cpu"],
        "n_threads": n_threads,
        "date": first.data["date"],
        "predicted": predicted,
        "measured": measured,
        "error": {k: predicted[k] / measured[k] - 1 for k in predicted},
        "probes": {k: [one[k], two[k], two[k] / one[k] - 1 if one[k] else 0.0] for k in one},
        "calibration": first.data,
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| model | predicted us a token | measured | error | experts: predicted | measured | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        p, m, e = r["predicted"], r["measured"], r["error"]
        cells = [f"{p['token_us']:.0f}", f"{m['token_us']:.0f}", f"{e['token_us']:+.1%}"]
        cells += [f"{p['experts_us']:.0f}", f"{m['experts_us']:.0f}", f"{e['experts_us']:+.1%}"]
        lines.append(f"| {r['model']} | {' | '.join(cells)} |")
    lines += ["", "| model | parameter | first probe | second probe | change |", "|---|---|---|---|---|"]
    for r in results:
        for name, (a, b, change) in r["probes"].items():
            lines.append(f"| {r['model']} | {name} | {a:.2f} | {b:.2f} | {change:+.1%} |")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """The probe's samples and its fit: time of a batch over active experts, and of one expert over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = result["calibration"]
    n_threads = data["n_threads"][-1]
    fit = data["fit"]["cpu"][0]["by_threads"][str(n_threads)]
    samples = [s for s in data["samples"]["cpu"][0]["samples"] if s["n_threads"] == n_threads]
    fixed = fit["step_us"] + fit["first_us"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for s in samples:
        if s["n_tokens"] == 1:
            left.plot([s["n_active"]] * len(s["us"]), s["us"], ".", color="tab:blue", alpha=0.3)
        if s["n_active"] and s["n_tokens"] >= 1:
            each = [(us - fixed) / s["n_active"] for us in s["us"]]
            right.plot([s["n_tokens"]] * len(each), each, ".", color="tab:blue", alpha=0.3)
    most = max(s["n_active"] for s in samples)
    left.plot([0, most], [fixed, fixed + most * fit["points"][0][1]], color="tab:orange")
    left.set(xlabel="active experts, one token each", ylabel="us a batch", ylim=(0, None))
    right.plot(*zip(*fit["points"], strict=True), color="tab:orange")
    right.set(xlabel="tokens", ylabel="us an expert", xscale="log", yscale="log")
    shape = data["fit"]["cpu"][0]["shape"]
    figure.suptitle(
        f"{shape['n_embd']} x {shape['n_ff']}, {n_threads} threads, {data['key']['cpu']}, {data['date']}; "
        f"median error {fit['median_error']:.1%}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


@as_script
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--seconds", type=float, default=10.0, help="per probe (default: %(default)s)")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-n", type=int, default=48, dest="n_tokens", help="decode steps (default: %(default)s)")
    parser.add_argument("-c", type=int, default=512, dest="n_ctx")
    parser.add_argument("--json", type=Path, metavar="FILE", help="results with all samples")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the first model's probe as PNG (needs matplotlib)")
    args = parser.parse_args(argv)
    results = [
        validate(path, seconds=args.seconds, n_threads=args.threads, n_tokens=args.n_tokens, n_ctx=args.n_ctx)
        for path in args.models
    ]
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    if args.plot:
        plot(results[0], args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
