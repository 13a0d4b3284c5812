"""How a program is started with the plug-in: which environment, which command, and what the user should know."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import PluginError, UsageError
from hybrimoe.expert_options import GIB
from hybrimoe.hosts import arguments as flags
from hybrimoe.hosts.arguments import Arguments, is_truthy
from hybrimoe.hosts.help_page import ask_devices
from hybrimoe.hosts.host import BACKEND_PATH, Host
from hybrimoe.hosts.models import Models
from hybrimoe.hosts.programs import Program
from hybrimoe.json_text import parse_json
from hybrimoe.machine.host import n_physical_cores
from hybrimoe.placement import (
    GRAPH_BUFFER_TYPE,
    GRAPH_DEVICE_PREFIX,
    GRAPH_PATTERN,
    MOE_PATTERN,
    PLUGIN_BUFFER_TYPE,
)

if TYPE_CHECKING:
    from hybrimoe.engine import EngineOptions

__all__ = ["CONFIG", "OURS", "Launch", "make_launch"]

CONFIG = "HYBRIMOE_CONFIG"
OURS = f"{MOE_PATTERN}={PLUGIN_BUFFER_TYPE}"
# Fitting would have made a smaller context where memory is short.
_LARGE_CONTEXT_BYTES = 2 << 30
_CPU_BUFFER_TYPE = "CPU"


@dataclass(frozen=True)
class Launch:
    """What to start: `path` with `command` as its arguments (the first one its own name). `changes` are variables to
    set, or to unset where they are None; `notes` are for the user, a line each."""

    path: Path
    command: tuple[str, ...]
    changes: Mapping[str, str | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """`base` with the changes."""
        kept = {name: value for name, value in base.items() if name not in self.changes}
        return kept | {name: value for name, value in self.changes.items() if value is not None}

    def shell(self) -> str:
        """One line that any shell, launcher or unit file (`ExecStart=`) takes and that needs nothing of HybriMoE's."""
        unset = [word for name, value in self.changes.items() if value is None for word in ("-u", name)]
        sets = [f"{name}={value}" for name, value in self.changes.items() if value is not None]
        first = ["env", *unset, *sets] if self.changes else []
        return shlex.join([*first, str(Path(os.path.abspath(self.path))), *self.command[1:]])  # noqa: PTH100


def make_launch(host: Host, models: Models, options: EngineOptions, plugin: Path, front: str = "block") -> Launch:
    """The program with the plug-in. `models` are `shared_models`; `options` are `host_options` with costs and threads;
    `front` is how the plug-in gets the experts (docs/settings.md).

    Raises UsageError for a HYBRIMOE_CONFIG that is not a JSON object or that the plug-in refuses, and for a program
    whose graphs it cannot take whole; PluginError for other settings that the plug-in refuses.
    """
    settings = _plugin_settings(host, models, options)
    if front == "graph":
        settings["front"] = front
    _check_settings(settings, plugin, host)
    changes: dict[str, str | None] = {
        BACKEND_PATH: str(plugin),
        CONFIG: json.dumps(settings, separators=(",", ":")),
    }
    notes: list[str] = []
    ours = OURS
    if front == "graph":
        host = _on_whole_graphs(host, models, changes)
        ours = _graph_overrides(host, models)
    arguments = _without_cpu_moe(host.arguments, changes, notes)
    if models.draft is not None and (
        host.arguments.typed(flags.DRAFT_CPU_MOE) or host.arguments.variable(flags.DRAFT_CPU_MOE)
    ):
        notes.append(
            f"{host.arguments.spelling(flags.DRAFT_CPU_MOE)} changes nothing: the CPU's memory is the plug-in's, which "
            "shares the draft's experts with accelerators as the model's"
        )
    if host.program.kind is not None and models.main:
        notes += _own_overrides(models, arguments)
        arguments = _with_overrides(host, models, arguments, changes, ours)
        arguments = _without_fit(host, models, arguments, changes, notes)
        arguments = _with_threads(host, arguments, options, notes)
        words = arguments.words
    else:
        theirs = host.environment.get(flags.OVERRIDE.variables[0])
        changes[flags.OVERRIDE.variables[0]] = f"{theirs},{OURS}" if theirs else OURS
        changes[flags.FIT.variables[0]] = "off"
        words = arguments.words if host.program.kind else host.program.arguments
        notes.append(_by_environment(host))
    head, words = _without_assignments(host.program, words, changes)
    return Launch(host.path, (*head, *words), changes, tuple(notes))


