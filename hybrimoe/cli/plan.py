"""`hybrimoe plan`, and `--dry-run` of chat and run: what would happen, before anything is loaded."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

from hybrimoe.cli.console import note, output_console, progress, size_text, warn
from hybrimoe.cli.report import table
from hybrimoe.config import Settings
from hybrimoe.errors import DoesNotFitError, HybrimoeError, UsageError, render

if TYPE_CHECKING:
    from hybrimoe.planning import ModelPlan, PlanMachine, Speed

_MIB = 1 << 20


def plan(settings: Settings, positionals: list[str]) -> int:
    """Prints the plan. Returns the exit code: 4 when the model does not fit."""
    if len(positionals) > 1:
        raise UsageError(f"unexpected argument '{positionals[1]}'", "hybrimoe plan MODEL")
    model = positionals[0] if positionals else settings.model
    return _plan(settings, model, machine=settings.machine, as_json=settings.json, probe=settings.probe)


def dry_run(settings: Settings, positionals: list[str]) -> int:
    """The plan of `chat` or `run` with these settings on this machine."""
    from hybrimoe.cli.loading import split_positionals

    model, _ = split_positionals(settings, positionals)
    return _plan(settings, model, machine=None, as_json=bool(settings.values.get("json", False)), probe=True)


def _plan(settings: Settings, model: str | None, *, machine: str | None, as_json: bool, probe: bool) -> int:
    from hybrimoe.gguf_model import inspect
    from hybrimoe.models import store
    from hybrimoe.planning import Setting, make_plan

    path = store.resolve(store.DEMO_NAME if model is None else model)
    info = inspect(path, header_only=True).require_moe()
    setting = Setting(
        settings.ctx_size,
        settings.batch_size,
        settings.ubatch_size,
        settings.flash_attn,
        settings.cache_type_k,
        settings.cache_type_v,
    )
    if info.n_ctx_train and setting.n_ctx > info.n_ctx_train:
        raise UsageError(
            f"a context of {setting.n_ctx} tokens is larger than the {info.n_ctx_train} that '{path.name}' was "
            "trained with",
            f"use -c {info.n_ctx_train} or less",
        )
    made = make_plan(info, setting, _machine(machine, info, probe=probe))
    if as_json:
        print(json.dumps(made.to_dict(), ensure_ascii=False, indent=1))
    else:
        output_console().print(describe(made))
    if made.memory.fits:
        return 0
    error = DoesNotFitError(
        f"'{info.path.name}' does not fit: {made.memory.reason}", f"it fits with {made.memory.nearest}"
    )
    note(render(error))
    return error.exit_code


def _machine(text: str | None, info: Any, *, probe: bool) -> PlanMachine:
    from hybrimoe.planning import PlanMachine

    if text is not None:
        from hybrimoe import profiles

        return PlanMachine.from_profile(profiles.load(text))
    if not probe:
        return PlanMachine.here()
    from hybrimoe.calibration import load_or_probe

    try:
        with progress("probing this machine") as update:
            calibration, reason = load_or_probe(info, progress=update)
    except HybrimoeError as error:
        warn(f"this machine's speed is unknown: {error.message}", error.hint)
        return PlanMachine.here()
    if reason:
        note(f"note: {reason}")
    return PlanMachine.here(calibration)


def describe(made: ModelPlan) -> str:
    """The plan as text."""
    parts = [_model_text(made), _memory_table(made), _slots_text(made)]
    if made.ours is not None:
        parts.append(_speed_table(made))
        if made.advice:
            lines = [f"  {a.gain:.2f}x  {a.decode_per_s:6.1f} t/s  {a.change}" for a in made.advice]
            parts.append("what would help decoding most\n" + "\n".join(lines))
    elif made.memory.fits:
        parts.append("speed      unknown: this machine was not probed (hybrimoe probe)")
    if made.memory.fits:
        parts.append("flags      " + shlex.join([str(made.model.path), *made.flags]))
    return "\n\n".join(parts)


def _model_text(made: ModelPlan) -> str:
    model, needs, machine = made.model, made.needs, made.machine
    layers = [layer for layer in model.moe_layers if not layer.predicts_ahead]
    sizes = sorted({layer.bytes_per_expert for layer in layers})
    each = " to ".join(f"{size / _MIB:.2f} MiB" for size in dict.fromkeys((sizes[0], sizes[-1])))
    kinds = "/".join(dict.fromkeys(kind for layer in layers for kind in layer.expert_types))
    lines = [
        f"model      {model.name}: {model.architecture}, {model.n_layers} layers, {len(layers)} with "
        f"{model.n_experts} experts, top-{model.n_experts_used}"
    ]
    if made.header_only:
        lines.append("           the file's header alone was read: the weights are missing")
    lines += [
        f"machine    {machine.name}" + (f" ({machine.source})" if machine.source else ""),
        f"experts    {size_text(needs.expert_bytes)} = {len(layers)} layers x {model.n_experts} x {each} ({kinds})",
        f"the rest   {size_text(needs.dense_bytes)} dense"
        + (f" (with {size_text(needs.shared_bytes)} of shared experts)" if needs.shared_bytes else "")
        + f" + {size_text(needs.embedding_bytes)} embeddings + {size_text(needs.router_bytes)} routers",
        f"context    {made.setting.n_ctx} tokens: KV {size_text(needs.buffers.kv_bytes)} "
        f"({made.setting.cache_type_k}/{made.setting.cache_type_v})"
        + (f" + recurrent state {size_text(needs.buffers.recurrent_bytes)}" if needs.buffers.recurrent_bytes else "")
        + f", compute buffers {size_text(needs.compute_bytes)} for batches of {made.setting.n_ubatch}",
        f"           ({needs.source})",
    ]
    return "\n".join(lines)


def _memory_table(made: ModelPlan) -> str:
    needs, memory, machine = made.needs, made.memory, made.machine

    def mib(n_bytes: float) -> str:
        return f"{n_bytes / _MIB:.0f}"

    head = ["memory [MiB]", "has", "dense", "KV", "compute", "experts", "margin", "left"]
    rows = []
    if machine.has_gpu:
        used = memory.vram_need + memory.cache_bytes
        name = f"{len(machine.vram_bytes)} x " if len(machine.vram_bytes) > 1 else ""
        cells = (needs.dense_bytes, needs.kv_bytes, needs.compute_bytes, memory.cache_bytes, memory.margin_bytes)
        rows.append([f"{name}{machine.gpu_name}", *map(mib, (memory.vram_bytes, *cells, memory.vram_bytes - used))])
        host = (needs.embedding_bytes + needs.router_bytes, 0, needs.buffers.output_bytes, needs.expert_bytes)
    else:
        dense = needs.weight_bytes - needs.expert_bytes
        host = (dense, needs.kv_bytes, needs.compute_bytes, needs.expert_bytes)
    if sum(host) > memory.ram_need:  # every expert is on the card
        host = (*host[:3], 0)
    other = memory.ram_need - sum(host)
    rows.append(["main memory", *map(mib, (memory.ram_bytes, *host, other, memory.ram_bytes - memory.ram_need))])
    return table(head, rows)


def _slots_text(made: ModelPlan) -> str:
    if not made.machine.has_gpu:
        return "slots      none: experts run on the CPU"
    slots, n = made.memory.n_slots, made.model.n_experts
    low, high = min(slots, default=0), max(slots, default=0)
    count = str(low) if low == high else f"{low} to {high}"
    share = sum(slots) / max(1, n * len(slots))
    return f"slots      {count} of {n} per layer, {sum(slots)} in all ({share:.0%} of the experts)"


def _speed_table(made: ModelPlan) -> str:
    rows = []
    for name, pair in (("llama.cpp", made.stock), ("hybrimoe", made.ours)):
        if pair is not None:
            rows.append([name, *_speed_cells(pair[0]), *_speed_cells(pair[1])])
    basis = "measured costs" if made.machine.measured else "estimated costs"
    text = table(["expected t/s", "prefill", "range", "limit", "decode", "range", "limit"], rows)
    note_text = "" if not made.machine.has_gpu else "; how often a slot hits is assumed, see docs/cost-model.md"
    return f"{text}\n({basis}{note_text})"


def _speed_cells(speed: Speed) -> list[str]:
    def number(value: float) -> str:
        return f"{value:.0f}" if value >= 100 else f"{value:.1f}"

    return [number(speed.per_s), f"{number(speed.low)}-{number(speed.high)}", speed.limit]
