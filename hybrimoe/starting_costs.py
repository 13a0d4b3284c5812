"""Which costs sharing experts starts from: a calibration that was named, this machine's kept one, or a quick probe.

Where nothing can be known (a disturbed probe), a miss is never copied: the CPU computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hybrimoe.errors import HybrimoeError
from hybrimoe.expert_options import ExpertOptions

if TYPE_CHECKING:
    from hybrimoe.engine import EngineOptions
    from hybrimoe.gguf_model import GgufModel

__all__ = ["StartingCosts", "starting_costs"]

# What needs no cost of a copy: hits where they are, misses on the CPU.
_CAUTIOUS = {"schedule": "cpu-only", "prefetch": "none"}


@dataclass(frozen=True)
class StartingCosts:
    """`experts` are the options with costs; `notes` tell what was measured, `warnings` what is not used."""

    experts: ExpertOptions
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def starting_costs(
    options: EngineOptions, model: GgufModel, progress: Callable[[float], None] | None = None
) -> StartingCosts:
    """The costs of the accelerators that `options` choose.

    Without accelerators, and for a CPU as a stand-in, the plug-in measures for itself when the model starts; with
    `reproducible` nothing reads costs. Raises CalibrationError for a calibration that was named and cannot be used,
    PluginError for a backend module.
    """
    experts = options.experts
    chosen = _accelerators(options)
    if experts.costs is not None or experts.reproducible or not chosen:
        return StartingCosts(experts)
    from hybrimoe import calibration

    n_threads, _ = options.threads()
    indices = [index for index, _ in chosen]
    if experts.calibration is not None:
        found = calibration.load(experts.calibration)
        return StartingCosts(replace(experts, costs=found.cost_section(model, n_threads, indices)))
    try:
        found, reason = calibration.load_or_probe(model, n_threads=n_threads, progress=progress)
    except HybrimoeError as error:
        return _cautious(experts, error.message)
    known = {device["device"] for device in found.devices}
    usable = [(index, name) for index, name in chosen if index in known]
    if not usable:
        return _cautious(experts, "; ".join(found.reasons) or "no accelerator could be measured")
    warnings: tuple[str, ...] = ()
    if len(usable) < len(chosen):
        left_out = ", ".join(name for index, name in chosen if index not in known)
        warnings = (f"{left_out}: not used for experts ({'; '.join(found.reasons)})",)
    costs = found.cost_section(model, n_threads, [index for index, _ in usable])
    experts = replace(experts, costs=costs, devices=tuple(name for _, name in usable))
    return StartingCosts(experts, (reason,) if reason else (), warnings)


def _accelerators(options: EngineOptions) -> Sequence[tuple[int, str]]:
    """(index in ggml's registry, name) of the GPUs that will hold experts; empty when there is a stand-in."""
    experts = options.experts
    if not options.plugin or experts.cache.is_off or experts.devices == () or options.placement.cpu_moe:
        return []
    from hybrimoe.calibration import accelerators
    from hybrimoe.native.backend_modules import device_names

    gpus = [index for index, _ in accelerators()]
    names = device_names()
    if experts.devices is None:
        return [(index, names[index]) for index in gpus]
    chosen = [(names.index(name), name) for name in experts.devices if name in names]
    return chosen if all(index in gpus for index, _ in chosen) else []


def _cautious(experts: ExpertOptions, why: str) -> StartingCosts:
    usual = ExpertOptions()
    changes = {name: value for name, value in _CAUTIOUS.items() if getattr(experts, name) == getattr(usual, name)}
    warning = f"this machine's costs are unknown ({why}): misses are computed on the CPU only"
    return StartingCosts(replace(experts, **changes), (), (warning,))  # type: ignore[arg-type]