def _plugin_settings(host: Host, models: Models, options: EngineOptions) -> dict[str, Any]:
    """The plug-in's settings (docs/settings.md). What a user gave in HYBRIMOE_CONFIG stays."""
    experts = options.placed_experts()
    shared = models.with_experts
    if "mtp" in (host.arguments.value(flags.SPEC_TYPE) or ""):
        # The model's own head for guessing is a second instance, which would write the same file.
        experts = replace(experts, state_dir=None)
    # Costs and residency are one model's; instances that load different ones share these settings.
    model = shared[0] if len(shared) == 1 else None
    settings = experts.settings(model, min(options.n_batch, options.n_ubatch), None)
    # What only programs need that are not ours. Nobody else speaks for the plug-in there.
    settings |= {"log_to_stderr": True, "observe": True}
    return settings | _users_settings(host.environment)


# The plug-in's own parser, in a process that has no settings yet and keeps none.
_PARSE = """
import ctypes, sys
error = ctypes.create_string_buffer(512)
refused = ctypes.CDLL(sys.argv[1]).hybrimoe_configure(sys.stdin.buffer.read(), error, ctypes.c_size_t(len(error)))
sys.stdout.buffer.write(error.value if refused else b"")
"""


def _check_settings(settings: Mapping[str, Any], plugin: Path, host: Host) -> None:
    """The plug-in takes all settings or none, and its program would go on with the defaults."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HYBRIMOE_")}
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _PARSE, str(plugin)],
        input=json.dumps(settings).encode(), stdout=subprocess.PIPE, env=kept,
    )  # fmt: skip
    problem = done.stdout.decode("utf-8", "replace")
    if done.returncode != 0:
        raise PluginError(f"the plug-in {plugin} does not read its settings", "hybrimoe doctor")
    if problem and _users_settings(host.environment):
        raise UsageError(f"{CONFIG}: {problem}", "docs/settings.md lists the keys and their values")
    if problem:
        raise PluginError(f"the plug-in refused its settings: {problem}", "hybrimoe doctor")


def _users_settings(environment: Mapping[str, str]) -> dict[str, Any]:
    text = environment.get(CONFIG, "")
    if not text.strip():
        return {}
    try:
        given = parse_json(text)
        json.dumps(given, allow_nan=False)  # Python reads NaN and Infinity, which are no JSON
    except ValueError as error:
        raise UsageError(f"{CONFIG} is not valid JSON: {error}", 'for example {"cpu_kernels": "avx2"}') from None
    if not isinstance(given, dict):
        raise UsageError(f"{CONFIG} is not a JSON object", 'for example {"cpu_kernels": "avx2"}')
    return given


def _without_cpu_moe(given: Arguments, changes: dict[str, str | None], notes: list[str]) -> Arguments:
    """`-cmoe` and `-ncmoe` are overrides to CPU, which change nothing (`_own_overrides`): the plug-in is told."""
    n = given.number(flags.N_CPU_MOE, 0)
    layers = f"{given.spelling(flags.N_CPU_MOE)} {n} is"
    if n > 0:
        notes.append(
            f"{layers} told to the plug-in instead: the first {n} layers' experts stay on the CPU, in its kernels"
        )
    elif given.value(flags.N_CPU_MOE) is not None:
        notes.append(f"{layers} left out: it keeps no layer's experts on the CPU")
    if given.is_on(flags.CPU_MOE):
        notes.append(
            f"{given.spelling(flags.CPU_MOE)} is told to the plug-in instead: "
            "all experts stay on the CPU, in its kernels"
        )
    for flag in (flags.CPU_MOE, flags.N_CPU_MOE):
        name = given.variable(flag)
        if name is not None:
            changes[name] = None
    return given.without(flags.CPU_MOE, flags.N_CPU_MOE)


def _on_whole_graphs(host: Host, models: Models, changes: Mapping[str, str | None]) -> Host:
    """The program told to use the devices that wrap its own."""
    name = host.program.name
    if host.program.kind is None or not models.main:
        raise UsageError(
            f"--front graph needs a program that hybrimoe knows and its model, and '{name}' is given neither",
            "leave --front out",
        )
    mode = host.arguments.value(flags.SPLIT_MODE)
    if mode not in (None, "layer", "none"):
        raise UsageError(f"{host.arguments.spelling(flags.SPLIT_MODE)} {mode} needs --front block", "leave --front out")
    seen = {**host.environment, **{key: value for key, value in changes.items() if value is not None}}
    listed = ask_devices(host.program.asked, seen)
    wrappers = [name for name in listed if name.startswith(GRAPH_DEVICE_PREFIX) and name != GRAPH_BUFFER_TYPE]
    if not wrappers:
        raise UsageError(f"{name} has no GPU whose graphs could be taken", "leave --front out")
    given = host.arguments.value(flags.DEVICE)
    names = [one.strip() for one in re.split("[,/]", given)] if given else wrappers
    wanted = [one if one.startswith(GRAPH_DEVICE_PREFIX) else GRAPH_DEVICE_PREFIX + one for one in names]
    for one in wanted:
        if one not in wrappers:
            raise UsageError(
                f"the graphs of {one.removeprefix(GRAPH_DEVICE_PREFIX)} cannot be taken", "leave --front out"
            )
    arguments = host.arguments.without(flags.DEVICE)
    separator = "/" if host.takes_several else ","
    arguments = arguments.adding(host.grammar.knows(*flags.DEVICE.names) or "-dev", separator.join(wanted))
    return replace(host, arguments=arguments)


def _graph_overrides(host: Host, models: Models) -> str:
    """Experts of layers on a GPU go to the devices that take whole graphs, others to the kernels of the CPU."""
    on_gpu = f"{GRAPH_PATTERN}={GRAPH_BUFFER_TYPE}"
    given = host.arguments.value(flags.N_GPU_LAYERS)
    if given is None or not given.isdecimal():
        return on_gpu
    # llama.cpp counts the output as one more layer, and the last layers go to the GPU.
    n_on_cpu = max(0, max(model.n_layers for model in models.main) + 1 - int(given))
    if n_on_cpu == 0:
        return on_gpu
    layers = "|".join(map(str, range(n_on_cpu)))
    return f"blk[.]({layers})[.]{OURS},{on_gpu}"


def _with_overrides(
    host: Host, models: Models, arguments: Arguments, changes: dict[str, str | None], ours: str
) -> Arguments:
    """The user's own overrides come first: llama.cpp takes the first pattern that matches."""
    if any(model.is_moe for model in models.main):
        # One flag with all: llama.cpp warns of a flag that is given twice, and of one beside its variable.
        if not arguments.values(flags.OVERRIDE):
            if variable := arguments.variable(flags.OVERRIDE):
                ours = f"{arguments.environment[variable]},{ours}" if arguments.environment[variable] else ours
                changes[variable] = None
            ours = ours.replace(",", ";") if host.takes_several else ours
            arguments = arguments.adding(host.grammar.knows(*flags.OVERRIDE.names) or "-ot", ours)
        elif host.takes_several:
            arguments = arguments.with_values(flags.OVERRIDE, lambda value: _in_every_set(value, ours), only_last=False)
        else:
            arguments = arguments.with_values(flags.OVERRIDE, lambda value: f"{value},{ours}", only_last=True)
    name = host.grammar.knows(*flags.DRAFT_OVERRIDE.names)
    if models.draft is None or name is None:
        return arguments
    if arguments.values(flags.DRAFT_OVERRIDE):
        return arguments.with_values(flags.DRAFT_OVERRIDE, lambda value: f"{value},{OURS}", only_last=True)
    return arguments.adding(name, OURS)


