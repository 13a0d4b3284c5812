"""How a program is started with the plug-in: which environment, which command, and what the user should know."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe import machine
from hybrimoe.errors import PluginError, UsageError
from hybrimoe.hosts import arguments as flags
from hybrimoe.hosts.arguments import Arguments, Flag, is_truthy
from hybrimoe.hosts.help_page import Grammar, ask_devices, ask_grammar
from hybrimoe.hosts.models import Models
from hybrimoe.hosts.programs import Program, check_can_load, check_startable, find_program, seen_environment
from hybrimoe.json_text import parse_json
from hybrimoe.placement import MOE_PATTERN, PLUGIN_BUFFER_TYPE, Placement

if TYPE_CHECKING:
    from hybrimoe.engine import EngineOptions
    from hybrimoe.expert_options import ExpertOptions

__all__ = ["Host", "Launch", "host_options", "make_launch", "on_these_devices", "open_host"]

BACKEND_PATH, CONFIG = "GGML_BACKEND_PATH", "HYBRIMOE_CONFIG"
OURS = f"{MOE_PATTERN}={PLUGIN_BUFFER_TYPE}"


@dataclass(frozen=True)
class Host:
    """A program that can be started. `path` is the file of its command's first word; `environment` is what it will
    see without us; `arguments` are empty for a program that we do not know."""

    program: Program
    path: Path
    environment: Mapping[str, str]
    grammar: Grammar = field(default_factory=Grammar)
    arguments: Arguments = field(default_factory=lambda: Arguments((), {}))

    @property
    def only_informs(self) -> bool:
        """Whether it says something about itself and ends, or asks another server: there is no model then."""
        return bool(self.arguments.typed(flags.INFORMATION) or self.arguments.typed(flags.SERVER_BASE))

    @property
    def takes_several(self) -> bool:
        return self.program.kind is not None and self.program.kind.several


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


def open_host(
    command: Sequence[str], environment: Mapping[str, str], plugin: Path, own_flags: Collection[str] = ()
) -> Host:
    """Finds out what `command` starts and reads its arguments; a known program is asked for its flags.

    `own_flags` are HybriMoE's, which the user may have put behind the program by mistake. Raises UsageError,
    HybrimoeError and PluginError for what cannot be started or cannot work with the plug-in.
    """
    program = find_program(command)
    seen = seen_environment(program, environment)
    path = check_startable(program, seen)
    check_can_load(program, seen, plugin)
    host = Host(program, path, seen, arguments=Arguments((), seen))
    if program.kind is not None:
        grammar = ask_grammar(program.head, environment)
        read = seen if program.kind.variables else {}
        host = replace(host, grammar=grammar, arguments=Arguments.read(program.arguments, grammar, read))
        _check_own_flags(host, own_flags)
    if not host.only_informs:
        _check_conflicts(host)
    return host


def _check_own_flags(host: Host, own_flags: Collection[str]) -> None:
    for item in host.arguments.items:
        name = item.flag.partition("=")[0]
        if name in own_flags and not host.grammar.knows(name):
            raise UsageError(
                f"{name} is hybrimoe's, not {host.program.name}'s: it must come before the program",
                f"hybrimoe exec {name} ... -- {shlex.join(host.program.head)} ...",
            )


def _check_conflicts(host: Host) -> None:
    given = host.environment.get(BACKEND_PATH)
    if given:
        raise UsageError(
            f"{BACKEND_PATH} is set already ('{given}'), and it names one file only",
            f"unset {BACKEND_PATH}; a backend beside the program or in its working directory is found without it",
        )
    arguments = host.arguments
    if arguments.number(flags.MOE_CACHE, 0) > 0:
        raise UsageError(
            f"{arguments.spelling(flags.MOE_CACHE)} keeps a second cache of the same experts beside the plug-in's",
            "leave it out, or start the program without hybrimoe exec",
        )
    if host.program.kind is not None and not host.grammar.knows(*flags.OVERRIDE.names):
        raise PluginError(
            f"this {host.program.name} has no tensor overrides (-ot): nothing can be placed in the plug-in",
            "use a newer llama.cpp",
        )


def host_options(host: Host, experts: ExpertOptions, placement: Placement) -> EngineOptions:
    """What the program's arguments say beside hybrimoe's own flags, as our commands would be told it.

    `placement` holds `cpu_moe` and `n_cpu_moe` of our flags; the program's are added, and so are its devices where
    `experts` name none. Raises UsageError for a value that cannot be one for a whole run.
    """
    from hybrimoe.engine import EngineOptions

    arguments = host.arguments
    usual = EngineOptions()
    if experts.devices is None and (names := arguments.value(flags.DEVICE)) is not None:
        experts = replace(experts, devices=_devices(names, host))
    return EngineOptions(
        n_batch=_most(host, flags.BATCH) or usual.n_batch,
        n_ubatch=_most(host, flags.UBATCH) or usual.n_ubatch,
        n_threads=_most(host, flags.THREADS),
        n_threads_batch=_most(host, flags.THREADS_BATCH),
        placement=Placement(
            cpu_moe=placement.cpu_moe or arguments.is_on(flags.CPU_MOE),
            n_cpu_moe=placement.n_cpu_moe or max(0, arguments.number(flags.N_CPU_MOE, 0)),
        ),
        experts=experts,
    )


def _devices(text: str, host: Host) -> tuple[str, ...] | None:
    """The accelerators that the program was told to use; None where that changes from test to test."""
    if host.takes_several:
        if "," in text:
            return None
        text = text.replace("/", ",")
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    return () if names == ("none",) else None if names == ("auto",) else names


def _most(host: Host, flag: Flag) -> int | None:
    """The largest number given; None without one. llama-bench takes lists and ranges."""
    arguments = host.arguments
    if not host.takes_several:
        return None if arguments.value(flag) is None else arguments.number(flag, 0)
    words = "".join(c if c.isdigit() else " " for value in arguments.values(flag) for c in f"{value} ").split()
    return max(map(int, words), default=None)


def on_these_devices(host: Host, experts: ExpertOptions, *, named: bool) -> ExpertOptions:
    """`experts` for the accelerators that the program has, which its own ggml knows and ours need not.

    `named`: the user chose them. Raises UsageError for one that the program does not have. Costs that were measured on
    other accelerators than the program's are dropped: the plug-in then measures when the model starts.
    """
    names = experts.devices
    if not names or host.program.kind is None or not host.grammar.knows("--list-devices"):
        return experts
    theirs = ask_devices(host.program.head, host.environment)
    if named:
        for name in names:
            # A second CPU backend is a stand-in for an accelerator; it is never listed.
            if name not in (*theirs, "CPU"):
                known = ", ".join(theirs) or "none"
                raise UsageError(f"{host.program.name} has no device '{name}'", f"it has: {known}")
        return experts
    if list(names) == [name for name in theirs if name != "BLAS"]:
        return experts
    return replace(experts, devices=None, costs=None)


def make_launch(host: Host, models: Models, options: EngineOptions, given: Arguments, plugin: Path) -> Launch:
    """The program with the plug-in. `options` are `host_options` with costs and threads; `given` is what the user had.

    Raises UsageError for a HYBRIMOE_CONFIG that is no JSON object, and for settings that the plug-in cannot take.
    """
    changes: dict[str, str | None] = {
        BACKEND_PATH: str(plugin),
        CONFIG: json.dumps(_plugin_settings(host, models, options), separators=(",", ":")),
    }
    notes: list[str] = []
    arguments = _without_cpu_moe(given, changes, notes)
    if host.program.kind is not None and models.main:
        arguments = _with_overrides(host, models, arguments)
        arguments = _without_fit(host, arguments, changes, notes)
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
    """The plug-in's settings (native/include/hybrimoe.h). What a user gave in HYBRIMOE_CONFIG stays."""
    experts = options.placed_experts()
    shared = models.with_experts
    if any("mtp" in kind for kind in [host.arguments.value(flags.SPEC_TYPE) or ""]):
        # The model's own head for guessing is a second instance, which would write the same file.
        experts = replace(experts, state_dir=None)
    # Costs and residency are one model's; instances that load different ones share these settings.
    model = shared[0] if len(shared) == 1 else None
    settings = experts.settings(model, min(options.n_batch, options.n_ubatch), None)
    settings["log_to_stderr"] = True  # nobody else speaks for the plug-in in a foreign program
    return settings | _users_settings(host.environment)


