"""The context that a model gets when nobody asks for one; `plan`, `chat`, `run` and `serve` take it from here.

A context's KV cache takes memory from the expert cache. The default is the largest, up to the trained length, that
costs at most 5 % of the decode speed with 8,192 tokens, for each of the slots that share the cache; less where memory
is short.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hybrimoe.planning.memory import MemoryPlan, Needs, Setting, measure_needs, plan_memory

if TYPE_CHECKING:
    from hybrimoe.gguf_model import GgufModel
    from hybrimoe.machine.machine import Machine

__all__ = ["ContextChoice", "choose_context", "needs_no_choice"]

_USUAL_CTX = 8192
_LEAST_CTX = 512
_STEP = 256
_MOST_LOSS = 0.05
# A default leaves a tenth of the memory that can be had to whatever starts later.
_RAM_SHARE = 0.9


@dataclass(frozen=True)
class ContextChoice:
    """The setting with its context, what it needs, and one line that says why."""

    setting: Setting
    needs: Needs
    memory: MemoryPlan
    reason: str


def choose_context(model: GgufModel, setting: Setting, machine: Machine, n_parallel: int = 1) -> ContextChoice:
    """The default context of `setting`, whose own `n_ctx` is left out of account. Raises ModelError as `measure_needs`.

    llama.cpp is asked at the usual and at the trained length; between them KV cache and buffers are straight lines.
    """
    careful = replace(machine, ram_bytes=int(_RAM_SHARE * machine.ram_bytes))
    chosen = _choose(model, setting, careful, n_parallel)
    return replace(chosen, memory=plan_memory(model, chosen.needs, chosen.setting, machine))


def needs_no_choice(model: GgufModel, setting: Setting, machine: Machine) -> bool:
    """Whether all that the model was trained with, or `setting.n_ctx`, leaves half of the memory free anyway and there
    is no card: then llama.cpp need not be asked before every start."""
    from hybrimoe.engine import KV_TYPES

    n_ctx = setting.n_ctx or model.n_ctx_train
    kinds = KV_TYPES[setting.cache_type_k][1], KV_TYPES[setting.cache_type_v][1]
    size = model.total_bytes + model.kv.bytes_for(n_ctx, *kinds)
    return not machine.has_card and n_ctx > 0 and 2 * size <= machine.ram_bytes


def _choose(model: GgufModel, setting: Setting, machine: Machine, n_parallel: int) -> ContextChoice:
    from hybrimoe.planning.speed import SpeedModel
    from hybrimoe.planning.work import ModelWork

    trained = _rounded(model.n_ctx_train or 4096)
    usual = min(_rounded(_USUAL_CTX * n_parallel), trained)
    most = trained
    at_usual = _at(model, replace(setting, n_ctx=usual), machine)
    if usual == most:
        if at_usual.memory.runs:
            return replace(
                at_usual, reason=f"context {most} tokens{_shared(most, n_parallel)}, all that it was trained with"
            )
        return _largest_that_runs(model, setting, machine, usual, at_usual)
    at_most = _at(model, replace(setting, n_ctx=most), machine)
    if not at_usual.memory.runs:
        return _largest_that_runs(model, setting, machine, usual, at_usual)

    def decode(choice: ContextChoice) -> float:
        if not choice.memory.runs:
            return 0.0
        speed = SpeedModel(ModelWork(model, choice.setting, choice.needs.buffers), machine)
        return speed.decode(choice.memory.n_slots, choice.memory.missing).per_s

    least = (1 - _MOST_LOSS) * decode(at_usual)
    if decode(at_most) >= least:
        return replace(
            at_most, reason=f"context {most} tokens{_shared(most, n_parallel)}, all that it was trained with"
        )
    low, high = usual // _STEP, most // _STEP
    while high - low > 1:
        middle = (low + high) // 2
        between = _between(model, at_usual, at_most, middle * _STEP, machine)
        low, high = (middle, high) if decode(between) >= least else (low, middle)
    # A round number near the bound, so that it is the same tomorrow when some megabytes more are taken.
    n_ctx = max(usual, _round_down(low * _STEP))
    chosen = at_usual if n_ctx == usual else _at(model, replace(setting, n_ctx=n_ctx), machine)
    if not chosen.memory.runs:
        chosen = at_usual
    why = "would cost decode speed" if machine.has_card else "has no room in main memory"
    n_ctx = chosen.setting.n_ctx
    return replace(
        chosen, reason=f"context {n_ctx} of {trained} tokens{_shared(n_ctx, n_parallel)}: more {why}; -c sets it"
    )


def _shared(n_ctx: int, n_parallel: int) -> str:
    return f", {n_ctx // n_parallel} for each of {n_parallel} slots" if n_parallel > 1 else ""


def _at(model: GgufModel, setting: Setting, machine: Machine) -> ContextChoice:
    needs = measure_needs(model, setting)
    return ContextChoice(setting, needs, plan_memory(model, needs, setting, machine), "")


def _between(model: GgufModel, low: ContextChoice, high: ContextChoice, n_ctx: int, machine: Machine) -> ContextChoice:
    t = (n_ctx - low.setting.n_ctx) / (high.setting.n_ctx - low.setting.n_ctx)

    def mix(a: int, b: int) -> int:
        return round(a + t * (b - a))

    a, b = low.needs.buffers, high.needs.buffers
    buffers = replace(
        a,
        kv_bytes=mix(a.kv_bytes, b.kv_bytes),
        compute_bytes={name: mix(n, b.compute_bytes.get(name, n)) for name, n in a.compute_bytes.items()},
    )
    setting, needs = replace(low.setting, n_ctx=n_ctx), replace(low.needs, buffers=buffers)
    return ContextChoice(setting, needs, plan_memory(model, needs, setting, machine), "")


def _largest_that_runs(
    model: GgufModel, setting: Setting, machine: Machine, usual: int, at_usual: ContextChoice
) -> ContextChoice:
    """Halves the usual context until it runs; as it is where nothing does."""
    n_ctx = usual // 2
    while n_ctx >= _LEAST_CTX:
        choice = _at(model, replace(setting, n_ctx=_rounded(n_ctx)), machine)
        if choice.memory.runs:
            n = choice.setting.n_ctx
            return replace(choice, reason=f"context {n} tokens: memory has room for no more; -c sets it")
        n_ctx //= 2
    return replace(at_usual, reason=f"context {usual} tokens")


def _rounded(n_ctx: int) -> int:
    return -(-n_ctx // _STEP) * _STEP


def _round_down(n_ctx: int) -> int:
    """To two significant binary digits: 8192, 12288, 16384, 24576, ..."""
    top = 1 << (n_ctx.bit_length() - 1)
    return top + (top // 2 if n_ctx >= top + top // 2 else 0)
