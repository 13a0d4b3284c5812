"""`hybrimoe trace`: record, look at, convert and import routing traces."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from hybrimoe.cli.console import note, output_console, progress, warn
from hybrimoe.cli.options import HELP_NAMES, finish
from hybrimoe.errors import EXIT_INTERRUPTED, EXIT_OK, UsageError

_JSON = typer.Option("--json/--no-json", help="Print JSON.", show_default=False)
_OUTPUT = typer.Option("-o", "--output", metavar="FILE", help="The file to write.", show_default=False)
_FORCE = typer.Option("--force/--no-force", help="Replace an existing file.", show_default=False)
_PROMPTS = typer.Option("--prompts", metavar="N", min=1, help="Only the first N prompts.", show_default=False)


def make_app() -> typer.Typer:
    """The commands below `hybrimoe trace`."""
    app = typer.Typer(
        help="Routing traces: record, info, convert, import.", context_settings=HELP_NAMES, rich_markup_mode=None
    )

    @app.callback(invoke_without_command=True)
    def start(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            print(context.get_help())

    @app.command(context_settings=HELP_NAMES)
    def record(
        model: Annotated[
            str | None, typer.Argument(metavar="[MODEL or PID]", help="By default the demo model; with --attach a PID.")
        ] = None,
        output: Annotated[Path | None, _OUTPUT] = None,
        prompt: Annotated[
            list[str] | None, typer.Option("-p", "--prompt", metavar="TEXT", help="A prompt; may be repeated.")
        ] = None,
        file: Annotated[
            list[Path] | None, typer.Option("-f", "--file", metavar="FILE", help="A file as prompt; may be repeated.")
        ] = None,
        prompts: Annotated[int | None, _PROMPTS] = None,
        n_predict: Annotated[
            int | None,
            typer.Option(
                "-n",
                "--n-predict",
                metavar="N",
                min=-1,
                help="Tokens to answer [default: 64]; with --attach tokens to record [default: until Ctrl-C].",
                show_default=False,
            ),
        ] = None,
        ctx_size: Annotated[
            int, typer.Option("-c", "--ctx-size", metavar="N", min=0, help="Context in tokens.")
        ] = 2048,
        ubatch_size: Annotated[
            int, typer.Option("-ub", "--ubatch-size", metavar="N", min=1, help="Prefill step.")
        ] = 512,
        threads: Annotated[int | None, typer.Option("-t", "--threads", metavar="N", help="CPU threads.")] = None,
        n_gpu_layers: Annotated[
            int, typer.Option("-ngl", "--n-gpu-layers", metavar="N", help="Layers on the GPU, -1 for all.")
        ] = -1,
        temp: Annotated[float, typer.Option("--temp", metavar="T", min=0.0, help="Temperature.")] = 0.0,
        seed: Annotated[int, typer.Option("-s", "--seed", metavar="N", help="Random seed.")] = 0,
        conversation: Annotated[
            bool, typer.Option("--conversation/--no-conversation", help="Prompts go through the chat template.")
        ] = True,
        scores: Annotated[
            str, typer.Option("--scores", metavar="KIND", help="All router scores as f16 or f32, or none.")
        ] = "f16",
        lookahead: Annotated[
            bool, typer.Option("--lookahead/--no-lookahead", help="Record what the next gates would predict.")
        ] = True,
        attach: Annotated[
            bool,
            typer.Option(
                "--attach/--no-attach", help="Read along in a running process ('hybrimoe top').", show_default=False
            ),
        ] = False,
        force: Annotated[bool, _FORCE] = False,
    ) -> None:
        """Record routing while the model answers prompts: experts, weights, all scores and look-ahead predictions.

        Without -p and -f it answers a set of everyday questions. Nothing is timed. With --attach it records what a
        process that 'hybrimoe top' shows computes meanwhile, until Ctrl-C or N tokens: experts and weights, no scores.
        """
        if attach:
            finish(lambda: _attach(model, output, n_predict, force))
        texts = (prompt or [], file or [], prompts)
        load = (ctx_size, ubatch_size, threads, n_gpu_layers)
        finish(
            lambda: _record(
                model,
                output,
                texts,
                64 if n_predict is None else n_predict,
                load,
                (temp, seed),
                conversation,
                (scores, lookahead),
                force,
            )
        )

    @app.command(context_settings=HELP_NAMES)
    def info(
        trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A trace file.")],
        as_json: Annotated[bool, _JSON] = False,
        metrics: Annotated[
            bool, typer.Option("--metrics/--no-metrics", help="Measure how well the model caches.", show_default=False)
        ] = False,
        prompts: Annotated[int | None, _PROMPTS] = None,
        model: Annotated[
            str | None, typer.Option("-m", "--model", metavar="MODEL", help="Check that the trace is of this model.")
        ] = None,
    ) -> None:
        """Show what a trace holds; with --metrics what it says about its model, with one sentence of advice."""
        finish(lambda: _info(trace, as_json, metrics, prompts, model))

    @app.command(context_settings=HELP_NAMES)
    def convert(
        trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A trace file.")],
        output: Annotated[Path, _OUTPUT],
        prompts: Annotated[int | None, _PROMPTS] = None,
        without: Annotated[
            list[str] | None,
            typer.Option("--without", metavar="ARRAY", help="Leave out: weights, scores, lookahead, events, ..."),
        ] = None,
        force: Annotated[bool, _FORCE] = False,
    ) -> None:
        """Write a trace as .trace, .npz or .csv (one row per routed expert), or a part of it."""
        finish(lambda: _convert(trace, output, prompts, without or [], force))

    @app.command("import", context_settings=HELP_NAMES)
    def import_(
        files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Traces of another format.")],
        output: Annotated[Path, _OUTPUT],
        form: Annotated[
            str, typer.Option("--format", metavar="NAME", help="npz, moe-beyond, route-csv, layer-csv or auto.")
        ] = "auto",
        name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="The model's name.")] = None,
        n_expert: Annotated[
            int | None, typer.Option("--n-expert", metavar="N", min=1, max=1024, help="Experts per layer.")
        ] = None,
        top_k: Annotated[
            int | None, typer.Option("--top-k", metavar="K", min=1, max=1024, help="Experts per token (CSV).")
        ] = None,
        expert_bytes: Annotated[
            str | None, typer.Option("--expert-bytes", metavar="SIZE", help="Bytes of one expert, such as 4.9MB.")
        ] = None,
        force: Annotated[bool, _FORCE] = False,
    ) -> None:
        """Import traces of other formats; several files are the prompts of one trace, in order."""
        finish(lambda: _import(files, output, form, (name, n_expert, top_k, expert_bytes), force))

    return app


def _record(
    name: str | None,
    output: Path | None,
    texts: tuple[list[str], list[Path], int | None],
    n_predict: int,
    load: tuple[int, int, int | None, int],
    sample: tuple[float, int],
    conversation: bool,
    what: tuple[str, bool],
    force: bool,
) -> int:
    from hybrimoe.cli.console import stages
    from hybrimoe.cli.loading import model_path, survive_loading
    from hybrimoe.cli.prompt import read_text
    from hybrimoe.engine import EngineOptions
    from hybrimoe.generation import Sampling
    from hybrimoe.gguf_model import inspect
    from hybrimoe.trace.record import RecordOptions, built_in_prompts, record

    if what[0] not in ("f16", "f32", "none"):
        raise UsageError(f"--scores: '{what[0]}' is not known", "f16, f32 or none")
    prompts = [*texts[0], *(read_text(str(path)) for path in texts[1])] or built_in_prompts()
    prompts = prompts[: texts[2]]
    if any(not text.strip() for text in prompts):
        raise UsageError("a prompt is empty")
    path = model_path(name)
    output = output or Path(f"{path.stem}.trace")
    if output.suffix != ".trace":
        raise UsageError(f"'{output.name}' does not end in .trace", "give -o NAME.trace")
    check_output(output, force)
    model = inspect(path.absolute()).require_moe()
    survive_loading(model, with_plugin=False)
    n_ctx, n_ubatch, n_threads, n_gpu_layers = load
    options = EngineOptions(
        n_ctx=min(n_ctx, model.n_ctx_train) if model.n_ctx_train else n_ctx,
        n_ubatch=n_ubatch,
        n_threads=n_threads,
        n_gpu_layers=n_gpu_layers,
        warmup=False,
        plugin=False,
    )
    with stages() as update:
        recording = record(
            model,
            output,
            prompts,
            options,
            sampling=Sampling(temp=sample[0], seed=sample[1]),
            n_predict=n_predict,
            conversation=conversation,
            options=RecordOptions(*what),
            source={
                "tool": "hybrimoe trace record",
                "prompts": len(prompts),
                "n_predict": n_predict,
                "temp": sample[0],
            },
            progress=update,
        )
    writer = recording.writer
    for text in recording.notes:
        warn(text)
    note(
        f"wrote {output}: {writer.n_tokens} tokens, {writer.n_bytes / 1e6:.1f} MB",
        f"hybrimoe simulate {output} --html {output.stem}.html",
    )
    return EXIT_INTERRUPTED if recording.interrupted else EXIT_OK


def _attach(target: str | None, output: Path | None, n_tokens: int | None, force: bool) -> int:
    from hybrimoe.cli.top import choose_process
    from hybrimoe.trace.attach import attach

    if target is not None and not target.isdecimal():
        raise UsageError(f"--attach takes the number of a process, not '{target}'", "hybrimoe top --list")
    process = choose_process(target)
    output = output or Path(f"{process.pid}.trace")
    check_output(output, force)
    n_wanted = None if n_tokens is None or n_tokens < 0 else n_tokens
    with progress(f"recording process {process.pid}" + ("" if n_wanted else " (Ctrl-C ends)")) as update:
        recorded = attach(process.path, output, n_wanted, lambda n: update(min(1.0, n / n_wanted) if n_wanted else 0.0))
    for text in recorded.notes:
        warn(text)
    if recorded.recorder.n_tokens == 0:
        note("nothing was computed meanwhile: there is no trace")
        return EXIT_OK
    note(
        f"wrote {output}: {recorded.recorder.n_tokens} tokens, {recorded.recorder.n_bytes / 1e6:.1f} MB",
        f"hybrimoe trace info {output} --metrics",
    )
    return EXIT_OK


def _info(path: Path, as_json: bool, with_metrics: bool, prompts: int | None, model: str | None) -> None:
    from hybrimoe.trace import info, metrics
    from hybrimoe.trace.format import read

    trace = read(path)
    if model is not None:
        check_model(trace, model)
    if trace.note:
        warn(trace.note)
    if prompts is not None:
        trace = trace.head(prompts)
    found = metrics.measure(trace) if with_metrics else None
    if as_json:
        data: dict[str, Any] = info.summary(trace)
        if found is not None:
            data["metrics"] = found.to_dict()
        print(json.dumps(without_nan(data), ensure_ascii=False, indent=1))
        return
    console = output_console()
    for line in [*info.lines(trace), *(["", *metrics.lines(found)] if found else [])]:
        console.print(line)


def without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: None instead."""
    if isinstance(value, dict):
        return {str(k): without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_model(trace: Any, model: str) -> None:
    """Raises TraceError where the trace is not of the model that the user named."""
    from hybrimoe.gguf_model import inspect
    from hybrimoe.models import store
    from hybrimoe.trace.identity import check_same

    check_same(trace, inspect(store.resolve(model)).require_moe())


def check_output(path: Path, force: bool) -> None:
    """Raises UsageError where the file exists already, or is a folder."""
    if path.is_dir():
        raise UsageError(f"'{path}' is a folder", "give a file name")
    if path.exists() and not force:
        raise UsageError(f"'{path}' exists already", "--force replaces it")


def _convert(path: Path, output: Path, prompts: int | None, without: list[str], force: bool) -> None:
    from hybrimoe.trace.convert import OPTIONAL, write
    from hybrimoe.trace.format import read

    for name in without:
        if name not in (*OPTIONAL, "events"):
            raise UsageError(f"there is no array '{name}' to leave out", f"known are {', '.join(OPTIONAL)}, events")
    check_output(output, force)
    trace = read(path)
    if trace.note:
        warn(trace.note)
    if prompts is not None:
        trace = trace.head(prompts)
        without = [*without, "events"]
    with progress(f"writing {output.name}") as update:
        write(trace, output, without=without, progress=update)
    note(f"wrote {output}: {trace.n_tokens} tokens of {trace.n_prompts} prompts")


def _import(files: list[Path], output: Path, form: str, given: tuple[Any, ...], force: bool) -> None:
    from hybrimoe.config import parse_size
    from hybrimoe.trace.convert import write_imported
    from hybrimoe.trace.importers import ImportOptions, import_files

    name, n_expert, top_k, size = given
    try:
        expert_bytes = None if size is None else parse_size(size)
    except ValueError as error:
        raise UsageError(f"--expert-bytes: {error}") from error
    if output.suffix != ".trace":
        raise UsageError(f"'{output.name}' does not end in .trace", "an import writes a trace file: -o NAME.trace")
    check_output(output, force)
    found = import_files(files, ImportOptions(name, n_expert, top_k, expert_bytes), form)
    for text in found.notes:
        warn(text)
    with progress(f"writing {output.name}") as update:
        write_imported(found, output, update)
    note(f"wrote {output}: {len(found.experts)} tokens of {int(found.prompt[-1]) + 1} prompts, {found.model.name}")
