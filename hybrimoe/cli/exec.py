"""`hybrimoe exec`: somebody else's llama.cpp program, with the plug-in."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from hybrimoe.cli.console import note
from hybrimoe.cli.flags import EXPERT_OPTIONS, EXPERTS, MODEL_OPTIONS, OUTPUT, OUTPUT_OPTIONS
from hybrimoe.config import Option, Settings, choice
from hybrimoe.errors import ModelError, UsageError, from_os_error

if TYPE_CHECKING:
    from hybrimoe.engine import EngineOptions
    from hybrimoe.hosts.host import Host
    from hybrimoe.hosts.launch import Launch
    from hybrimoe.hosts.models import Models


def _of_the_program(option: Option) -> Option:
    """Without llama.cpp's variable: it is read with the program's arguments, by programs that read such variables."""
    is_theirs = option.environment is not None and option.environment.startswith("LLAMA_ARG_")
    return replace(option, environment=None) if is_theirs else option


EXEC_OPTIONS: tuple[Option, ...] = (
    *map(_of_the_program, EXPERT_OPTIONS),
    *(_of_the_program(option) for option in MODEL_OPTIONS if option.key in ("cpu-moe", "n-cpu-moe")),
    Option(
        ("--front",),
        "How the plug-in gets the experts: layer by layer in host memory (block), or as devices that take the whole "
        "graph and cut it before experts (graph; tried on software devices only). See docs/architecture.md.",
        "block",
        choice("block", "graph"),
        "FRONT",
        section=EXPERTS,
        in_file=False,
    ),
    Option(
        ("--print",),
        "Print environment and command, for a unit file or a launcher, and end.",
        False,
        None,
        no_flags=("--no-print",),
        section=OUTPUT,
        in_file=False,
    ),
    *(option for option in OUTPUT_OPTIONS if option.key == "verbose"),
)


def execute(settings: Settings, command: list[str]) -> None:
    """Becomes the program, or prints how it would be started. Raises HybrimoeError for what cannot work."""
    environment = dict(os.environ)
    launch = _launch(settings, command, environment)
    for text in launch.notes:
        note(f"note: {text}")
    if settings.print:
        sys.stdout.flush()
        sys.stdout.buffer.write(os.fsencode(launch.shell()) + b"\n")  # paths need not be UTF-8
        return
    sys.stdout.flush()
    sys.stderr.flush()
    # Python ignores these, and a program inherits what is ignored.
    names = [name for name in ("SIGPIPE", "SIGXFSZ") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), signal.SIG_DFL) for name in names}
    try:
        os.execve(launch.path, launch.command, launch.environment(environment))
    except OSError as error:
        raise from_os_error(error, f"start '{launch.path}'", "try it without hybrimoe exec") from error
    finally:  # it was not started: Python goes on, and a closed socket must not end it
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def _launch(settings: Settings, command: list[str], environment: dict[str, str]) -> Launch:
    from hybrimoe.hosts.host import open_host, shared_models
    from hybrimoe.hosts.launch import Launch, make_launch
    from hybrimoe.hosts.models import Models, find_models
    from hybrimoe.native.plugin import library_path

    plugin = library_path().absolute()
    own_flags = {flag for option in EXPERT_OPTIONS for flag in (*option.flags, *option.no_flags)} | {"--print"}
    host = open_host(command, environment, plugin, own_flags)
    as_it_is = Launch(host.path, tuple(command))
    if host.only_informs:
        return as_it_is
    kind = host.program.kind
    try:
        found = find_models(host.arguments, host.environment, several=host.takes_several)
    except ModelError:
        if kind is not None:
            raise
        found = Models()  # a script may change the folder, or the model
    models = shared_models(host, found)
    if kind is not None and not kind.routes and not models.main:
        raise UsageError(f"the arguments of {kind.name} name no model", f"hybrimoe exec -- {kind.name} -m model.gguf")
    if models.main and not models.with_experts:
        names = " and ".join(f"'{model.path.name}' (architecture {model.architecture})" for model in models.main)
        text = f"no experts in {names}, nothing to share: {host.program.name} starts as it is"
        return replace(as_it_is, notes=(text,))
    options = _options(settings, host, models)
    return make_launch(host, models, options, plugin, settings.front)


def _options(settings: Settings, host: Host, models: Models) -> EngineOptions:
    """Settings of the plug-in as our own commands would choose them for the model."""
    from hybrimoe.cli.loading import expert_options, with_starting_costs
    from hybrimoe.cpu_threads import with_best_threads
    from hybrimoe.hosts.host import has_accelerators, host_options
    from hybrimoe.llama_log import llama_log
    from hybrimoe.placement import Placement

    llama_log().verbose = settings.verbose
    placement = Placement(cpu_moe=settings.cpu_moe, n_cpu_moe=settings.n_cpu_moe)
    options = host_options(host, expert_options(settings), placement)
    shared = models.with_experts
    if settings.calibration is not None and len(shared) != 1:
        what = f"{len(shared)} models with experts" if shared else "a program whose model is not known"
        raise UsageError(
            f"--calibration gives the costs of one model, and here are {what}",
            "leave it out: each model's costs are measured when it starts",
        )
    if len(shared) == 1 and host.program.kind is not None:
        options = with_best_threads(options, shared[0])
    # The program's ggml may have other devices than ours: then the plug-in measures them there.
    if has_accelerators(host, options.experts, own_accelerators()) and len(shared) == 1:
        options = with_starting_costs(options, shared[0])
    return options


def own_accelerators() -> list[str]:
    """ggml's names of the GPUs that our own llama.cpp has, HYBRIMOE_BACKENDS' too. Raises PluginError for a module."""
    from hybrimoe.calibration import accelerators
    from hybrimoe.native.backend_modules import device_names

    indices = [index for index, _ in accelerators()]
    names = device_names()
    return [names[index] for index in indices]