def _users_settings(environment: Mapping[str, str]) -> dict[str, Any]:
    text = environment.get(CONFIG, "")
    if not text.strip():
        return {}
    try:
        given = parse_json(text)
    except ValueError as error:
        raise UsageError(f"{CONFIG} is no JSON: {error}", 'for example {"cpu_kernels": "avx2"}') from None
    if not isinstance(given, dict):
        raise UsageError(f"{CONFIG} is no JSON object", 'for example {"cpu_kernels": "avx2"}')
    return given


def _without_cpu_moe(given: Arguments, changes: dict[str, str | None], notes: list[str]) -> Arguments:
    """`-cmoe` and `-ncmoe` would take experts from the plug-in, which does the same by settings."""
    for flag, what in (
        (flags.CPU_MOE, "all experts stay on the CPU"),
        (flags.N_CPU_MOE, "the first layers' experts stay on the CPU"),
    ):
        name = given.variable(flag)
        if given.typed(flag) or name is not None:
            notes.append(f"{given.spelling(flag)} is told to the plug-in instead: {what}, in its kernels")
        if name is not None:
            changes[name] = None
    return given.without(flags.CPU_MOE, flags.N_CPU_MOE)


def _with_overrides(host: Host, models: Models, arguments: Arguments) -> Arguments:
    """The user's own overrides come first: llama.cpp takes the first pattern that matches."""
    if any(model.is_moe for model in models.main):
        # One flag with all: llama.cpp warns of a flag that is given twice.
        if not arguments.values(flags.OVERRIDE):
            arguments = arguments.adding(host.grammar.knows(*flags.OVERRIDE.names) or "-ot", OURS)
        elif host.takes_several:
            arguments = arguments.with_values(flags.OVERRIDE, _in_every_set, only_last=False)
        else:
            arguments = arguments.with_values(flags.OVERRIDE, lambda value: f"{value},{OURS}", only_last=True)
    draft_flag = host.grammar.knows(*flags.DRAFT_OVERRIDE.names)
    keeps_draft = arguments.typed(flags.DRAFT_CPU_MOE) or arguments.variable(flags.DRAFT_CPU_MOE)
    if models.draft is None or not models.draft.is_moe or draft_flag is None or keeps_draft:
        return arguments
    if arguments.values(flags.DRAFT_OVERRIDE):
        return arguments.with_values(flags.DRAFT_OVERRIDE, lambda value: f"{value},{OURS}", only_last=True)
    return arguments.adding(draft_flag, OURS)