def _own_overrides(models: Models, arguments: Arguments) -> list[str]:
    """Says what the user's own overrides do to experts: other devices' memory keeps them from the plug-in, the CPU's
    does not. llama.cpp takes an override to CPU as its list of CPU buffer types, in which those of accelerators for the
    CPU, such as the plug-in's, come first (common to all releases in docs/hosts.md)."""
    typed = arguments.values(flags.OVERRIDE)
    variable = arguments.variable(flags.OVERRIDE)
    texts = [*([arguments.environment[variable]] if variable else []), *typed]
    rules = [part.partition("=") for text in texts for part in re.split("[,;]", text) if "=" in part]
    model = next((model for model in models.main if model.is_moe), None)
    if model is None or not rules:
        return []
    try:
        patterns = [(re.compile(pattern), buffer_type) for pattern, _, buffer_type in rules]
    except re.error:
        return []  # the program will say so, in its own kind of regular expressions
    away: set[int] = set()
    on_cpu: set[int] = set()
    for layer in model.moe_layers:
        for tensor in layer.expert_tensors:
            buffer_type = next((where for pattern, where in patterns if pattern.search(tensor.name)), None)
            if buffer_type == _CPU_BUFFER_TYPE:
                on_cpu.add(layer.index)
            elif buffer_type not in (None, PLUGIN_BUFFER_TYPE, GRAPH_BUFFER_TYPE):
                away.add(layer.index)
    name, n_all = arguments.spelling(flags.OVERRIDE), len(model.moe_layers)
    notes = []
    if away:
        notes.append(f"{name} keeps experts of {len(away)} of {n_all} layers from the plug-in")
    if on_cpu:
        notes.append(
            f"{name} ...={_CPU_BUFFER_TYPE} changes nothing for experts of {len(on_cpu)} of {n_all} layers: the CPU's "
            "memory is the plug-in's, which shares them with accelerators; -cmoe or -ncmoe N keep them on the CPU"
        )
    return notes


