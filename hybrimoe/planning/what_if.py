"""What another part, setting or quantisation would bring: a plan for every combination of what is varied."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import UsageError
from hybrimoe.gguf_header import GGML_TYPES
from hybrimoe.machine.describe import KEYS, changed
from hybrimoe.planning.memory import Setting
from hybrimoe.planning.plan import Asked, ModelPlan, make_plan

if TYPE_CHECKING:
    from hybrimoe.gguf_header import TensorInfo
    from hybrimoe.gguf_model import GgufModel, MoeLayer
    from hybrimoe.machine.machine import Machine

__all__ = ["Axis", "Variant", "parse_axes", "variants"]

_MOST = 256  # plans
_SETTINGS = ("c", "ub", "ctk", "ctv", "depth", "prompt", "ngl", "ncmoe", "cmoe", "quant")
_KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
_NUMBERS = {"c": (1, 1 << 24), "ub": (1, 1 << 20), "depth": (0, 1 << 24), "prompt": (1, 1 << 24), "ngl": (-2, 512),
            "ncmoe": (0, 512)}  # fmt: skip


@dataclass(frozen=True)
class Axis:
    """One thing to vary, and its values."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """One combination, by key, and its plan."""

    values: dict[str, str]
    plan: ModelPlan

    def to_dict(self) -> dict[str, Any]:
        made = self.plan
        speeds = {
            name: None if pair is None else {"prefill": pair[0].to_dict(), "decode": pair[1].to_dict()}
            for name, pair in (("stock", made.stock), ("ours", made.ours))
        }
        return {
            "values": self.values, "machine": made.machine.name, "fits": made.memory.fits, "n_ctx": made.setting.n_ctx,
            "vram_need": made.memory.vram_need, "ram_need": made.memory.ram_need, "speed": speeds,
        }  # fmt: skip


def parse_axes(texts: Sequence[str]) -> list[Axis]:
    """`KEY=VALUE,VALUE` or `KEY=FIRST:LAST:STEP` each. Raises UsageError."""
    axes: list[Axis] = []
    known = (*KEYS, *_SETTINGS)
    for text in texts:
        key, equals, rest = (part.strip() for part in text.partition("="))
        key = key.lstrip("-").lower()
        if not equals or not rest:
            raise UsageError(f"--vary '{text}' is not of the form KEY=VALUE,VALUE", f"keys: {', '.join(known)}")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise UsageError(
                f"--vary: there is nothing called '{key}'",
                f"did you mean {near[0]}?" if near else f"keys: {', '.join(known)}",
            )
        if any(axis.key == key for axis in axes):
            raise UsageError(f"--vary: {key} is varied twice", "list all its values in one")
        values = _range(rest) if key in _NUMBERS and re.fullmatch(r"-?\d+:-?\d+:\d+", rest) else rest.split(",")
        cleaned = tuple(dict.fromkeys(value.strip() for value in values if value.strip()))
        for value in cleaned:
            _check(key, value)
        axes.append(Axis(key, cleaned))
    n = 1
    for axis in axes:
        n *= len(axis.values)
    if n > _MOST:
        raise UsageError(f"--vary asks for {n} plans, more than {_MOST}", "vary fewer values")
    return axes


def _range(text: str) -> list[str]:
    first, last, step = (int(part) for part in text.split(":"))
    if step < 1 or last < first or (last - first) // step >= _MOST:
        raise UsageError(f"--vary: '{text}' is not a range", "FIRST:LAST:STEP, such as 0:48:8")
    return [str(n) for n in range(first, last + 1, step)]


def _check(key: str, value: str) -> None:
    if key in _NUMBERS:
        least, most = _NUMBERS[key]
        if not re.fullmatch(r"-?\d{1,9}", value) or not least <= int(value) <= most:
            raise UsageError(f"--vary: {key}={value} must be a whole number from {least} to {most}")
    elif key in ("ctk", "ctv") and value not in _KV_TYPES:
        raise UsageError(f"--vary: {key}={value} is none of {', '.join(_KV_TYPES)}")
    elif key == "cmoe" and value not in ("0", "1"):
        raise UsageError(f"--vary: cmoe={value} must be 0 or 1")
    elif key == "quant" and value.upper() not in {t.name for t in GGML_TYPES.values()}:
        raise UsageError(f"--vary: there is no quantisation '{value}'", "ggml's types, such as Q4_K, Q6_K, MXFP4")


def variants(
    model: GgufModel,
    setting: Setting,
    machine: Machine,
    asked: Asked,
    axes: Sequence[Axis],
    progress: Callable[[float], None] = lambda _: None,
) -> Iterator[Variant]:
    """A plan of each combination, the last axis fastest. Raises UsageError, ModelError."""
    combinations = list(itertools.product(*(axis.values for axis in axes)))
    for i, values in enumerate(combinations):
        progress(i / len(combinations))
        named = {axis.key: value for axis, value in zip(axes, values, strict=True)}
        yield Variant(named, _plan(model, setting, machine, asked, named))


def _plan(model: GgufModel, setting: Setting, machine: Machine, asked: Asked, named: dict[str, str]) -> ModelPlan:
    parts = {key: value for key, value in named.items() if key in KEYS}
    if parts:
        machine = changed(machine, ",".join(f"{key}={value}" for key, value in parts.items()))
    request = asked.request
    for key, value in named.items():
        if key == "c":
            setting = replace(setting, n_ctx=int(value))
        elif key == "ub":
            setting = replace(setting, n_ubatch=int(value), n_batch=max(setting.n_batch, int(value)))
        elif key in ("ctk", "ctv"):
            k, v = (value, setting.cache_type_v) if key == "ctk" else (setting.cache_type_k, value)
            setting = replace(setting, cache_type_k=k, cache_type_v=v)
        elif key == "depth":
            asked = replace(asked, depth=int(value))
        elif key == "prompt":
            asked = replace(asked, n_prompt=int(value))
        elif key == "ngl":
            request = replace(request, n_gpu_layers=int(value))
        elif key == "ncmoe":
            request = replace(request, n_cpu_moe=int(value), cpu_moe=False)
        elif key == "cmoe":
            request = replace(request, cpu_moe=value == "1")
        elif key == "quant":
            model = with_experts_in(model, value.upper())
    return make_plan(model, setting, machine, replace(asked, request=request), advise=False)


def with_experts_in(model: GgufModel, type_name: str) -> GgufModel:
    """The model as if its experts were quantised to another type."""
    kind = next(t for t in GGML_TYPES.values() if t.name == type_name)

    def tensor(t: TensorInfo) -> TensorInfo:
        if not t.name.endswith("_exps.weight"):
            return t
        n_bytes = -(-t.n_elements // kind.block_elems) * kind.block_bytes
        return replace(t, type_name=type_name, n_bytes=n_bytes)

    def layer(one: MoeLayer) -> MoeLayer:
        tensors = tuple(tensor(t) for t in one.expert_tensors)

        def part(name: str) -> int:
            return sum(t.n_bytes for t in tensors if f".ffn_{name}_exps." in t.name) // one.n_experts

        return replace(
            one, expert_tensors=tensors, gate_bytes=part("gate"), up_bytes=part("up"), gate_up_bytes=part("gate_up"),
            down_bytes=part("down"),
        )  # fmt: skip

    return replace(
        model,
        moe_layers=tuple(layer(one) for one in model.moe_layers),
        tensors=tuple(tensor(t) for t in model.tensors),
    )
