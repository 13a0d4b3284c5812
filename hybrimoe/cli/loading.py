"""From what the user typed to a loaded engine: which positional is the model, the demo model when there is none."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hybrimoe.cli.console import note, progress, size_text, stages, warn
from hybrimoe.config import Settings
from hybrimoe.errors import HybrimoeError, UsageError

if TYPE_CHECKING:
    from hybrimoe.calibration import Calibration
    from hybrimoe.engine import Engine, EngineOptions
    from hybrimoe.expert_options import ExpertOptions
    from hybrimoe.generation import Sampling
    from hybrimoe.gguf_model import GgufModel
    from hybrimoe.machine.machine import Machine
    from hybrimoe.models.recipe import DemoOptions
    from hybrimoe.planning import Setting

_Engine = TypeVar("_Engine", bound="Engine")


def is_model(text: str) -> bool:
    """Whether a positional names a model: an existing regular file, a name ending in .gguf, or a known model's name."""
    from hybrimoe.models import store

    # A long prompt is no file name, and asking the system about one would fail.
    try:
        if Path(text).is_file():
            return True
    except (OSError, ValueError):
        return False
    return text.endswith(".gguf") or store.is_known_name(text)


def split_positionals(settings: Settings, positionals: list[str]) -> tuple[str | None, str | None]:
    """(model, prompt) of `[MODEL] [PROMPT or -]`; None where not given. Raises UsageError for too many."""
    model = settings.model
    by_flag = model is not None and settings.sources["model"] == "flag"
    rest = list(positionals)
    if not by_flag and rest and (len(rest) == 2 or is_model(rest[0])):
        model = rest.pop(0)
    if len(rest) > 1:
        raise UsageError(f"unexpected argument '{rest[1]}'", 'put the prompt in quotes: hybrimoe run MODEL "a prompt"')
    return model, rest[0] if rest else None


def model_path(model: str | None) -> Path:
    """The file of a model given by path or name; the demo model, built where it is missing, for None.

    Raises ModelError for unknown names and missing files.
    """
    from hybrimoe.models import store

    if model is None or (model == store.DEMO_NAME and not Path(model).is_file()):
        return build_demo()
    return store.resolve(model)


def build_demo(options: DemoOptions | None = None, *, force: bool = False) -> Path:
    """The demo model's file, built with progress on stderr where it is missing."""
    from hybrimoe.llama_log import llama_log
    from hybrimoe.models import store

    # The recipe tokenises with llama.cpp, whose warnings about that are none of the user's business.
    llama_log()
    with stages() as update:
        return store.build_demo(options, update, force=force)


def engine_options(settings: Settings) -> EngineOptions:
    from hybrimoe.engine import EngineOptions
    from hybrimoe.placement import Placement

    return EngineOptions(
        n_ctx=settings.ctx_size,
        n_batch=settings.batch_size,
        n_ubatch=settings.ubatch_size,
        n_threads=settings.threads,
        n_threads_batch=settings.threads_batch,
        n_gpu_layers=settings.n_gpu_layers,
        flash_attn=settings.flash_attn,
        cache_type_k=settings.cache_type_k,
        cache_type_v=settings.cache_type_v,
        load_mode=settings.load_mode,
        repack=settings.repack,
        warmup=settings.warmup,
        placement=Placement(settings.override_tensor, settings.cpu_moe, settings.n_cpu_moe),
        plugin=settings.plugin,
        experts=expert_options(settings),
        trace=None if settings.trace is None else Path(settings.trace),
        observe=bool(settings.values.get("live", False)),
    )


def expert_options(settings: Settings) -> ExpertOptions:
    """What the flags say about sharing experts. Raises CalibrationError for a file that cannot be used."""
    from hybrimoe.config import parse_size
    from hybrimoe.expert_options import CacheSize, ExpertOptions, default_state_dir

    devices = settings.device
    names = None if devices is None else tuple(n.strip() for n in devices.split(",") if n.strip() and n != "none")
    return ExpertOptions(
        cache=CacheSize.parse(settings.expert_cache),
        devices=names,
        cache_policy=settings.cache_policy,
        schedule=settings.schedule,
        prefetch=settings.prefetch,
        admission=settings.admission,
        guard=settings.guard == "on",
        fit_margin_bytes=parse_size(settings.fit_target),
        pin_experts=settings.pin_experts,
        calibration=None if settings.calibration is None else Path(settings.calibration),
        state_dir=default_state_dir() if settings.keep_residency and not settings.reproducible else None,
        reproducible=settings.reproducible,
    )


