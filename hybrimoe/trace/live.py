"""Records a running engine: a thread drains the plug-in's ring into a trace file.

The computing thread never waits for it. When the disk is full the recording ends with a message; the model goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hybrimoe.errors import UsageError, from_os_error
from hybrimoe.trace.events import COLUMNS, EventType, Note, StepKind, new_events
from hybrimoe.trace.files import replaceable
from hybrimoe.trace.identity import identity_of
from hybrimoe.trace.writer import TraceWriter

if TYPE_CHECKING:
    from hybrimoe.gguf_model import GgufModel
    from hybrimoe.native.trace_ring import Pass
    from hybrimoe.trace.format import ModelIdentity

__all__ = ["LiveRecorder", "PassSource", "check_target", "ring_bytes"]

_PERIOD_S = 0.1
# Gathered into one block: enough to pack well, little enough to lose when the process dies.
_BLOCK_EVENTS = 20_000
_BLOCK_VALUES = 4 << 20
_BLOCK_PERIODS = 20
# Deflating runs beside the model: the quickest level.
_LEVEL = 1
_MIN_RING_BYTES, _MAX_RING_BYTES = 16 << 20, 512 << 20


def check_target(path: Path) -> None:
    """Raises UsageError for a file that exists already or a folder, HybrimoeError for what cannot be written."""
    if path.is_dir():
        raise UsageError(f"--trace: '{path}' is a folder", "give a file name")
    if not replaceable(path):
        return
    try:
        path.open("xb").close()
        path.unlink()
    except FileExistsError as error:
        raise UsageError(f"--trace: '{path}' exists already", "give another name, or remove it") from error
    except OSError as error:
        raise from_os_error(error, f"write '{path}'") from error


def ring_bytes(model: GgufModel, n_ubatch: int) -> int:
    """Room for several of the largest passes: ids, weights and devices of each row, all scores, events."""
    m = identity_of(model)
    row_bytes = m.n_layers * (9 * m.top_k + 4 * m.n_expert)
    return max(_MIN_RING_BYTES, min(4 * n_ubatch * row_bytes, _MAX_RING_BYTES))


class PassSource(Protocol):
    """What a recorder reads: see `hybrimoe.native.trace_ring.TraceRing`."""

    def read(self) -> list[Pass]: ...

    def stop(self) -> None: ...

    def describe(self) -> dict[str, Any]: ...


class LiveRecorder:
    """Writes what one backend instance records, until `close`. Everything but the thread's loop is for the engine.

    Args:
        ring: the instance's recording, of this process or another one.
        on_failure: called once, from the recorder's thread, when the file cannot be written any more.
        source: for people: tool, command, options.
        warms_up: what runs before `end_warm_up` is no answer.
    """

    def __init__(
        self,
        ring: PassSource,
        path: Path,
        model: ModelIdentity,
        *,
        on_failure: Callable[[str], None] = lambda text: None,
        source: Mapping[str, Any] | None = None,
        warms_up: bool = True,
    ) -> None:
        self.path = path
        self.failure = ""
        self.n_tokens = self.n_dropped = self.n_bytes = 0
        self.us_per_decode_pass = 0.0
        self._ring = ring
        self._model = model
        self._source = dict(source or {})
        self._on_failure = on_failure
        self._writer: TraceWriter | None = None
        self._pending: list[Pass] = []
        self._n_values = self._n_periods = self._n_costs = 0
        self._is_warm_up, self._is_new_prompt, self._was_decode = warms_up, True, True
        self._process = os.getpid()
        self._lock = threading.Lock()  # one reader at a time: the thread, or the engine between two steps
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="hybrimoe-trace", daemon=True)
        self._thread.start()

    def end_warm_up(self) -> None:
        """What ran until now was no answer: it moved decisions, but is none of the trace's tokens."""
        with self._lock:
            self._take()
            self._is_warm_up = False

    def begin_prompt(self) -> None:
        """The next step begins a new prompt."""
        with self._lock:
            self._take()
            self._is_warm_up, self._is_new_prompt = False, True

    def close(self) -> None:
        """Ends the recording and the file, with the engine's counters. Further calls do nothing, nor does a fork's."""
        if self._ended.is_set() or self._process != os.getpid():
            return
        self._ended.set()
        self._thread.join()
        with self._lock:
            self._ring.stop()
            facts = self._ring.describe()
            self._take()
            self._write(facts)
            self.n_dropped = int(facts.get("n_dropped", 0))
            self.us_per_decode_pass = float(facts.get("us_per_decode_pass", 0.0))
            if self._writer is None:
                return
            counters = facts.get("counters")
            if counters is not None:
                counters = {**counters, "n_passes_dropped": self.n_dropped}
            self._writer.close(counters)
            self.n_bytes = self._writer.n_bytes

    def _loop(self) -> None:
        while not self._ended.wait(_PERIOD_S):
            with self._lock:
                self._take()
                self._n_periods += 1
                many = sum(len(p.events) for p in self._pending) >= _BLOCK_EVENTS or self._n_values >= _BLOCK_VALUES
                if self._pending and (many or self._n_periods >= _BLOCK_PERIODS):
                    facts = {} if self._writer is not None else self._ring.describe()
                    if self._writer is not None or facts.get("is_set_up"):
                        self._write(facts)

    def _take(self) -> None:
        """Reads the ring; marks warm-up steps and the first steps of prompts."""
        for one in self._ring.read():
            for i in (one.events["type"] == Note.STEP).nonzero()[0]:
                step = one.events[i]
                is_decode = step["a"] == StepKind.DECODE
                if self._is_warm_up:
                    step["a"] = StepKind.WARM_UP
                else:
                    step["b"] = int(self._is_new_prompt or (self._was_decode and not is_decode))
                    self._is_new_prompt, self._was_decode = False, bool(is_decode)
                    self.n_tokens += int(step["n_rows"])
            if not self.failure:
                self._pending.append(one)
                self._n_values += len(one.ids) + len(one.scores) + len(one.lookahead)

    def _write(self, facts: Mapping[str, Any]) -> None:
        """Writes what was read as one block."""
        import numpy as np

        passes, self._pending, self._n_values, self._n_periods = self._pending, [], 0, 0
        if self._writer is None:
            if not passes:
                return
            self._writer = TraceWriter(
                self.path,
                _recorded_layers(self._model, facts["layers"]),
                source=self._source,
                run=facts.get("run"),
                on_failure=self._fail,
                level=_LEVEL,
            )
        if self.failure or not passes:
            return
        parts = []
        sizes = {"offset": 0, "scores_offset": 0, "lookahead_offset": 0}
        for one in passes:
            events = new_events(len(one.events))
            for column in COLUMNS:
                events[column] = one.events[column]
            for i in (events["type"] == EventType.COSTS).nonzero()[0]:
                first, length = int(events["id"][i]), int(events["c"][i])
                self._writer.append_costs(json.loads(one.text[first : first + length]))
                events["a"][i], events["id"][i], events["c"][i] = self._n_costs, 0, 0
                self._n_costs += 1
            for column, size in sizes.items():
                events[column] += np.where(events[column] >= 0, size, 0)
            sizes["offset"] += len(one.ids)
            sizes["scores_offset"] += len(one.scores)
            sizes["lookahead_offset"] += len(one.lookahead)
            if one.n_dropped:
                lost = new_events(1)
                lost["type"], lost["a"], lost["now_us"] = Note.DROPPED, one.n_dropped, events["now_us"][0]
                parts.append(lost)
            parts.append(events)
        joined = {
            name: np.concatenate([getattr(one, name) for one in passes])
            for name in ("ids", "weights", "scores", "lookahead", "device")
        }
        given = {name: array for name, array in joined.items() if len(array) or name in ("ids", "weights", "device")}
        self._writer.append_events(np.concatenate(parts), **given)

    def _fail(self, text: str) -> None:
        self.failure = text
        self._pending = []
        self._ring.stop()
        with contextlib.suppress(Exception):
            self._on_failure(text)


def _recorded_layers(model: ModelIdentity, layers: list[int]) -> ModelIdentity:
    """The identity with the layers that run in the plug-in alone: others have no events, and no number in them."""
    kept = [i for i, layer in enumerate(model.layers) if layer in layers]
    if len(kept) == model.n_layers:
        return model
    return replace(
        model,
        n_layers=len(kept),
        layers=tuple(model.layers[i] for i in kept),
        expert_bytes=tuple(model.expert_bytes[i] for i in kept) if model.expert_bytes else (),
        expert_macs=tuple(model.expert_macs[i] for i in kept) if model.expert_macs else (),
    )
