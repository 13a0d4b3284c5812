"""`hybrimoe bench`: llama-bench's tests, with plain llama.cpp beside."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe.bench.cases import int_ranges, list_tests, prompt_and_gen, setups_of
from hybrimoe.bench.formats import FORMATS
from hybrimoe.cli.console import is_terminal, note, stages, warn
from hybrimoe.cli.flags import EXPERT_OPTIONS, MODEL_OPTIONS, OUTPUT_OPTIONS
from hybrimoe.config import Option, Settings, choice, flash_attention, gpu_layers, integer, number, parse_bool
from hybrimoe.errors import UsageError

if TYPE_CHECKING:
    from hybrimoe.bench.cases import Setup
    from hybrimoe.bench.run import BenchOptions

_TESTS, _OURS, _OUTPUT = "Tests", "Experts on CPU and GPU", "Output"
_LISTS = "several values with commas"


def _list_of(parse: Callable[[str], Any], separator: str = ",") -> Callable[[str], tuple[Any, ...]]:
    """A parser of a list. Raises ValueError."""

    def parse_all(text: str) -> tuple[Any, ...]:
        values = tuple(parse(part.strip()) for part in text.split(separator) if part.strip())
        if not values:
            raise ValueError("it names nothing")
        return values

    return parse_all


def _repack(text: str) -> bool:
    return parse_bool(text)


_MODEL = {option.key: option for option in MODEL_OPTIONS}
_EXPERTS = {option.key: option for option in EXPERT_OPTIONS}


def _as_list(option: Option, parse: Callable[[str], Any], default: Any, **changes: Any) -> Option:
    """An option of `run` that takes several values here. It may be given several times too."""
    values: dict[str, Any] = {
        "flags": option.flags,
        "help": f"{option.help.rstrip('.')}; {_LISTS}.",
        "parse": parse,
        "metavar": "LIST",
        "environment": option.environment,
        "section": option.section,
        "repeats": True,
        "unset": str(default),
        "default": None,
    }
    return Option(**{**values, **changes})


def _plain(flags: tuple[str, ...], help: str, section: str = _TESTS, **values: Any) -> Option:
    return Option(flags, help, section=section, in_file=False, **values)


def _repeated(key: str) -> Option:
    option = _EXPERTS[key]
    assert option.parse is not None
    return _as_list(
        option,
        lambda text: (option.parse(text),),  # type: ignore[misc]
        option.default,
        help=f"{option.help.rstrip('.')}; may be given several times.",
        metavar=option.metavar,
    )


BENCH_OPTIONS: tuple[Option, ...] = (
    _MODEL["model"],
    _plain(
        ("-p", "--n-prompt"),
        "Prompt tokens, as 512, 128,256 or 64-512*2; 0: no such test.",
        parse=int_ranges(0),
        metavar="LIST",
        repeats=True,
        default=None,
        unset="512",
    ),
    _plain(
        ("-n", "--n-gen"),
        "Generated tokens; 0: no such test.",
        parse=int_ranges(0),
        metavar="LIST",
        repeats=True,
        default=None,
        unset="128",
    ),
    _plain(
        ("-pg", "--prompt-gen"),
        "A prompt and then generation in one test; may be given several times.",
        parse=prompt_and_gen,
        metavar="P,G",
        repeats=True,
        default=(),
    ),
    _plain(
        ("-d", "--n-depth"),
        "Tokens that are in the context before the test begins.",
        parse=int_ranges(0),
        metavar="LIST",
        repeats=True,
        default=None,
        unset="0",
    ),
    _plain(("-r", "--repetitions"), "Repetitions of each test.", default=5, parse=integer(1, 10_000), metavar="N"),
    _plain(
        ("--prompt-source",),
        "Tokens to feed: corpus (built-in texts), random (as llama-bench; distorts routing) or a text file.",
        default="corpus",
        metavar="WHAT",
    ),
    _plain(
        ("--delay",), "Seconds to wait before each repetition.", default=0.0, parse=number(0, 3600), metavar="SECONDS"
    ),
    _plain(
        ("--warmup",), "One run of each test that is not counted.", default=True, parse=None, no_flags=("--no-warmup",)
    ),
    _plain(
        ("--stock",),
        "Measure plain llama.cpp beside, in a process of its own.",
        default=True,
        parse=None,
        no_flags=("--no-stock",),
    ),
    _plain(
        ("--interleave",),
        "Alternate after each repetition with both loaded, or load one process at a time (llama.cpp, ours, llama.cpp): "
        "repetition, process, or auto (what memory allows).",
        default="auto",
        parse=choice("auto", "repetition", "process"),
        metavar="HOW",
    ),
    _as_list(_MODEL["batch-size"], int_ranges(1), 2048),
    _as_list(_MODEL["ubatch-size"], int_ranges(1), 512),
    _as_list(_MODEL["threads"], int_ranges(0), "one per physical core"),
    _as_list(_MODEL["n-gpu-layers"], _list_of(gpu_layers), "auto"),
    _as_list(_MODEL["n-cpu-moe"], int_ranges(0), 0),
    _MODEL["cpu-moe"],
    _as_list(_MODEL["flash-attn"], _list_of(flash_attention), "auto"),
    _as_list(_MODEL["cache-type-k"], _list_of(_MODEL["cache-type-k"].parse or str), "f16"),
    _as_list(_MODEL["cache-type-v"], _list_of(_MODEL["cache-type-v"].parse or str), "f16"),
    _as_list(_MODEL["load-mode"], _list_of(_MODEL["load-mode"].parse or str), "auto"),
    _as_list(
        _MODEL["repack"],
        _list_of(_repack),
        "1",
        environment=None,
        in_file=False,
        help="Let llama.cpp keep repacked weights, 0 or 1; both: 0,1.",
    ),
    _as_list(
        _MODEL["override-tensor"],
        _list_of(str),
        "none",
        environment=None,
        in_file=False,
        help="Buffer type of tensors, PATTERN=TYPE;...; a comma begins another setting.",
    ),
    _as_list(
        _EXPERTS["device"],
        _list_of(str),
        "every GPU",
        environment=None,
        in_file=False,
        help="Accelerators for experts, ggml's names separated by slashes, or none; a comma begins another setting.",
    ),
    _as_list(_EXPERTS["expert-cache"], _list_of(_EXPERTS["expert-cache"].parse or str), "auto"),
    _repeated("cache-policy"),
    _repeated("schedule"),
    _repeated("prefetch"),
    _repeated("admission"),
    *(_EXPERTS[key] for key in ("guard", "fit-target", "calibration", "pin-experts")),
    # Off: what an earlier run left behind shall not decide a measurement.
    replace(_EXPERTS["keep-residency"], default=False, in_file=False),
    _EXPERTS["reproducible"],
    _plain(
        ("-o", "--output"),
        f"Format on stdout: {', '.join(FORMATS)}.",
        _OUTPUT,
        default="md",
        parse=choice(*FORMATS),
        metavar="FORMAT",
    ),
    _plain(
        ("-oe", "--output-err"),
        "Format on stderr.",
        _OUTPUT,
        default="none",
        parse=choice("none", *FORMATS),
        metavar="FORMAT",
    ),
    _plain(
        ("--compare",),
        "Compare two files of results instead of measuring: --compare A.jsonl B.jsonl.",
        _OUTPUT,
        default=False,
        parse=None,
        no_flags=("--no-compare",),
    ),
    _plain(
        ("--progress",), "Say on stderr what runs.", _OUTPUT, default=False, parse=None, no_flags=("--no-progress",)
    ),
    *(option for option in OUTPUT_OPTIONS if option.key in ("trace", "verbose")),
)

# Values of a Setup that nobody asked for anything else.
_DEFAULTS: dict[str, Any] = {
    "n_gpu_layers": -1,
    "n_cpu_moe": 0,
    "load_mode": "auto",
    "repack": True,
    "flash_attn": "auto",
    "type_k": "f16",
    "type_v": "f16",
    "n_batch": 2048,
    "n_ubatch": 512,
    "overrides": "",
    "device": None,
    "expert_cache": "auto",
    "cache_policy": "mrs",
    "schedule": "two-threshold",
    "prefetch": "impact",
    "admission": "pays",
}
# Field of Setup: setting.
_FIELDS = {
    "n_gpu_layers": "n_gpu_layers",
    "n_cpu_moe": "n_cpu_moe",
    "load_mode": "load_mode",
    "repack": "repack",
    "flash_attn": "flash_attn",
    "type_k": "cache_type_k",
    "type_v": "cache_type_v",
    "n_batch": "batch_size",
    "n_ubatch": "ubatch_size",
    "n_threads": "threads",
    "overrides": "override_tensor",
    "device": "device",
    "expert_cache": "expert_cache",
    "cache_policy": "cache_policy",
    "schedule": "schedule",
    "prefetch": "prefetch",
    "admission": "admission",
}


def bench(settings: Settings, positionals: list[str]) -> int:
    """Measures, or compares two files. Returns the exit code."""
    if settings.compare:
        return _compare(settings, positionals)
    options, values = _request(settings, positionals)
    return _measure(settings, options, values)


def _compare(settings: Settings, files: Sequence[str]) -> int:
    from hybrimoe.bench.compare import compare, read_rows, render

    if len(files) != 2:
        raise UsageError("--compare needs two files", "hybrimoe bench --compare A.jsonl B.jsonl")
    pairs = compare(read_rows(Path(files[0])), read_rows(Path(files[1])))
    print(render(pairs, settings.output, Path(files[0]).name, Path(files[1]).name))
    return 0


def _values(settings: Settings, models: Sequence[str]) -> dict[str, Sequence[Any]]:
    """The values of each field of Setup."""
    from hybrimoe.machine import host

    values: dict[str, Sequence[Any]] = {"model": models}
    for field, name in _FIELDS.items():
        given = settings.values[name]
        # Lists of lists: a flag may be repeated, and each holds several values.
        flat = [value for group in given for value in group] if given else []
        default = host.n_physical_cores() if field == "n_threads" else _DEFAULTS[field]
        values[field] = list(dict.fromkeys(flat)) or [default]
    values["n_threads"] = [n or host.n_logical_cpus() for n in values["n_threads"]]
    if settings.cpu_moe:
        values["n_cpu_moe"] = [-1]
    return values


def _request(settings: Settings, positionals: Sequence[str]) -> tuple[BenchOptions, dict[str, Sequence[Any]]]:
    """What to measure. Raises UsageError and ModelError before anything is loaded."""
    from hybrimoe.bench.run import BenchOptions
    from hybrimoe.bench.tokens import check_source
    from hybrimoe.bench.worker import WorkerOptions
    from hybrimoe.cli.loading import model_path
    from hybrimoe.config import parse_size
    from hybrimoe.expert_options import default_state_dir
    from hybrimoe.gguf_model import inspect
    from hybrimoe.proof import kept_proofs, prove

    names: list[str | None] = list(positionals) or [settings.model]
    paths = [model_path(name) for name in names]
    for path in paths:
        prove(inspect(path, header_only=True).require_moe(), kept_proofs())

    def numbers(name: str, default: int) -> list[int]:
        given = settings.values[name]
        return [n for group in given for n in group] if given else [default]

    tests = list_tests(
        numbers("n_prompt", 512), numbers("n_gen", 128), settings.prompt_gen or (), numbers("n_depth", 0)
    )
    values = _values(settings, [str(path) for path in paths])
    setups = setups_of(values)
    _check_trace(settings, setups)
    worker = WorkerOptions(
        setup={},
        plugin=False,
        n_ctx=0,
        prompt_source=check_source(settings.prompt_source),
        n_stream=0,
        guard=settings.guard == "on",
        fit_margin_bytes=parse_size(settings.fit_target),
        calibration=settings.calibration,
        pin_experts=settings.pin_experts,
        state_dir=str(default_state_dir()) if settings.keep_residency and not settings.reproducible else None,
        reproducible=settings.reproducible,
        trace=settings.trace,
        verbose=settings.verbose,
    )
    options = BenchOptions(
        tests,
        setups,
        settings.repetitions,
        worker,
        stock=settings.stock,
        warm_up=settings.warmup,
        delay_s=settings.delay,
        interleave=settings.interleave,
    )
    return options, values


def _check_trace(settings: Settings, setups: Sequence[Setup]) -> None:
    if settings.trace is None:
        return
    from hybrimoe.trace.live import check_target

    if len(setups) > 1:
        raise UsageError(f"--trace takes one way of running, these are {len(setups)}", "give single values")
    check_target(Path(settings.trace))
    warn("recording costs a little: leave --trace out for figures to publish")


def _measure(settings: Settings, options: BenchOptions, values: dict[str, Sequence[Any]]) -> int:
    from hybrimoe.bench import formats
    from hybrimoe.bench.run import describe_machine, measure

    shown = formats.shown_fields(values, _DEFAULTS | {"n_threads": values["n_threads"][0]})
    notes = [f"machine: {describe_machine()}", f"command: {shlex.join(['hybrimoe', *sys.argv[1:]])}"]
    printers = [(formats.make_printer(settings.output, shown, notes), sys.stdout)]
    if settings.output_err != "none":
        printers.append((formats.make_printer(settings.output_err, shown, notes), sys.stderr))
    # With a table on a terminal the bar would tear it apart line by line: it is written at the end of each test.
    commits: dict[str, None] = {}
    with stages() as bar:

        def progress(label: str, share: float) -> None:
            if settings.progress:
                note(f"bench: {label} ({share:.0%})")
            elif is_terminal(sys.stderr):
                bar("measuring", share)

        for number, rows in enumerate(measure(options, note, progress)):
            for printer, stream in printers:
                # Not before there is a row: an error at the start leaves nothing half-written behind.
                _write(stream, (printer.head() if number == 0 else "") + printer.rows(rows))
            for row in rows:
                if row.is_cache_unused:
                    why = f" ({row.why_unused})" if row.why_unused else ""
                    warn(f"{row.test.name}: the expert cache was asked for and not used, the row measured the CPU{why}")
            commits |= {str(row.facts["build_commit"]): None for row in rows}
        for printer, stream in printers:
            _write(stream, printer.foot())
    if settings.output in ("json", "jsonl", "csv") and len(commits) == 2:
        stock, ours = commits
        note("", f"compare-llama-bench.py --tool llama-bench -i FILE -b {stock} -c {ours}")
    return 0


def _write(stream: Any, text: str) -> None:
    stream.write(text)
    stream.flush()
