"""What to measure: llama-bench's tests, and the ways of running a model that its flags span."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from hybrimoe.errors import UsageError

__all__ = ["Setup", "Test", "int_ranges", "list_tests", "prompt_and_gen", "setups_of"]

_RANGE = re.compile(r"(-?\d+)(?:-(\d+)(?:([+*])(\d+))?)?")
_MOST_VALUES = 1000


@dataclass(frozen=True)
class Test:
    """`n_prompt` tokens at once, then `n_gen` one by one, after `n_depth` that are not timed."""

    n_prompt: int
    n_gen: int
    n_depth: int = 0

    @property
    def name(self) -> str:
        """As llama-bench writes it: 'pp512', 'tg128 @ d1024', 'pp512+tg128'."""
        if self.n_gen == 0:
            text = f"pp{self.n_prompt}"
        elif self.n_prompt == 0:
            text = f"tg{self.n_gen}"
        else:
            text = f"pp{self.n_prompt}+tg{self.n_gen}"
        return f"{text} @ d{self.n_depth}" if self.n_depth else text

    @property
    def n_tokens(self) -> int:
        return self.n_prompt + self.n_gen

    @property
    def n_ctx(self) -> int:
        return self.n_tokens + self.n_depth


@dataclass(frozen=True)
class Setup:
    """One way of running a model. Up to `overrides` for llama.cpp too; what follows is the plug-in's alone.

    `n_cpu_moe` -1: all layers (`-cmoe`). `expert_cache` and the policies are as on the command line.
    """

    model: str
    n_gpu_layers: int
    n_cpu_moe: int
    load_mode: str
    repack: bool
    flash_attn: str
    type_k: str
    type_v: str
    n_batch: int
    n_ubatch: int
    n_threads: int
    overrides: str
    device: str | None
    expert_cache: str
    cache_policy: str
    schedule: str
    prefetch: str
    admission: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def int_ranges(least: int) -> Callable[[str], tuple[int, ...]]:
    """A parser of llama-bench's lists: '512', '128,256', '1-4', '64-256*2', '512-2048+512'. Raises ValueError."""

    def parse(text: str) -> tuple[int, ...]:
        values: list[int] = []
        for part in text.split(","):
            match = _RANGE.fullmatch(part.strip())
            if match is None:
                raise ValueError(f"'{text}' is no list of numbers such as 128,256 or 64-512*2")
            first = int(match[1])
            last = int(match[2]) if match[2] else first
            step = int(match[4]) if match[4] else 1
            value = first
            while value <= last:
                values.append(value)
                if len(values) > _MOST_VALUES:
                    raise ValueError(f"'{text}' has more than {_MOST_VALUES} values")
                following = value * step if match[3] == "*" else value + step
                if following <= value:
                    if value == last:
                        break
                    raise ValueError(f"'{part}' never reaches its end")
                value = following
            if last < first:
                raise ValueError(f"'{part}' ends before it begins")
        for value in values:
            if value < least:
                raise ValueError(f"{value} is below {least}")
        return tuple(values)

    return parse


def prompt_and_gen(text: str) -> tuple[int, int]:
    """'512,128' as a pair. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    if match is None:
        raise ValueError(f"'{text}' is no pair of prompt and generation such as 512,128")
    return int(match[1]), int(match[2])


def list_tests(
    n_prompt: Sequence[int], n_gen: Sequence[int], pairs: Sequence[tuple[int, int]], n_depth: Sequence[int]
) -> list[Test]:
    """The tests in llama-bench's order. Raises UsageError when there is none."""
    found = []
    for depth in n_depth:
        found += [Test(n, 0, depth) for n in n_prompt if n]
        found += [Test(0, n, depth) for n in n_gen if n]
        found += [Test(p, g, depth) for p, g in pairs if p or g]
    if not found:
        raise UsageError("there is no test left to run", "give -p, -n or -pg more than 0")
    return found


def setups_of(values: dict[str, Sequence[Any]]) -> list[Setup]:
    """Every combination of `values` (one list for each field of Setup); what makes a model load again varies last."""
    names = [f.name for f in fields(Setup)]
    return [Setup(**dict(zip(names, row, strict=True))) for row in itertools.product(*(values[n] for n in names))]
