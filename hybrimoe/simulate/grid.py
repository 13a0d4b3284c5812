"""What to try: policies, sizes, prefetch, schedules and machines, as the command line writes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hybrimoe.config import parse_size
from hybrimoe.errors import UsageError
from hybrimoe.native.core import Kind, Policy, PolicyInfo, policies
from hybrimoe.trace.format import ModelIdentity

__all__ = ["DEFAULT_SIZES", "Point", "default_policies", "describe", "parse_policies", "parse_size_of_cache", "split"]

DEFAULT_SIZES = "2k,25%,50%,75%"
_DEFAULT_POLICIES = ("lru", "lfu", "lfru", "ema:alpha=0.1", "mrs", "belady")
_MULTIPLE = re.compile(r"(\d+(?:\.\d+)?)k")
_FRACTION = re.compile(r"(\d+(?:\.\d+)?)%|(\d*\.\d+)")
_OPTIONS = {
    Kind.EVICTION: "--cache-policy",
    Kind.SCHEDULER: "--schedule",
    Kind.PREFETCH: "--prefetch",
    Kind.ADMISSION: "--admission",
}


@dataclass(frozen=True)
class Point:
    """One replay. `machine` None: event-atomic, without a clock. `n_slots` is per MoE layer."""

    trace: Path
    policy: str
    n_slots: int
    size: str
    cold: bool
    admission: str = "always"
    machine: str | None = None
    schedule: str = "two-threshold"
    prefetch: str = "none"
    lookahead: str = "recorded"
    n_prompts: int | None = None
    n_ubatch: int = 512
    gap_us: float | None = None
    max_window_layers: int = 1
    pay_back: bool = True


def split(text: str) -> list[str]:
    """Parts of a comma-separated list in which `name:a=1,b=2` is one part."""
    parts: list[str] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        if parts and "=" in part and ":" not in part and ":" in parts[-1]:
            parts[-1] += "," + part
        else:
            parts.append(part)
    return parts


def split_machines(text: str) -> list[str]:
    """Machines of one flag: a description, whose pairs are separated by commas, or names of presets and files."""
    return [text] if "=" in text.partition(",")[0].partition(":")[0] else split(text)


def describe(kind: Kind, name: str) -> PolicyInfo:
    """The policy of this name. Raises UsageError naming the option and the known ones."""
    known = policies(kind)
    for info in known:
        if info.name == name:
            return info
    raise UsageError(f"{_OPTIONS[kind]}: there is no '{name}'", f"known are {', '.join(p.name for p in known)}")


def parse_policies(kind: Kind, text: str) -> list[str]:
    """Policies of a list; `all` is every one that is not an oracle, and for eviction the oracles too.

    Raises UsageError for unknown names and parameters without a number.
    """
    found: list[str] = []
    for part in split(text):
        if part == "all":
            found += [p.name for p in policies(kind) if kind == Kind.EVICTION or not p.oracle]
            continue
        policy = Policy.parse(part)
        known = {p.name for p in describe(kind, policy.name).params}
        for name in policy.params:
            if name not in known:
                listed = ", ".join(sorted(known)) or "none"
                raise UsageError(f"{_OPTIONS[kind]}: '{policy.name}' has no parameter '{name}'", f"known are {listed}")
        found.append(part)
    if not found:
        raise UsageError(f"{_OPTIONS[kind]} names no policy")
    return list(dict.fromkeys(found))


def default_policies(has_scores: bool) -> list[str]:
    """Columns of every comparison; `mrs` only where the trace has router scores."""
    return [name for name in _DEFAULT_POLICIES if name != "mrs" or has_scores]


def parse_size_of_cache(text: str, model: ModelIdentity, budget_bytes: float | None = None) -> int:
    """Slots per layer: an integer; `2k` times top-k; `25%` or `.25` of the experts; `6GiB` in all; `auto`.

    Bytes are shared evenly over the layers and rounded down; more than all experts is all of them.

    Args:
        budget_bytes: what `auto` may take; None: unknown.

    Raises:
        UsageError: no size, more slots than experts, or a size in bytes where the trace does not know them.
    """
    option = "--expert-cache"
    if match := _MULTIPLE.fullmatch(text):
        return min(model.n_expert, round(float(match[1]) * model.top_k))
    if match := _FRACTION.fullmatch(text):
        share = float(match[1]) / 100 if match[1] else float(match[2])
        if share > 1:
            raise UsageError(f"{option} {text} is more than all experts", f"there are {model.n_expert} per layer")
        return int(share * model.n_expert + 0.5)
    if text.isdigit():
        if int(text) > model.n_expert:
            raise UsageError(f"{option} {text}: '{model.name}' has {model.n_expert} experts per layer")
        return int(text)
    if text == "auto":
        if budget_bytes is None:
            raise UsageError(
                f"{option} auto needs a machine and a trace that knows its model's bytes", "--profile NAME"
            )
        return _slots_for(budget_bytes, text, model)
    try:
        n_bytes = parse_size(text)
    except ValueError as error:
        hint = "16 (slots per layer), 2k (times top-k), 25%, 6GiB or auto"
        raise UsageError(f"{option}: '{text}' is no cache size", hint) from error
    return _slots_for(n_bytes, text, model)


def _slots_for(n_bytes: float, text: str, model: ModelIdentity) -> int:
    if not model.knows_bytes:
        raise UsageError(
            f"--expert-cache {text}: the trace does not know the bytes of an expert of '{model.name}'",
            "import it with --expert-bytes, or give slots",
        )
    return min(model.n_expert, int(n_bytes // sum(model.expert_bytes)))


def sizes_of(text: str, model: ModelIdentity, budget_bytes: float | None) -> Sequence[tuple[str, int]]:
    """(text, slots per layer) of a list of sizes, without repeats of a size."""
    found: dict[int, str] = {}
    for part in split(text):
        found.setdefault(parse_size_of_cache(part, model, budget_bytes), part)
    if not found:
        raise UsageError("--expert-cache names no size")
    return [(name, n) for n, name in found.items()]
