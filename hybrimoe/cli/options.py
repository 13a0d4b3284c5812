"""Commands from functions and option tables: the bridge between `hybrimoe.config` and typer."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from hybrimoe import config
from hybrimoe.cli.flags import ALL_OPTIONS, check_reproducible
from hybrimoe.config import Option, Settings
from hybrimoe.errors import EXIT_INTERRUPTED, EXIT_OK, UsageError

HELP_NAMES = {"help_option_names": ["-h", "--help"]}


def command(
    app: typer.Typer,
    name: str,
    run: Callable[[Settings, list[str]], int | None],
    options: Sequence[Option],
    metavar: str,
    *,
    starts_program: bool = False,
) -> None:
    """Adds a command that takes `options` and positionals; `run` gets the settings and the positionals.

    The flags are read as text and parsed by the option table, so that a wrong value has the same message wherever it
    came from. The docstring of `run` is the help. `starts_program`: the positionals are a command line, which begins
    with the first word that is no flag of ours.
    """
    parameters = [
        inspect.Parameter(
            "positionals",
            inspect.Parameter.KEYWORD_ONLY,
            annotation=Annotated[list[str] | None, typer.Argument(metavar=metavar, show_default=False)],
            default=None,
        ),
        *(_parameter(option) for option in options),
        inspect.Parameter(
            "print_config",
            inspect.Parameter.KEYWORD_ONLY,
            annotation=Annotated[
                bool, typer.Option("--print-config", help="Print every setting and where it comes from, then end.")
            ],
            default=False,
        ),
        inspect.Parameter(
            "hf_repo",
            inspect.Parameter.KEYWORD_ONLY,
            annotation=Annotated[
                str | None,
                typer.Option(
                    "-hf",
                    "-hfr",
                    "--hf-repo",
                    metavar="USER/REPO[:QUANT]",
                    help="Model from a Hugging Face hub, downloaded where it is missing.",
                    rich_help_panel="Model and speed",
                ),
            ],
            default=None,
        ),
    ]

    def invoke(positionals: list[str] | None, print_config: bool, hf_repo: str | None = None, **flags: Any) -> None:
        if hf_repo is not None and not print_config:
            if flags.get("model") is not None:
                raise UsageError("the model is given twice, by -m and by -hf")
            from hybrimoe.cli.hub import model_from_hub

            flags["model"] = str(model_from_hub(hf_repo, header_only=name == "plan" or bool(flags.get("dry_run"))))
        settings = config.resolve(options, flags, known=ALL_OPTIONS)
        check_reproducible(settings)
        if print_config:
            print(settings.describe())
            return
        finish(lambda: run(settings, positionals or []))

    if starts_program:
        parameters = [p for p in parameters if p.name != "hf_repo"]  # the program has its own
    invoke.__doc__ = run.__doc__
    invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    invoke.__annotations__ = {p.name: p.annotation for p in parameters}
    how = {"allow_interspersed_args": False} if starts_program else {}
    app.command(name, context_settings={**HELP_NAMES, **how})(invoke)


def _parameter(option: Option) -> inspect.Parameter:
    if option.is_switch:
        kind: Any = bool | None
        declarations = ["/".join(pair) for pair in _pairs(option)]
    else:
        kind = list[str] | None if option.repeats else str | None
        declarations = list(option.flags)
    metavar = None if option.is_switch else option.metavar
    info = typer.Option(
        *declarations, help=_help(option), metavar=metavar, show_default=False, rich_help_panel=option.section
    )
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, info], default=None
    )


def _pairs(option: Option) -> list[tuple[str, ...]]:
    """Flags of a switch with their negative forms, as typer wants them: `--x/--no-x`."""
    long = [f for f in option.flags if f.startswith("--")]
    short = [f for f in option.flags if not f.startswith("--")]
    no_long = [f for f in option.no_flags if f.startswith("--")]
    no_short = [f for f in option.no_flags if not f.startswith("--")]
    pairs: list[tuple[str, ...]] = list(zip(long, no_long, strict=True))
    return pairs + list(zip(short, no_short, strict=False)) + [(f,) for f in short[len(no_short) :]]


def _help(option: Option) -> str:
    default = option.default
    if default is None and option.unset != "none":
        return f"{option.help} [default: {option.unset}]"
    if default in (None, (), ""):
        return option.help
    shown = ("on" if default else "off") if option.is_switch else default
    return f"{option.help} [default: {shown}]"


def finish(run: Callable[[], int | None]) -> None:
    """Runs a command and ends with its exit code; a closed pipe is a clean end, Ctrl-C is 130."""
    try:
        code = run() or EXIT_OK
        sys.stdout.flush()
    except BrokenPipeError:
        code = forget_stdout()
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    raise typer.Exit(code)


def forget_stdout() -> int:
    """After a closed pipe: whoever read our output has seen enough, so nothing is written any more. Returns 0."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
            continue
        # Its buffer would raise again when the interpreter flushes it at exit.
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    return EXIT_OK
