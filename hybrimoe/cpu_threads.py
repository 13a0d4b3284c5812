"""How many CPU threads, and on which processors: llama.cpp's flags, and what this machine's calibration found best."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from hybrimoe.errors import HybrimoeError, UsageError
from hybrimoe.machine import host

if TYPE_CHECKING:
    from hybrimoe.engine import EngineOptions
    from hybrimoe.gguf_model import GgufModel

__all__ = ["keep_to_range", "pinned", "with_best_threads"]


def keep_to_range(text: str) -> None:
    """This process and what it starts run on processors 'first-last' only. Raises UsageError."""
    first, _, last = text.partition("-")
    cpus = set(range(int(first), int(last or first) + 1))
    if not hasattr(os, "sched_setaffinity"):
        raise UsageError("--cpu-range: this system does not bind processes to processors", "leave it out")
    allowed = os.sched_getaffinity(0)
    if not cpus & allowed:
        known = ", ".join(str(cpu) for cpu in sorted(allowed))
        raise UsageError(f"--cpu-range: none of the processors {text} may be used", f"this process may use {known}")
    os.sched_setaffinity(0, cpus & allowed)


def with_best_threads(options: EngineOptions, model: GgufModel) -> EngineOptions:
    """Thread counts from the kept calibration where none were given; without one that holds here, as they are.

    With `reproducible` they do not follow a calibration: the bits of an answer depend on them, and a probe renews it.
    """
    if options.n_threads is not None or options.experts.reproducible:
        return options
    from hybrimoe import calibration

    try:
        found = calibration.load_matching(options.experts.calibration or calibration.default_path(), model)
    except HybrimoeError:
        return options
    limit = host.n_logical_cpus()
    decode, prefill = (min(n, limit) for n in found.best_threads(model))
    return replace(options, n_threads=decode, n_threads_batch=options.n_threads_batch or prefill)


def pinned(options: EngineOptions) -> EngineOptions:
    """Every expert thread on a processor of its own: physical cores first. Raises UsageError when there are too few."""
    n = max(options.threads())
    cores = host.physical_cpus()
    others = sorted(os.sched_getaffinity(0) - set(cores)) if hasattr(os, "sched_getaffinity") else []
    cpus = [*cores, *others]
    if n > len(cpus):
        raise UsageError(f"--cpu-strict: {n} threads cannot each have one of {len(cpus)} processors", f"-t {len(cpus)}")
    return replace(options, experts=replace(options.experts, pin_threads=tuple(cpus[:n])))
