"""`hybrimoe profile`: a run's split between CPU, GPU and link, as table, HTML report and timeline."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe.cli.console import note, output_console, stages, warn
from hybrimoe.cli.flags import EXPERT_OPTIONS, MODEL_OPTIONS, OUTPUT_OPTIONS
from hybrimoe.config import Option, Settings, integer
from hybrimoe.errors import EXIT_INTERRUPTED, HybrimoeError, UsageError, from_os_error

if TYPE_CHECKING:
    from hybrimoe.engine import Engine
    from hybrimoe.gguf_model import GgufModel
    from hybrimoe.profiling.run import Facts

_RUN, _OUTPUT = "What to run", "Output"


def _option(flags: tuple[str, ...], help: str, section: str = _RUN, **values: Any) -> Option:
    return Option(flags, help, section=section, in_file=False, **values)


PROFILE_OPTIONS: tuple[Option, ...] = (
    *(option for option in MODEL_OPTIONS if option.key != "plugin"),
    _option(
        ("-p", "--n-prompt"),
        "Tokens of each text that are fed as a prompt.",
        default=128,
        parse=integer(1, 1 << 20),
        metavar="N",
    ),
    _option(
        ("-n", "--n-gen"),
        "Tokens of each text that are fed one by one.",
        default=32,
        parse=integer(0, 1 << 20),
        metavar="N",
    ),
    _option(("-f", "--prompt-file"), "A text to run instead of the built-in ones.", default=None, metavar="FILE"),
    _option(
        ("--stock",),
        "Measure plain llama.cpp afterwards, in a process of its own.",
        default=True,
        parse=None,
        no_flags=("--no-stock",),
    ),
    *EXPERT_OPTIONS,
    _option(("--html",), "The report.", _OUTPUT, default=None, metavar="FILE", unset="profile-MODEL.html"),
    _option(
        ("--perfetto",),
        "The timeline, for ui.perfetto.dev or chrome://tracing.",
        _OUTPUT,
        default=None,
        metavar="FILE",
        unset="profile-MODEL.perfetto.json",
    ),
    _option(
        ("--files",),
        "Write report and timeline; without it only those that are named.",
        _OUTPUT,
        default=True,
        parse=None,
        no_flags=("--no-files",),
    ),
    _option(("--json",), "Print one JSON object.", _OUTPUT, default=False, parse=None, no_flags=("--no-json",)),
    *(option for option in OUTPUT_OPTIONS if option.key in ("trace", "verbose")),
)


def profile(settings: Settings, positionals: list[str]) -> int:
    """Runs texts, analyses the recording, prints and writes. Returns the exit code."""
    from hybrimoe.cli.loading import model_path
    from hybrimoe.gguf_model import inspect
    from hybrimoe.profiling.run import read_texts

    if len(positionals) > 1:
        raise UsageError(f"unexpected argument '{positionals[1]}'", "hybrimoe profile MODEL")
    texts = read_texts(None if settings.prompt_file is None else Path(settings.prompt_file))
    path = model_path(positionals[0] if positionals else settings.model)
    model = inspect(path).require_moe()
    report, timeline = _targets(settings, path)
    with _trace_target(settings) as trace_path, stages() as update:
        facts, about = _run(settings, model, trace_path, texts, update)
        stock = _stock(settings, path, update) if settings.stock and not facts.interrupted else None
        update("analysing", 0.0)
        made, pages = _analyse(trace_path, facts, {**about, "stock": stock}, report, timeline)
    _write(pages)
    if settings.json:
        print(json.dumps(made, ensure_ascii=False))
    else:
        from hybrimoe.profiling.text import summary

        console = output_console()
        for part in summary(made):
            console.print(part)
    if made["recording"]["n_dropped"]:
        warn(f"{made['recording']['n_dropped']} steps are missing: they came faster than they were recorded")
    if report is not None:
        note(f"report: {report}", "open it in a browser")
    if timeline is not None:
        note(f"timeline: {timeline}", "open it at https://ui.perfetto.dev (it stays on your machine)")
    was_cut = facts.interrupted or (stock or {}).get("error") == _INTERRUPTED
    return EXIT_INTERRUPTED if was_cut else 0


def _targets(settings: Settings, model: Path) -> tuple[Path | None, Path | None]:
    """Where report and timeline go. Raises before anything is run when that cannot be written."""
    wanted = []
    for given, suffix in ((settings.html, ".html"), (settings.perfetto, ".perfetto.json")):
        path = Path(f"profile-{model.stem}{suffix}") if given is None and settings.files else given and Path(given)
        if path is not None:
            _check_writable(path)
        wanted.append(path)
    return wanted[0], wanted[1]


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise UsageError(f"'{path}' is a folder", "give a file name")
    try:
        # What a rename needs: the folder, not the file.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        hint = "choose another folder with --html and --perfetto, or --no-files"
        raise from_os_error(error, f"write '{path}'", hint) from error


@contextlib.contextmanager
def _trace_target(settings: Settings) -> Iterator[Path]:
    if settings.trace is not None:
        from hybrimoe.trace.live import check_target

        check_target(Path(settings.trace))
        yield Path(settings.trace)
        return
    try:
        folder = tempfile.TemporaryDirectory(prefix="hybrimoe-profile-")
    except OSError as error:
        raise from_os_error(error, "make a temporary file", "set TMPDIR to a folder with free space") from error
    with folder as name:
        yield Path(name) / "run.trace"


def _run(settings: Settings, model: GgufModel, trace: Path, texts: Any, update: Any) -> tuple[Facts, dict[str, Any]]:
    from hybrimoe.cli.loading import engine_options, survive_loading
    from hybrimoe.engine import Engine
    from hybrimoe.llama_log import llama_log
    from hybrimoe.profiling.run import run_texts

    llama_log().verbose = settings.verbose
    survive_loading(model, with_plugin=True)
    failures: list[str] = []
    # A profile has no flag for the plug-in.
    complete = replace(settings, values={**settings.values, "plugin": True})
    options = replace(engine_options(complete), trace=trace)
    engine = Engine(model.path, options, progress=lambda s: update("loading", s), on_trace_failure=failures.append)
    with engine:
        facts = run_texts(engine, texts, settings.n_prompt, settings.n_gen, lambda s: update("profiling", s))
        about = _about(engine, facts)
    recorder = engine.recorder
    assert recorder is not None
    if failures:
        raise HybrimoeError(failures[0], "free some disk space, or set TMPDIR to another folder")
    decode = [ns for r in facts.runs for ns in r.decode_ns]
    token_us = sum(decode) / len(decode) / 1e3 if decode else None
    about["recording"] = {
        "us_per_decode_pass": recorder.us_per_decode_pass,
        "share": recorder.us_per_decode_pass / token_us if token_us else None,
        "n_dropped": recorder.n_dropped,
    }
    return facts, about


def _about(engine: Engine, facts: Facts) -> dict[str, Any]:
    """What the profile says about machine, model and settings."""
    import llama_cpp

    import hybrimoe
    from hybrimoe.bench.run import describe_machine
    from hybrimoe.bench.worker import build_facts

    model, options = engine.info, engine.options
    layers = [layer for layer in model.moe_layers if not layer.predicts_ahead]
    devices = [
        {
            "name": d["name"],
            "label": "stand-in GPU" if d["name"].startswith("CPU") else d["name"],
            "description": d["description"],
            "n_slots": d["n_slots"],
            "cache_bytes": d["cache_bytes"],
            "is_cpu": d["name"].startswith("CPU"),
        }
        for d in facts.state.get("devices", [])
    ]
    gpu_dense = options.n_gpu_layers != 0 and (
        bool(llama_cpp.llama_supports_gpu_offload()) or any(not d["is_cpu"] for d in devices)
    )
    experts = options.experts
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["hybrimoe", *sys.argv[1:]]),
        "tool": {
            "version": hybrimoe.__version__,
            "commit": build_facts(engine)["build_commit"],
            "llama_cpp_python": llama_cpp.__version__,
        },
        "machine": {"description": describe_machine(), "n_threads": options.threads()[0]},
        "model": {
            "path": str(model.path),
            "name": model.name,
            "architecture": model.architecture,
            "n_moe_layers": len(layers),
            "n_experts": model.n_experts,
            "n_experts_used": model.n_experts_used,
        },
        "settings": {
            "n_ctx": engine.n_ctx(),
            "n_ubatch": options.n_ubatch,
            "cache_policy": experts.cache_policy,
            "schedule": experts.schedule,
            "prefetch": experts.prefetch,
            "admission": experts.admission,
            "guard": experts.guard,
            "reproducible": experts.reproducible,
            "cpu_kernels": os.environ.get("HYBRIMOE_CPU", "auto"),
        },
        "devices": devices,
        "devices_are_cpus": bool(devices) and all(d["is_cpu"] for d in devices),
        "dense_on": "GPU" if gpu_dense else "CPU",
        "expert_bytes": [layer.bytes_per_expert for layer in layers],
    }


_INTERRUPTED = "interrupted"


def _stock(settings: Settings, path: Path, update: Any) -> dict[str, Any]:
    """Tokens per second of plain llama.cpp; what went wrong as `error`: the profile itself is worth having."""
    from hybrimoe.bench.cases import Setup, Test
    from hybrimoe.bench.run import measure_stock
    from hybrimoe.bench.worker import WorkerOptions
    from hybrimoe.machine import host

    update("plain llama.cpp", 0.0)
    n_threads = settings.threads or (host.n_physical_cores() if settings.threads is None else host.n_logical_cpus())
    setup = Setup(
        model=str(path),
        n_gpu_layers=settings.n_gpu_layers,
        n_cpu_moe=-1 if settings.cpu_moe else settings.n_cpu_moe,
        load_mode=settings.load_mode,
        repack=settings.repack,
        flash_attn=settings.flash_attn,
        type_k=settings.cache_type_k,
        type_v=settings.cache_type_v,
        n_batch=settings.batch_size,
        n_ubatch=settings.ubatch_size,
        n_threads=n_threads,
        overrides=";".join(settings.override_tensor),
        device=None,
        expert_cache="0",
        cache_policy=settings.cache_policy,
        schedule=settings.schedule,
        prefetch=settings.prefetch,
        admission=settings.admission,
    )
    names = {"prefill": Test(settings.n_prompt, 0)}
    if settings.n_gen:
        names["decode"] = Test(0, settings.n_gen, settings.n_prompt)
    source = settings.prompt_file or "corpus"
    worker = WorkerOptions(setup={}, plugin=False, n_ctx=0, prompt_source=source, n_stream=0, verbose=settings.verbose)
    try:
        rows = measure_stock(worker, setup, list(names.values()), 2)
    except HybrimoeError as error:
        return {"error": error.message}
    except KeyboardInterrupt:
        return {"error": _INTERRUPTED}
    return {name: row.values()["avg_ts"] for name, row in zip(names, rows, strict=True)}


def _analyse(
    trace_path: Path, facts: Facts, about: Mapping[str, Any], report: Path | None, timeline: Path | None
) -> tuple[dict[str, Any], list[tuple[Path, bytes]]]:
    from hybrimoe.profiling import perfetto
    from hybrimoe.profiling.analysis import analyse, blocks_of, copies_of
    from hybrimoe.profiling.html import html_page
    from hybrimoe.trace.format import read

    if not facts.runs or not trace_path.is_file():
        raise HybrimoeError("nothing was recorded: the run ended too early", "let it run, or use fewer with -p and -n")
    trace = read(trace_path)
    made = analyse(trace, facts, about)
    if not made["phases"]:
        raise HybrimoeError("no expert layer ran in the plug-in", "hybrimoe doctor")
    made["layers"] = list(trace.model.layers) or list(range(trace.model.n_layers))
    copies = copies_of(trace)
    blocks = blocks_of(trace, copies)
    pages = []
    if report is not None:
        pages.append((report, html_page(made, facts, blocks, copies).encode()))
    if timeline is not None:
        names = [d["label"] for d in about["devices"]]
        origin = {"model": made["model"]["name"], "machine": made["machine"]["description"], "command": made["command"]}
        shown = perfetto.chrome_trace(blocks, copies, made["layers"], names, origin)
        pages.append((timeline, perfetto.to_bytes(shown)))
    return made, pages


def _write(pages: list[tuple[Path, bytes]]) -> None:
    from hybrimoe.trace.files import save

    for path, data in pages:
        save(path, data)
