"""A program that can be started: what it is, what its arguments say, and what of that concerns experts."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hybrimoe.errors import ModelError, PluginError, UsageError
from hybrimoe.hosts import arguments as flags
from hybrimoe.hosts.arguments import Arguments, Flag
from hybrimoe.hosts.help_page import Grammar, ask_devices, ask_grammar
from hybrimoe.hosts.models import Models
from hybrimoe.hosts.programs import Program, check_can_load, check_startable, find_program, seen_environment
from hybrimoe.placement import Placement

if TYPE_CHECKING:
    from hybrimoe.engine import EngineOptions
    from hybrimoe.expert_options import ExpertOptions

__all__ = ["BACKEND_PATH", "Host", "has_accelerators", "host_options", "open_host", "shared_models"]

# The one file that ggml loads beside the backends that it finds by itself.
BACKEND_PATH = "GGML_BACKEND_PATH"


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


def open_host(
    command: Sequence[str], environment: Mapping[str, str], plugin: Path, own_flags: Collection[str] = ()
) -> Host:
    """Finds out what `command` starts and reads its arguments; a known program is asked for its flags.

    `own_flags` are HybriMoE's, which the user may have put behind the program by mistake. Raises UsageError,
    HybrimoeError and PluginError for what cannot be started or cannot work with the plug-in, and ModelError for flags
    that stand for a model whose file only the program finds.
    """
    program = find_program(command)
    seen = seen_environment(program, environment)
    path = check_startable(program, seen)
    check_can_load(program, seen, plugin)
    host = Host(program, path, seen, arguments=Arguments((), seen))
    if program.kind is not None:
        grammar = ask_grammar(program.asked, seen)
        read = seen if program.kind.variables else {}
        host = replace(host, grammar=grammar, arguments=Arguments.read(program.arguments, grammar, read))
        _check_own_flags(host, own_flags)
        _check_values(host)
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


def _check_values(host: Host) -> None:
    last = host.arguments.items[-1:]
    if last and len(last[0].values) < host.grammar.n_values.get(last[0].flag, 0):
        raise UsageError(f"{last[0].flag} of {host.program.name} needs a value", f"{host.program.name} --help")


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
    for item in arguments.items:
        if item.flag in host.grammar.downloads:
            raise ModelError(
                f"{item.flag} stands for a model that {host.program.name} finds or downloads by itself",
                f"run '{host.program.name} {item.flag}' once by itself, then name the file with -m",
            )
    if host.program.kind is not None and not host.grammar.knows(*flags.OVERRIDE.names):
        raise PluginError(
            f"this {host.program.name} has no tensor overrides (-ot): nothing can be placed in the plug-in",
            "use a newer llama.cpp",
        )


def shared_models(host: Host, models: Models) -> Models:
    """`models` without a draft that the plug-in has no part in: one without experts, or with a program we do not know.
    One with experts is the plug-in's even where the user keeps it on the CPU, whose memory that is."""
    is_known = host.program.kind is not None and bool(models.main)
    is_shared = models.draft is not None and models.draft.is_moe and is_known
    return models if is_shared else replace(models, draft=None)


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


def has_accelerators(host: Host, experts: ExpertOptions, ours: Sequence[str]) -> bool:
    """Whether costs that were measured on `ours`, the accelerators of our own ggml, hold for what the program will use.

    Raises UsageError for a device that `experts` name and the program does not have.
    """
    named = experts.devices or ()
    if not (named or ours) or host.program.kind is None or not host.grammar.knows("--list-devices"):
        return False
    theirs = [name for name in ask_devices(host.program.asked, host.environment) if name != "BLAS"]
    for name in named:
        # A second CPU backend is a stand-in for an accelerator; it is never listed.
        if name not in (*theirs, "CPU"):
            raise UsageError(f"{host.program.name} has no device '{name}'", f"it has: {', '.join(theirs) or 'none'}")
    return all(name in ours for name in named) if named else list(ours) == theirs