def sampling(settings: Settings) -> Sampling:
    from hybrimoe.generation import RANDOM_SEED, Sampling

    return Sampling(
        temp=settings.temp,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        typical_p=settings.typical,
        repeat_penalty=settings.repeat_penalty,
        repeat_last_n=settings.repeat_last_n,
        presence_penalty=settings.presence_penalty,
        frequency_penalty=settings.frequency_penalty,
        seed=settings.seed & RANDOM_SEED,
    )


@contextmanager
def open_engine(settings: Settings, path: Path, command: str) -> Iterator[Engine]:
    """The loaded engine, with progress while loading and warnings about what cannot be used; closed at the end.

    `command` is what others see who watch ('hybrimoe top').
    """
    from hybrimoe.engine import Engine

    with load_engine(settings, path, Engine) as engine, watchable(settings, engine, command):
        yield engine


@contextmanager
def watchable(settings: Settings, engine: Engine, command: str) -> Iterator[None]:
    """While active, 'hybrimoe top' of the same user can watch the engine. What is in the way of that is no error."""
    if not settings.live:
        yield
        return
    from hybrimoe.live.host import Host

    with contextlib.ExitStack() as stack:
        try:
            host = stack.enter_context(Host(engine, command))
            host.serve()
            if settings.verbose and not host.is_watchable:
                warn("hybrimoe top cannot watch: there can be no socket", "--no-live")
        except HybrimoeError as error:
            if settings.verbose:
                warn(f"hybrimoe top cannot watch: {error.message}", "--no-live")
        yield


@contextmanager
def load_engine(
    settings: Settings, path: Path, kind: type[_Engine], on_progress: Callable[[], None] = lambda: None
) -> Iterator[_Engine]:
    """`open_engine` for engines of any kind, and for nobody to watch. `on_progress` may raise to stop loading."""
    from hybrimoe.gguf_model import inspect
    from hybrimoe.llama_log import llama_log

    llama_log().verbose = settings.verbose
    model = inspect(path).require_moe()
    survive_loading(model, with_plugin=settings.plugin)
    _warn_about_gpu(settings)
    options = with_planned_memory(engine_options(settings), settings, model)
    options = with_starting_costs(_with_threads(options, settings, model), model)
    with progress(f"loading {path.name} ({size_text(_total_bytes(path))})") as update:

        def on_share(share: float) -> None:
            on_progress()
            update(share)

        engine = kind(path, options, progress=on_share, on_trace_failure=warn)
    try:
        with engine:
            warn_unless_verified(engine)
            show_events(engine)
            yield engine
    finally:
        _note_recording(engine)


def with_planned_memory(options: EngineOptions, settings: Settings, model: GgufModel) -> EngineOptions:
    """The options with the context that `hybrimoe plan` would choose, where nobody asked for one, by the same rule and
    code (`planning.choose_context`). Says so where that is less than the model was trained with, and how fast a model
    that is larger than memory can be."""
    from dataclasses import replace

    from hybrimoe.cli.plan import setting_of, wants_default_context
    from hybrimoe.machine.here import this_machine
    from hybrimoe.planning.context import choose_context, needs_no_choice

    wants_default = wants_default_context(settings)
    machine = this_machine(_kept_calibration(model, options))
    if options.n_gpu_layers == 0:
        machine = machine.without_cards()
    if needs_no_choice(model, setting_of(settings), machine):
        return options
    if not wants_default:
        _warn_if_larger(model, setting_of(settings), machine)
        return options
    n_parallel = int(settings.values.get("parallel") or 1)
    with progress("fitting the context into memory"):
        choice = choose_context(model, setting_of(settings), machine, n_parallel)
    if choice.setting.n_ctx < model.n_ctx_train:
        note(f"note: {choice.reason}")
    if choice.memory.missing > 0:
        _warn_if_larger(model, choice.setting, machine)
    return replace(options, n_ctx=choice.setting.n_ctx)


