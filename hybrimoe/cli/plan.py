"""`hybrimoe plan`, and `--dry-run` of chat and run: what would happen, before anything is loaded."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe.cli.console import note, output_console, progress, size_text, warn
from hybrimoe.cli.report import table
from hybrimoe.config import Settings
from hybrimoe.errors import DoesNotFitError, HybrimoeError, UsageError, render

if TYPE_CHECKING:
    from hybrimoe.gguf_model import GgufModel
    from hybrimoe.machine.machine import Machine
    from hybrimoe.planning import Asked, ModelPlan, Setting, Speed
    from hybrimoe.planning.what_if import Variant

_MIB = 1 << 20


def plan(settings: Settings, positionals: list[str]) -> int:
    """Prints the plan. Returns the exit code: 4 when the model does not fit."""
    if settings.machines:
        return list_machines(as_json=settings.json)
    if len(positionals) > 1:
        raise UsageError(f"unexpected argument '{positionals[1]}'", "hybrimoe plan MODEL")
    model = positionals[0] if positionals else settings.model
    return _plan(settings, model, machine=settings.machine, as_json=settings.json, probe=settings.probe)


def dry_run(settings: Settings, positionals: list[str]) -> int:
    """The plan of `chat`, `run` or `serve` with these settings on this machine."""
    from hybrimoe.cli.loading import split_positionals

    model, _ = split_positionals(settings, positionals)
    return _plan(settings, model, machine=None, as_json=bool(settings.values.get("json", False)), probe=True)


def setting_of(settings: Settings) -> Setting:
    """Context and batches as typed; 0 tokens of context where none were asked for."""
    from hybrimoe.planning import Setting

    return Setting(
        settings.ctx_size,
        settings.batch_size,
        settings.ubatch_size,
        settings.flash_attn,
        settings.cache_type_k,
        settings.cache_type_v,
    )


def wants_default_context(settings: Settings) -> bool:
    """Whether nobody asked for a context; `-c 0` asks for all that the model was trained with."""
    return settings.is_default("ctx_size")


def _asked(settings: Settings) -> Asked:
    from hybrimoe.planning import Asked, Request

    request = Request(
        settings.n_gpu_layers if settings.n_gpu_layers >= 0 else -1,
        settings.cpu_moe,
        settings.n_cpu_moe,
        tuple(settings.override_tensor),
    )
    values = settings.values
    return Asked(request, values.get("depth", 0), values.get("n_prompt") or 0, values.get("parallel") or 1)


def _plan(settings: Settings, model: str | None, *, machine: str | None, as_json: bool, probe: bool) -> int:
    from dataclasses import replace

    from hybrimoe.gguf_model import inspect
    from hybrimoe.models import store
    from hybrimoe.planning import make_plan
    from hybrimoe.planning.what_if import parse_axes

    path = store.resolve(store.DEMO_NAME if model is None else model)
    info = inspect(path, header_only=True).require_moe()
    setting, asked = setting_of(settings), _asked(settings)
    if info.n_ctx_train and setting.n_ctx > info.n_ctx_train:
        raise UsageError(
            f"a context of {setting.n_ctx} tokens is larger than the {info.n_ctx_train} that '{path.name}' was "
            "trained with",
            f"use -c {info.n_ctx_train} or less",
        )
    if not setting.n_ctx and not wants_default_context(settings):
        setting = replace(setting, n_ctx=info.n_ctx_train or 4096)
    axes = parse_axes(settings.values.get("vary", ()))
    chosen = _machine(machine, info, probe=probe)
    if settings.n_gpu_layers == 0:
        chosen = chosen.without_cards()
    if axes:
        return _vary(settings, info, setting, chosen, asked, axes, as_json=as_json)
    made = make_plan(info, setting, chosen, asked)
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


def _machine(text: str | None, info: GgufModel, *, probe: bool) -> Machine:
    from hybrimoe.machine.files import THIS_MACHINE, open_machine
    from hybrimoe.machine.here import this_machine

    if text is not None and text != THIS_MACHINE:
        machine = open_machine(text)
        if machine.table is not None:
            raise UsageError(
                f"'{text}' holds what experts cost, and nothing of the machine's memory",
                'describe the machine: --machine "gpu=rtx3060,cpu=5600x,ram=ddr4-3200x2:32GiB"',
            )
        return machine
    from hybrimoe.calibration import default_path, load_matching, load_or_probe

    if not probe:
        try:
            return this_machine(load_matching(default_path(), info))
        except HybrimoeError:
            return this_machine()
    try:
        with progress("probing this machine") as update:
            calibration, reason = load_or_probe(info, progress=update)
    except HybrimoeError as error:
        warn(f"this machine was not measured, speeds are estimates: {error.message}", error.hint)
        return this_machine()
    if reason:
        note(f"note: {reason}")
    return this_machine(calibration)


def list_machines(*, as_json: bool) -> int:
    """Prints what `--machine` knows: presets, keys, cards, processors."""
    from hybrimoe.machine.cards import ARCHITECTURES, all_cards
    from hybrimoe.machine.cpus import FAMILIES, all_cpus
    from hybrimoe.machine.describe import KEYS, presets

    cards, cpus = list(all_cards()), list(all_cpus())
    if as_json:
        data = {
            "presets": presets(),
            "keys": KEYS,
            "cards": [
                {
                    "name": c.name, "architecture": c.architecture, "memory_bytes": c.memory_bytes,
                    "bandwidth_bytes_per_s": c.bandwidth_bytes_per_s, "fp32_flops": c.fp32_flops,
                    "int8_ops": c.fp32_flops * ARCHITECTURES[c.architecture].int8,
                }
                for c in cards
            ],
            "cpus": [
                {
                    "name": c.name, "family": FAMILIES[c.family].title, "instructions": FAMILIES[c.family].isa,
                    "n_cores": c.n_cores, "n_efficiency_cores": c.n_efficiency_cores, "ghz": c.ghz,
                    "usual_ram": FAMILIES[c.family].ram,
                }
                for c in cpus
            ],
        }  # fmt: skip
        print(json.dumps(data, ensure_ascii=False, indent=1))
        return 0
    rows = [
        [c.name, ARCHITECTURES[c.architecture].kind, c.architecture, f"{c.memory_bytes >> 30}",
         f"{c.bandwidth_bytes_per_s / 1e9:g}", f"{c.fp32_flops * ARCHITECTURES[c.architecture].int8 / 1e12:.0f}"]
        for c in cards
    ]  # fmt: skip
    cores = [
        [c.name, FAMILIES[c.family].title, FAMILIES[c.family].isa,
         f"{c.n_cores}+{c.n_efficiency_cores}" if c.n_efficiency_cores else str(c.n_cores), f"{c.ghz:g}",
         FAMILIES[c.family].ram]
        for c in cpus
    ]  # fmt: skip
    parts = [
        table(["machine", "stands for"], [[name, text] for name, text in presets().items()]),
        table(["key", "says"], [[key, text] for key, text in KEYS.items()]),
        table(["card", "maker", "architecture", "GiB", "GB/s", "INT8 TOPS"], rows),
        table(["CPU", "family", "instructions", "cores", "GHz", "usual memory"], cores),
    ]
    output_console().print("\n\n".join(parts))
    note("", 'hybrimoe plan MODEL --machine "gpu=rtx4070ti,cpu=7900x,ram=ddr5-6000x2:96GiB,link=pcie4"')
    return 0


def _vary(
    settings: Settings, info: GgufModel, setting: Setting, machine: Machine, asked: Asked, axes: Any, *, as_json: bool
) -> int:
    from hybrimoe.planning.what_if import variants

    with progress("planning") as update:
        found = list(variants(info, setting, machine, asked, axes, update))
    if settings.plot is not None:
        from hybrimoe.planning.plots import speed_plot
        from hybrimoe.simulate.plots import png
        from hybrimoe.trace.files import save

        save(Path(settings.plot), png(speed_plot(found, info.name)))
        note(f"wrote {settings.plot}")
    if as_json:
        print(json.dumps([one.to_dict() for one in found], ensure_ascii=False, indent=1))
    else:
        output_console().print(_variants_table(found))
    return 0


def _variants_table(found: list[Variant]) -> str:
    keys = list(found[0].values)
    head = [*keys, "fits", "llama.cpp prefill", "decode", "range", "hybrimoe prefill", "decode", "range"]
    rows = []
    for one in found:
        cells = [*one.values.values(), "yes" if one.plan.memory.fits else "no"]
        for pair in (one.plan.stock, one.plan.ours):
            if pair is None:
                cells += ["-", "-", "-"]
            else:
                prefill, decode = pair
                cells += [
                    _number(prefill.per_s),
                    _number(decode.per_s),
                    f"{_number(decode.low)}-{_number(decode.high)}",
                ]
        rows.append(cells)
    return table(head, rows)


def describe(made: ModelPlan) -> str:
    """The plan as text."""
    parts = [_model_text(made), _memory_table(made), _slots_text(made), _speed_table(made)]
    if made.advice:
        lines = [f"  {a.gain:.2f}x  {a.decode_per_s:6.1f} t/s  {a.change}" for a in made.advice]
        parts.append("what would help decoding most\n" + "\n".join(lines))
    if made.memory.runs:
        parts.append("flags      " + shlex.join([str(made.model.path), *made.flags]))
    return "\n\n".join(part for part in parts if part)


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
    lines.append(f"machine    {machine.name}" + (f" ({machine.source})" if machine.source else ""))
    if machine.assumed and not machine.is_measured:
        lines.append(f"           assumed: {', '.join(_assumed_text(machine, part) for part in machine.assumed)}")
    lines += [
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
    if made.context_reason:
        lines.append(f"           {made.context_reason}")
    return "\n".join(lines)


def _assumed_text(machine: Machine, part: str) -> str:
    ram, link = machine.ram, machine.link
    texts = {
        "ram": f"{ram.kind}-{ram.mts:.0f} with {ram.n_channels} channels",
        "cpu": f"{machine.cpu.n_cores} cores like {machine.cpu.design.title} at {machine.cpu.ghz:g} GHz",
        "link": "" if link is None else f"PCIe {link.generation} x{link.n_lanes}",
        "gpu": "the card's rates",
    }
    return texts[part]


def _memory_table(made: ModelPlan) -> str:
    needs, memory, machine = made.needs, made.memory, made.machine

    def mib(n_bytes: float) -> str:
        return f"{n_bytes / _MIB:.0f}"

    head = ["memory [MiB]", "has", "dense", "KV", "compute", "experts", "margin", "left"]
    rows = []
    if machine.has_card:
        used = memory.vram_need + memory.cache_bytes
        cells = (needs.dense_bytes, needs.kv_bytes, needs.compute_bytes, memory.cache_bytes, memory.margin_bytes)
        rows.append([machine.cards_text, *map(mib, (memory.vram_bytes, *cells, memory.vram_bytes - used))])
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
    if not made.machine.has_card:
        return "slots      none: experts run on the CPU"
    slots, n = made.memory.n_slots, made.model.n_experts
    low, high = min(slots, default=0), max(slots, default=0)
    count = str(low) if low == high else f"{low} to {high}"
    share = sum(slots) / max(1, n * len(slots))
    return f"slots      {count} of {n} per layer, {sum(slots)} in all ({share:.0%} of the experts)"


def _speed_table(made: ModelPlan) -> str:
    rows, marked = [], False
    for way in made.ways:
        full = "" if way.memory.fits_vram else " *"
        marked = marked or bool(full)
        name = f"llama.cpp {way.flags}".rstrip() + full
        rows.append([name, *_speed_cells(way.prefill), *_speed_cells(way.decode)])
    if made.ours is not None:
        rows.append(["hybrimoe", *_speed_cells(made.ours[0]), *_speed_cells(made.ours[1])])
    if not rows:
        return ""
    basis = "measured costs" if made.machine.is_measured else "estimated costs"
    depth = f"{made.asked.depth} tokens in the context, a prompt of {made.n_prompt}"
    note_text = "" if not made.machine.has_card else "; how often a slot hits is assumed, see docs/cost-model.md"
    text = table(["expected t/s", "prefill", "range", "limit", "decode", "range", "limit"], rows)
    lines = [text, f"({basis}; {depth}{note_text})"]
    if marked:
        lines.append("* takes more card memory than there is")
    if made.memory.missing > 0 and made.memory.runs:
        lines.append(
            f"larger than main memory: {made.memory.missing:.0%} of the experts come from the disk, "
            f"{made.machine.disk_rate / 1e3:.1f} GB/s"
        )
    if made.plain_is_faster:
        lines.append("plain llama.cpp is predicted to be faster here: --no-plugin")
    main = made.ours or made.stock
    if main is not None and main[1].widest:
        lines.append(f"the range of decode is wide for {main[1].widest}" + _narrowed_by(main[1]))
        if main[0].widest != main[1].widest:
            lines.append(f"that of prefill for {main[0].widest}" + _narrowed_by(main[0]))
    return "\n".join(lines)


def _narrowed_by(speed: Speed) -> str:
    return f"; {speed.narrows} would tell more" if speed.narrows else ""


def _speed_cells(speed: Speed) -> list[str]:
    return [_number(speed.per_s), f"{_number(speed.low)}-{_number(speed.high)}", speed.limit]


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
