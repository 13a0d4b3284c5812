"""`hybrimoe doctor`: one page about machine, libraries and plug-in."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from hybrimoe.cli.console import output_console, size_text
from hybrimoe.cli.options import HELP_NAMES, finish

if TYPE_CHECKING:
    from hybrimoe.doctor import Diagnosis

_MARKS = {"ok": ("ok", "green"), "note": ("note", "cyan"), "warning": ("warning", "yellow"), "error": ("error", "red")}


def add_to(app: typer.Typer) -> None:
    @app.command(context_settings=HELP_NAMES)
    def doctor(
        as_json: Annotated[
            bool, typer.Option("--json/--no-json", help="Print one JSON object.", show_default=False)
        ] = False,
        run: Annotated[
            bool, typer.Option("--run/--no-run", help="Run the demo model for 8 tokens.", show_default=False)
        ] = True,
    ) -> None:
        """Examine machine, libraries and plug-in: what works, what is wrong, and the mend.

        The plug-in is not only looked for: the demo model runs through it, where it is built.
        """
        finish(lambda: _doctor(as_json, run))


def _doctor(as_json: bool, run: bool) -> int:
    from hybrimoe.doctor import diagnose

    diagnosis = diagnose(run=run)
    if as_json:
        json.dump(diagnosis.to_dict(), sys.stdout, ensure_ascii=False, indent=1)
        print()
    else:
        _print(diagnosis)
    return diagnosis.exit_code


def _print(d: Diagnosis) -> None:
    from rich.text import Text

    m = d.machine
    limit = f", limited to {size_text(m['memory_limit_bytes'])}" if m["memory_limit_bytes"] else ""
    rows = [
        ("machine", f"{m['system']}, Python {m['python']}"),
        ("cpu", f"{m['cpu']}, {m['n_cores']} cores, {m['n_threads']} threads, {m['vector_level']}"),
        ("memory", f"{size_text(m['memory_bytes'])}, {size_text(m['memory_available_bytes'])} free{limit}"),
        *(("gpu", _gpu(g)) for g in m["gpus"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in d.versions.items())),
        *(("backend", f"{b['name']} ({b['kind']}): {b['description']}") for b in d.backends),
    ]
    if d.plugin.get("loaded"):
        rows.append(("plug-in", f"ABI {d.plugin['abi']}, compiled for ggml {d.plugin['compiled_for_ggml']}"))
    console = output_console()
    for name, text in rows:
        console.print(f"{name:<9} {text}")
    console.print()
    for finding in d.findings:
        mark, style = _MARKS[finding.level]
        console.print(Text.assemble((f"{mark:<9} ", style), f"{finding.topic}: {finding.message}"))
        if finding.mend:
            console.print(f"{'':<9} mend: {finding.mend}")


def _gpu(gpu: dict[str, object]) -> str:
    size = gpu["memory_bytes"]
    return f"{gpu['name']}, {size_text(size)}" if isinstance(size, int) else str(gpu["name"])
