"""The application: its commands, and how it ends."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from hybrimoe.cli import options
from hybrimoe.cli.console import show_error
from hybrimoe.cli.flags import (
    CHAT_COMMAND_OPTIONS,
    PLAN_COMMAND_OPTIONS,
    RUN_COMMAND_OPTIONS,
    SERVE_COMMAND_OPTIONS,
)
from hybrimoe.config import Settings
from hybrimoe.errors import EXIT_INTERRUPTED, EXIT_OK, HybrimoeError, UsageError, from_os_error

# typer's own usage errors; their class has no public name in every release that we support.
_TYPER_ERROR: type[Exception] = typer.BadParameter.__mro__[2]


def make_app() -> typer.Typer:
    """The command-line application. Commands import what they need when they run."""
    app = typer.Typer(
        name="hybrimoe",
        help="Run Mixture-of-Experts models on CPU and GPU together, on unmodified llama.cpp.",
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings=options.HELP_NAMES,
    )

    @app.callback(invoke_without_command=True)
    def start(
        context: typer.Context,
        version: bool = typer.Option(False, "--version", help="Print the versions and end."),
    ) -> None:
        if version:
            print(_versions())
            raise typer.Exit(EXIT_OK)
        if context.invoked_subcommand is None:
            print(context.get_help())

    options.command(app, "chat", _chat, CHAT_COMMAND_OPTIONS, "[MODEL]")
    options.command(app, "run", _run, RUN_COMMAND_OPTIONS, "[MODEL] [PROMPT or -]")
    options.command(app, "serve", _serve, SERVE_COMMAND_OPTIONS, "[MODEL]")
    options.command(app, "plan", _plan, PLAN_COMMAND_OPTIONS, "[MODEL]")
    from hybrimoe.cli import bench, doctor, exec, models, plugin, probe, profile, simulate, top, trace

    options.command(app, "bench", _bench, bench.BENCH_OPTIONS, "MODEL")
    options.command(app, "profile", _profile, profile.PROFILE_OPTIONS, "[MODEL]")
    options.command(app, "exec", _exec, exec.EXEC_OPTIONS, "-- PROGRAM [ITS FLAGS]", starts_program=True)

    app.add_typer(models.make_app(), name="models")
    app.add_typer(trace.make_app(), name="trace")
    app.add_typer(plugin.make_app(), name="plugin")
    simulate.add_to(app)
    doctor.add_to(app)
    probe.add_to(app)
    top.add_to(app)
    return app


def _chat(settings: Settings, positionals: list[str]) -> int:
    """Chat in the terminal; without MODEL with the built-in demo model.

    Commands in the chat begin with a slash: /help lists them. When stdin is no terminal, each of its lines is answered.
    """
    if settings.dry_run:
        from hybrimoe.cli.plan import dry_run

        return dry_run(settings, positionals)
    from hybrimoe.cli.chat import chat

    return chat(settings, positionals)


def _run(settings: Settings, positionals: list[str]) -> int:
    """Answer one prompt: from the argument, -p, -f FILE or stdin.

    MODEL is a GGUF file or a name from 'hybrimoe models list'; without one the built-in demo model answers.
    """
    if settings.dry_run:
        from hybrimoe.cli.plan import dry_run

        return dry_run(settings, positionals)
    from hybrimoe.cli.run import run

    return run(settings, positionals)


def _serve(settings: Settings, positionals: list[str]) -> int:
    """Answer programs: OpenAI's interface at /v1, a page for people at /, figures at /metrics and /live.

    MODEL is a GGUF file or a name from 'hybrimoe models list'; without one the built-in demo model answers.
    """
    if settings.dry_run:
        from hybrimoe.cli.plan import dry_run

        return dry_run(settings, positionals)
    from hybrimoe.cli.serve import serve

    return serve(settings, positionals)


def _plan(settings: Settings, positionals: list[str]) -> int:
    """Say before loading whether MODEL runs, where everything goes, how fast, and what would help.

    The file's header is enough: it also works before the download is complete. Exit code 4: it does not fit.
    """
    from hybrimoe.cli.plan import plan

    return plan(settings, positionals)


def _profile(settings: Settings, positionals: list[str]) -> int:
    """Show where MODEL's time goes: CPU, GPU, link, per layer, and what limits it; without MODEL the demo model.

    Runs texts of several domains, then writes an HTML report and a timeline for Perfetto beside the summary.
    """
    from hybrimoe.cli.profile import profile

    return profile(settings, positionals)


def _bench(settings: Settings, positionals: list[str]) -> int:
    """Measure MODEL as llama-bench does, with plain llama.cpp beside; without MODEL the built-in demo model.

    Tests, columns and formats are llama-bench's, columns of our own follow them. Plain llama.cpp runs in a process that
    never loads the plug-in; repetitions alternate. Only the decode calls are timed.
    """
    from hybrimoe.cli.bench import bench

    return bench(settings, positionals)


def _exec(settings: Settings, positionals: list[str]) -> None:
    """Start another llama.cpp program with the plug-in: llama-server, llama-cli, llama-completion, llama-bench, ...

    For example: hybrimoe exec -- llama-server -m model.gguf -c 32768. Its model and its flags are read, experts are
    placed as 'hybrimoe serve' would, and the program is started unmodified. docs/hosts.md tells the details.
    """
    from hybrimoe.cli.exec import execute

    execute(settings, positionals)


def _versions() -> str:
    from importlib import metadata

    import hybrimoe

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    parts = [f"llama-cpp-python {version('llama-cpp-python')}"]
    try:
        from hybrimoe.llama_log import llama_log
        from hybrimoe.native.plugin import ABI_VERSION, ggml_library, load_plugin

        llama_log()
        parts.append(f"ggml {ggml_library().ggml_version().decode()}")
        parts.append(f"plug-in {load_plugin().version}, ABI {ABI_VERSION}")
    except (HybrimoeError, ImportError, OSError) as error:
        parts.append(f"no plug-in: {error}")
    return f"hybrimoe {hybrimoe.__version__} ({', '.join(parts)})"


def run_app(arguments: Sequence[str]) -> int:
    """Runs the program and returns its exit code; what goes wrong is two lines on stderr."""
    _prepare_streams()
    own = _own_words(arguments)
    verbose = "-v" in own or "--verbose" in own
    try:
        code = make_app()(args=list(arguments), prog_name="hybrimoe", standalone_mode=False)
        return code if isinstance(code, int) else EXIT_OK
    except HybrimoeError as error:
        _fail(error, verbose)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except _TYPER_ERROR as error:
        return _usage_error(error, arguments)
    except BrokenPipeError:
        return options.forget_stdout()
    except OSError as error:
        return _fail(from_os_error(error, f"use '{error.filename}'" if error.filename else "go on"), verbose)
    except MemoryError:
        return _fail(HybrimoeError("memory is used up", "use a smaller context with -c, or a smaller model"), verbose)
    except Exception as error:
        return _fail(HybrimoeError(f"unexpected {type(error).__name__}: {error}", "run again with -v"), verbose)


def _own_words(arguments: Sequence[str]) -> list[str]:
    """The arguments without those of a program that they start."""
    if "--" in arguments:
        return list(itertools.takewhile(lambda word: word != "--", arguments))
    if "exec" not in arguments:
        return list(arguments)
    return list(itertools.takewhile(lambda word: word.startswith("-") or word == "exec", arguments))


def _prepare_streams() -> None:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # The caller closed it (`>&-`): what would go there goes nowhere.
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        stream = getattr(sys, name)
        # What the terminal's encoding lacks becomes '?' instead of an error.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _fail(error: HybrimoeError, verbose: bool) -> int:
    """Prints the error, with the traceback when the user asked for details. Returns the exit code."""
    if verbose and sys.exc_info()[0] is not None:
        import traceback

        traceback.print_exc()
    show_error(error)
    return error.exit_code


def _usage_error(error: Exception, arguments: Sequence[str]) -> int:
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    command = next((a for a in arguments if not a.startswith("-")), "")
    known = command in (
        "chat", "run", "serve", "top", "models", "doctor", "plan", "probe", "trace", "simulate", "bench", "profile",
        "exec",
    )  # fmt: skip
    hint = f"hybrimoe {command} --help" if known else "hybrimoe --help"
    if command == "exec":
        hint = f"{hint}; flags of the program come behind it: hybrimoe exec -- llama-server -m model.gguf"
    return _fail(UsageError(message[:1].lower() + message[1:], hint), verbose=False)
