"""`hybrimoe plugin`: which llama.cpp the plug-in fits, and how to fit another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrimoe.cli.console import note, output_console, progress
from hybrimoe.cli.options import HELP_NAMES, finish
from hybrimoe.cli.report import table
from hybrimoe.errors import HybrimoeError

if TYPE_CHECKING:
    from hybrimoe.native.builds import Build, Fit

_JSON = typer.Option("--json/--no-json", help="Print JSON.", show_default=False)


def make_app() -> typer.Typer:
    """The commands below `hybrimoe plugin`."""
    app = typer.Typer(
        help="The plug-in in programs of llama.cpp: list, build.", context_settings=HELP_NAMES, rich_markup_mode=None
    )

    @app.callback(invoke_without_command=True)
    def start(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            print(context.get_help())

    @app.command("list", context_settings={**HELP_NAMES, "ignore_unknown_options": True})
    def list_(
        program: Annotated[
            list[str] | None,
            typer.Argument(metavar="[PROGRAM]...", help="Ask this one, with what starts it; else those in the PATH."),
        ] = None,
        as_json: Annotated[bool, _JSON] = False,
    ) -> None:
        """List the compiled plug-ins, and which of llama.cpp's programs they fit.

        A program is asked by letting it list its devices; no model is loaded.
        """
        finish(lambda: _list(program or [], as_json))

    @app.command(context_settings=HELP_NAMES)
    def build(
        llama_cpp: Annotated[
            Path,
            typer.Option(
                "--llama-cpp", metavar="DIR", help="A source tree of llama.cpp, or the folder it was installed into."
            ),
        ],
        as_json: Annotated[bool, _JSON] = False,
    ) -> None:
        """Compile the plug-in for another llama.cpp, unless the one of the package fits it. Takes a minute or two.

        Needs cmake, a C++ compiler and DIR's public headers. Programs find the build by themselves.
        """
        finish(lambda: _build(llama_cpp, as_json))

    return app


def _build(llama_cpp: Path, as_json: bool) -> None:
    from hybrimoe.native import builds

    with progress(f"compiling the plug-in for {llama_cpp}") as update:
        made = builds.build_plugin(llama_cpp, update)
    if made.source == "packaged":
        note("the package's own plug-in fits this llama.cpp: nothing was kept")
    print(json.dumps(made.to_dict()) if as_json else made.path)


def _list(program: list[str], as_json: bool) -> None:
    from hybrimoe.native import builds

    found = [builds.packaged(), *builds.builds()]
    commands = [program] if program else [[str(path)] for path in builds.known_programs()]
    fits = [_asked(command) for command in commands]
    if as_json:
        print(json.dumps({"plugins": [one.to_dict() for one in found], "programs": fits}, ensure_ascii=False))
        return
    console = output_console()
    rows = [[one.source, one.ggml, one.interface, one.version, str(one.path)] for one in found]
    console.print(table(["for", "ggml's headers", "interface", "hybrimoe", "file"], rows))
    if fits:
        rows = [[one["program"], one["ggml"], one["plugin"], one["reason"]] for one in fits]
        console.print(table(["program", "its ggml", "plug-in", "remark"], rows))
    elif not program:
        note("no program of llama.cpp is in the PATH", "hybrimoe plugin list PROGRAM")
    if any(one["plugin"] == "none fits" for one in fits):
        note("", "hybrimoe plugin build --llama-cpp DIR")


def _asked(command: list[str]) -> dict[str, Any]:
    from hybrimoe.native import builds

    row: dict[str, Any] = {"program": " ".join(command), "ggml": "", "plugin": "", "reason": ""}
    try:
        fit = builds.which_fits(command)
    except HybrimoeError as error:
        return {**row, "plugin": "not asked", "reason": error.message}
    if fit is None:
        return {**row, "plugin": "not loaded", "reason": "it loads no backends: a static build?"}
    return {**row, "ggml": fit.ggml, "plugin": _name(fit, builds.builds()), "reason": fit.reason}


def _name(fit: Fit, others: list[Build]) -> str:
    if not fit.fits:
        return "none fits"
    if not fit.other_build:
        return "packaged"
    return next((f"ggml {one.ggml}, {one.interface}" for one in others if str(one.path) == fit.other_build), "built")