def _in_every_set(value: str, ours: str) -> str:
    """llama-bench: sets of overrides, each for a separate test, are separated by commas, overrides by semicolons."""
    ours = ours.replace(",", ";")
    return ",".join(f"{one.rstrip(';')};{ours}" if one else ours for one in value.split(","))


def _without_fit(
    host: Host, models: Models, arguments: Arguments, changes: dict[str, str | None], notes: list[str]
) -> Arguments:
    """Fitting loads a throw-away context, and with it a second instance of the plug-in that takes the free memory."""
    why = "fitting would load a second instance of the plug-in, which fits experts into free memory itself"
    if host.takes_several:
        if arguments.typed(flags.FIT_TARGET):
            notes.append(f"{arguments.spelling(flags.FIT_TARGET)} is left out: {why}")
        return arguments.without(flags.FIT_TARGET, flags.FIT_CTX)
    name = host.grammar.knows(*flags.FIT.names)
    value = arguments.value(flags.FIT)
    if name is None or (value is not None and not is_truthy(value)):
        return arguments
    if value is not None:
        notes.append(f"{arguments.spelling(flags.FIT)} {value} is left out: {why}")
    if variable := arguments.variable(flags.FIT):
        changes[variable] = None
    model = models.main[0]
    context_bytes = model.kv.bytes_for(model.n_ctx_train)
    has_full_context = host.program.kind is not None and host.program.kind.full_context
    if has_full_context and arguments.number(flags.CTX_SIZE, 0) == 0 and context_bytes >= _LARGE_CONTEXT_BYTES:
        notes.append(
            f"the context is {model.n_ctx_train} tokens without -c, up to {context_bytes / GIB:.1f} GiB of KV cache, "
            "which nothing fits into memory: -c N makes it smaller"
        )
    return arguments.without(flags.FIT).adding(name, "off")


def _with_threads(host: Host, arguments: Arguments, options: EngineOptions, notes: list[str]) -> Arguments:
    """Numbers that the probe found better than llama.cpp's default, where the user gave none."""
    decode, prefill = options.threads()
    added: list[str] = []
    if arguments.value(flags.THREADS) is None and decode != n_physical_cores():
        added += [host.grammar.knows(*flags.THREADS.names) or "-t", str(decode)]
    batch = host.grammar.knows(*flags.THREADS_BATCH.names)
    if arguments.value(flags.THREADS) is None and not arguments.typed(flags.THREADS_BATCH) and batch:
        added += [batch, str(prefill)] if prefill != decode else []
    for flag, n in zip(added[::2], added[1::2], strict=True):
        arguments = arguments.adding(flag, n)
    if added:
        notes.append(f"{' '.join(added)}: what the probe found best")
    return arguments


def _by_environment(host: Host) -> str:
    if host.program.kind is None:
        return (
            f"'{host.program.name}' is no program that hybrimoe knows: it gets the environment only, which llama.cpp's "
            "programs that it starts read (llama-bench does not)"
        )
    return f"{host.program.name} is given no model: those that it is asked for get the plug-in through the environment"


def _without_assignments(
    program: Program, words: tuple[str, ...], changes: Mapping[str, str | None]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The command without the assignments of an `env NAME=VALUE` that would undo ours."""
    undoing = {word for word in program.assignments if word.partition("=")[0] in changes}
    head = tuple(word for word in program.head if word not in undoing)
    return head, words if program.kind else tuple(word for word in words if word not in undoing)
