"""`hybrimoe probe`: measures this machine and keeps the cost model's input."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hybrimoe.cli.console import note, output_console, stages
from hybrimoe.cli.options import HELP_NAMES, finish
from hybrimoe.cli.report import table

if TYPE_CHECKING:
    from hybrimoe.calibration import Calibration


def add_to(app: typer.Typer) -> None:
    @app.command(context_settings=HELP_NAMES)
    def probe(
        model: Annotated[
            str | None, typer.Argument(metavar="[MODEL]", help="Probe the shapes of this model's experts.")
        ] = None,
        quick: Annotated[bool, typer.Option("--quick/--no-quick", help="5 seconds instead of 30.")] = False,
        threads: Annotated[
            int | None, typer.Option("-t", "--threads", metavar="N", min=1, help="CPU threads that will be used.")
        ] = None,
        calibration: Annotated[
            Path | None, typer.Option("--calibration", metavar="FILE", help="Where the result goes.")
        ] = None,
        as_json: Annotated[
            bool, typer.Option("--json/--no-json", help="Print one JSON object.", show_default=False)
        ] = False,
    ) -> None:
        """Measure this machine: expert speed on CPU and card, copies, memory; keep the cost model.

        Close other programs first: a disturbed probe is refused.
        """
        finish(lambda: _probe(model, quick, threads, calibration, as_json))


def _probe(model: str | None, quick: bool, threads: int | None, path: Path | None, as_json: bool) -> int:
    from hybrimoe import calibration
    from hybrimoe.gguf_model import inspect
    from hybrimoe.models import store

    info = None if model is None else inspect(store.resolve(model), header_only=True).require_moe()
    seconds = calibration.QUICK_SECONDS if quick else calibration.FULL_SECONDS
    with stages() as update:
        made = calibration.probe(
            calibration.model_shapes(info),
            seconds=seconds,
            n_threads=threads,
            disk_path=info.path if info else None,
            progress=lambda step, share: update(f"probing: {step}", share),
        )
    path = path or calibration.default_path()
    made.save(path)
    if as_json:
        data = {k: v for k, v in made.data.items() if k != "samples"}
        json.dump({**data, "path": str(path)}, sys.stdout, ensure_ascii=False, indent=1)
        print()
    else:
        output_console().print(describe(made))
        note(f"kept in {path}")
    for reason in made.reasons:
        note(f"warning: {reason}: misses run on the CPU there")
    return 0


def describe(made: Calibration) -> str:
    """Tables of what was measured, with the errors of the fits."""
    from hybrimoe.calibration import _shape_of
    from hybrimoe.gguf_header import GGML_TYPES
    from hybrimoe.probing.measure import expert_bytes

    def name(data: dict[str, int]) -> str:
        return f"{data['n_embd']} x {data['n_ff']} {GGML_TYPES[data['gate_type']].name}"

    def cells(fit: dict[str, object], n_bytes: int) -> list[str]:
        points = fit["points"]
        assert isinstance(points, list)
        (_, one), (n, many) = points[0], points[-1]
        first = f"{fit['first_us']:.1f}"
        return [
            f"{fit['step_us']:.1f}",
            first,
            f"{one:.1f}",
            f"{n_bytes / one / 1000:.1f}",
            f"{many / n:.2f}",
            f"{fit['median_error']:.1%}",
        ]

    head = ["experts", "on", "step us", "first us", "one token us", "GB/s", "us a token, batch", "error"]
    rows = []
    for one in made.fit["cpu"]:
        n_bytes = expert_bytes(_shape_of(one["shape"]))
        for n, fit in one["by_threads"].items():
            rows.append([name(one["shape"]), f"CPU, {n} threads", *cells(fit, n_bytes)])
    for device in made.devices:
        for fit in device["experts"]:
            n_bytes = expert_bytes(_shape_of(fit["shape"]))
            rows.append([name(fit["shape"]), f"device {device['device']}", *cells(fit, n_bytes)])
    parts = [table(head, rows)]
    links = [
        [f"device {d['device']}: {kind}", f"{c['latency_us']:.1f}", f"{c['bytes_per_us'] / 1000:.1f}",
         f"{c['median_error']:.1%}"]
        for d in made.devices for kind, c in d["copies"].items() if c is not None
    ]  # fmt: skip
    if links:
        parts.append(table(["copies", "latency us", "GB/s", "error"], links))
        for d in made.devices:
            parts.append(
                f"device {d['device']}: launch and wait {d['sync_us']:.1f} us; memory read beside copies, in all "
                f"{d['dram_bytes_per_us'] / 1000:.1f} GB/s"
            )
    reads = ", ".join(f"{v / 1000:.1f} GB/s with {n} threads" for n, v in made.fit["read_bytes_per_us"].items())
    parts.append(f"memory reads: {reads}")
    if made.fit["disk_bytes_per_us"] is not None:
        parts.append(f"disk reads: {made.fit['disk_bytes_per_us'] / 1000:.2f} GB/s")
    return "\n\n".join(parts)