def _kept_calibration(model: GgufModel, options: EngineOptions) -> Calibration | None:
    """This machine's calibration, if one is kept that holds for the model; nothing is measured for this."""
    from hybrimoe.calibration import default_path, load_matching

    try:
        return load_matching(options.experts.calibration or default_path(), model)
    except HybrimoeError:
        return None


def _warn_if_larger(model: GgufModel, setting: Setting, machine: Machine) -> None:
    from hybrimoe.planning import make_plan

    try:
        made = make_plan(model, setting, machine, advise=False)
    except HybrimoeError:  # what is wrong with the model, loading says
        return
    if made.memory.missing > 0 and made.ours is not None:
        warn(
            f"the model is larger than main memory: {made.memory.missing:.0%} of its experts come from the disk, "
            f"about {made.ours[1].per_s:.2g} tokens/s",
            made.memory.nearest,
        )


def survive_loading(model: GgufModel, *, with_plugin: bool) -> None:
    """What goes before every load in a command's own process: llama.cpp has survived the header, and whatever ends the
    process from here on is explained. Raises ModelError for a header that llama.cpp dies of."""
    from hybrimoe.last_words import explain_ends, explain_wrong_cpu
    from hybrimoe.proof import kept_proofs, prove

    if with_plugin:
        explain_wrong_cpu()
    prove(model, kept_proofs())
    explain_ends(model.path, with_plugin=with_plugin)


def _with_threads(options: EngineOptions, settings: Settings, model: GgufModel) -> EngineOptions:
    from hybrimoe.cpu_threads import keep_to_range, pinned, with_best_threads

    if settings.cpu_range is not None:
        keep_to_range(settings.cpu_range)
    options = with_best_threads(options, model)
    return pinned(options) if settings.cpu_strict else options


def with_starting_costs(options: EngineOptions, model: GgufModel) -> EngineOptions:
    """The options with the costs that sharing experts starts from; measures the machine where they are unknown."""
    from dataclasses import replace

    from hybrimoe.starting_costs import starting_costs

    with progress("measuring this machine, once") as update:
        found = starting_costs(options, model, update)
    for text in found.warnings:
        warn(text, "hybrimoe probe")
    for text in found.notes:
        note(f"note: {text}")
    return replace(options, experts=found.experts)


def _note_recording(engine: Engine) -> None:
    """Says what was recorded, and what to do with it."""
    recorder = engine.recorder
    if recorder is None or recorder.failure:
        return
    if recorder.n_dropped:
        warn(f"{recorder.n_dropped} steps are missing in '{recorder.path}': they came faster than they were written")
    if recorder.n_bytes:
        note(
            f"wrote {recorder.path}: {recorder.n_tokens} tokens, {recorder.n_bytes / 1e6:.1f} MB",
            f"hybrimoe simulate {recorder.path} --plot {recorder.path.stem}.png",
        )


def show_events(engine: Engine) -> None:
    """Shows on stderr what the dispatch has decided since this was last called, and why."""
    for line in engine.new_expert_events():
        note(line)


def warn_unless_verified(engine: Engine) -> None:
    """Says so on stderr when experts did not run where they should; nothing before the first step."""
    if engine.verification is not None and not engine.verification.ok:
        warn(engine.verification.message(), "hybrimoe doctor")


def _total_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _warn_about_gpu(settings: Settings) -> None:
    import llama_cpp

    from hybrimoe.machine import host

    if llama_cpp.llama_supports_gpu_offload():
        return
    if not settings.is_default("n_gpu_layers") and settings.n_gpu_layers != 0:
        warn("-ngl has no effect: this llama-cpp-python was built without GPU support", "hybrimoe doctor")
    elif card := host.notable_gpu():
        warn(f"{card.name} is not used: this llama-cpp-python was built without GPU support", card.build_command)


def flush(text: str) -> None:
    """Write a piece of an answer to stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
