"""Where llama.cpp would compute each layer: what `-ngl`, `-cmoe`, `-ncmoe` and `-ot` place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybrimoe.errors import UsageError
from hybrimoe.placement import CPU_MOE_PATTERN

if TYPE_CHECKING:
    from hybrimoe.planning.work import ModelWork

__all__ = ["LayerPlacement", "Request"]


@dataclass(frozen=True)
class Request:
    """What the user typed. `n_gpu_layers` below 0: all. `overrides` are `-ot` arguments."""

    n_gpu_layers: int = -1
    cpu_moe: bool = False
    n_cpu_moe: int = 0
    overrides: Sequence[str] = ()

    @property
    def is_default(self) -> bool:
        return self.n_gpu_layers < 0 and not self.cpu_moe and not self.n_cpu_moe and not self.overrides

    def flags(self) -> str:
        """As they were typed."""
        words = [f"-ngl {self.n_gpu_layers}"] if self.n_gpu_layers >= 0 else []
        words += ["-cmoe"] if self.cpu_moe else [f"-ncmoe {self.n_cpu_moe}"] if self.n_cpu_moe else []
        return " ".join([*words, *(f"-ot {one}" for one in self.overrides)])


@dataclass(frozen=True)
class LayerPlacement:
    """[n_layers] whether a layer's dense weights, and its experts, are on a card; `output`: the last product."""

    dense: tuple[bool, ...]
    experts: tuple[bool, ...]
    output: bool

    @classmethod
    def of(cls, work: ModelWork, request: Request) -> LayerPlacement:
        """As llama.cpp reads the flags: the last layers go to the card, the output counts as one more. Raises
        UsageError."""
        layers = work.layers
        n = len(layers)
        n_gpu = n + 1 if request.n_gpu_layers < 0 else request.n_gpu_layers
        dense = tuple(layer.index >= n + 1 - n_gpu for layer in layers)
        rules = _rules(request)
        experts = []
        for layer, on_card in zip(layers, dense, strict=True):
            names = [t.name for t in layer.moe.expert_tensors] if layer.moe else []
            where = [_place(name, rules, on_card) for name in names]
            experts.append(on_card if not where else all(where))
        return cls(dense, tuple(experts), n_gpu > 0)

    @property
    def any_dense(self) -> bool:
        return any(self.dense)


def _rules(request: Request) -> list[tuple[re.Pattern[str], bool]]:
    """(pattern, whether it names a card) in llama.cpp's order."""
    rules: list[tuple[re.Pattern[str], bool]] = []
    for text in request.overrides:
        for part in text.split(","):
            pattern, equals, name = part.partition("=")
            if not equals or not pattern or not name:
                raise UsageError(f"-ot '{text}' is not of the form PATTERN=BUFFER_TYPE", "for example -ot 'exps=CPU'")
            try:
                rules.append((re.compile(pattern), not name.upper().startswith("CPU")))
            except re.error as error:
                raise UsageError(f"-ot '{text}' is no regular expression: {error}") from error
    if request.cpu_moe:
        rules.append((re.compile(CPU_MOE_PATTERN), False))
    return rules + [(re.compile(rf"blk\.{i}{CPU_MOE_PATTERN}"), False) for i in range(request.n_cpu_moe)]


def _place(name: str, rules: Sequence[tuple[re.Pattern[str], bool]], default: bool) -> bool:
    for pattern, on_card in rules:
        if pattern.search(name):
            return on_card
    return default
