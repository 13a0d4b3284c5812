"""The timeline as a Chrome trace, which ui.perfetto.dev and chrome://tracing open."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hybrimoe.profiling.analysis import BEGIN, CPU, GPU, LAUNCH, MERGE, PLAN, ROUTER, WAIT

if TYPE_CHECKING:
    from hybrimoe.profiling.analysis import Blocks, Copies

__all__ = ["chrome_trace", "to_bytes"]

_CPU_THREAD, _GPU_THREAD = 1, 2
_LINK_THREAD = 100
# (end column, name) of what the CPU does one after the other.
_CPU_PHASES = (
    (ROUTER, "router"),
    (PLAN, "plan"),
    (LAUNCH, "start accelerators"),
    (CPU, "experts on the CPU"),
    (WAIT, "wait for accelerators"),
    (MERGE, "merge"),
)
_COPY_KINDS = ("demanded", "streamed", "admitted", "prefetched")
_LEAST_US = 0.05


def chrome_trace(
    blocks: Blocks, copies: Copies, layers: Sequence[int], devices: Sequence[str], about: Mapping[str, Any]
) -> dict[str, Any]:
    """The trace object: a thread each for the CPU, accelerators and links; steps and layers nested.

    Times are microseconds of the recording's clock. The accelerators' work is drawn as one bar per layer, because a
    block's accelerators end together.
    """
    events: list[dict[str, Any]] = [
        _named("process_name", 0, "hybrimoe"),
        _named("thread_name", _CPU_THREAD, "CPU"),
    ]
    if devices:
        events.append(_named("thread_name", _GPU_THREAD, "experts on " + ", ".join(devices)))
    events += [_named("thread_name", _LINK_THREAD + number, f"copies to {name}") for number, name in enumerate(devices)]
    _add_steps(events, blocks)
    for i in range(len(blocks.layer)):
        ends = blocks.ends[i]
        args: dict[str, Any] = {
            "tokens": int(blocks.n_rows[i]),
            "on CPU": int(blocks.n_cpu[i]),
            "on GPU": int(blocks.n_gpu[i]),
        }
        layer = layers[int(blocks.layer[i])]
        events.append(_bar(f"layer {layer}", _CPU_THREAD, ends[BEGIN], ends[MERGE], args))
        for column, name in _CPU_PHASES:
            if ends[column] - ends[column - 1] >= _LEAST_US:
                events.append(_bar(name, _CPU_THREAD, ends[column - 1], ends[column]))
        if blocks.n_gpu[i]:
            known = "measured" if blocks.gpu_is_known[i] else "partly from the cost model"
            events.append(_bar(f"layer {layer}", _GPU_THREAD, ends[PLAN], ends[GPU], {"end": known}))
    for i in range(len(copies.layer)):
        kind = _COPY_KINDS[int(copies.kind[i]) % len(_COPY_KINDS)]
        name = f"layer {layers[int(copies.layer[i])]} expert {int(copies.expert[i])}"
        why: dict[str, Any] = {"why": kind, "bytes": int(copies.n_bytes[i])}
        events.append(_bar(name, _LINK_THREAD + int(copies.device[i]), copies.begin[i], copies.end[i], why))
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {k: str(v) for k, v in about.items()}}


def _add_steps(events: list[dict[str, Any]], blocks: Blocks) -> None:
    """A bar around all blocks of a step."""
    n = len(blocks.step)
    begin = 0
    for i in range(1, n + 1):
        if i == n or blocks.step[i] != blocks.step[begin]:
            rows = int(blocks.n_rows[begin:i].max())
            name = "token" if blocks.kind[begin] == 1 else f"prompt, {rows} tokens"
            events.append(_bar(name, _CPU_THREAD, blocks.ends[begin, BEGIN], blocks.ends[i - 1, MERGE]))
            begin = i


def _named(what: str, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": 1, "tid": thread, "name": what, "args": {"name": name}}


def _bar(name: str, thread: int, begin: float, end: float, args: Mapping[str, Any] | None = None) -> dict[str, Any]:
    bar = {"ph": "X", "pid": 1, "tid": thread, "name": name, "ts": round(float(begin), 3)}
    bar["dur"] = round(max(0.0, float(end) - float(begin)), 3)
    if args:
        bar["args"] = dict(args)
    return bar


def to_bytes(trace: Mapping[str, Any]) -> bytes:
    return json.dumps(trace, separators=(",", ":")).encode()