def _in_every_set(value: str) -> str:
    """llama-bench: sets of overrides, each a test of its own, are separated by commas, overrides by semicolons."""
    return ",".join(f"{one.rstrip(';')};{OURS}" if one else OURS for one in value.split(","))


def _without_fit(host: Host, arguments: Arguments, changes: dict[str, str | None], notes: list[str]) -> Arguments:
    """Fitting loads a throw-away context, and with it a second instance of the plug-in that takes the free memory."""
    why = "fitting would load a second instance of the plug-in, which fits experts into free memory itself"
    if host.takes_several:
        if arguments.typed(flags.FIT_TARGET):
            notes.append(f"{arguments.spelling(flags.FIT_TARGET)} is left out: {why}")
        return arguments.without(flags.FIT_TARGET, flags.FIT_CTX)
    name = host.grammar.knows(*flags.FIT.names)
    value = arguments.value(flags.FIT)
    if name is None or value in ("off", "disabled", "false", "0"):
        return arguments
    if value is not None and is_truthy(value):
        notes.append(f"{arguments.spelling(flags.FIT)} {value} is left out: {why}")
    if variable := arguments.variable(flags.FIT):
        changes[variable] = None
    return arguments.without(flags.FIT).adding(name, "off")


def _with_threads(host: Host, arguments: Arguments, options: EngineOptions, notes: list[str]) -> Arguments:
    """Numbers that the probe found better than llama.cpp's default, where the user gave none."""
    decode, prefill = options.threads()
    added: list[str] = []
    if arguments.value(flags.THREADS) is None and decode != machine.n_physical_cores():
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
    if Path(program.head[0]).name != "env":
        return program.head, words

    def undoes(word: str) -> bool:
        name, equals, _ = word.partition("=")
        return bool(equals) and name in changes

    if program.kind is not None:
        return tuple(word for word in program.head if not undoes(word)), words
    leading = tuple(takewhile(lambda word: "=" in word or word.startswith("-"), words))
    return program.head, (*(word for word in leading if not undoes(word)), *words[len(leading) :])
