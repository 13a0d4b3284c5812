"""Records of a live run: every event that moved a decision, in order, and what was measured beside them.

Columns and kinds are part of the file format: docs/trace-format.md. Kinds below 64 are those of the policy core
(`hm_event_type`) and are replayed; kinds from 64 on only describe and are skipped by a replay.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

from hybrimoe.native.core_runtime import EventType

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["COLUMNS", "FIRST_NOTE", "MAX_DEVICES", "EventType", "Note", "StepKind", "event_dtype", "new_events"]

FIRST_NOTE = 64
MAX_DEVICES = 8


class Note(enum.IntEnum):
    """Records that describe a live run without moving a decision."""

    STEP = 64  # a step of the model begins: n_rows tokens; a: StepKind; b: 1 if it is the first of a prompt
    TRANSFER = 65  # a copy is issued: id; layer; a: expert; b: device; c: hm_transfer_kind; n_rows: slot; x: bytes
    MEASURED = 66  # a layer was computed: x: us on the CPU, y: us on accelerators, z: us waited; a: 1 not planned
    ROUTED = 67  # as LAYER, of a layer that the runtime did not plan: the CPU computed it
    DROPPED = 68  # the recorder had no room for the `a` steps before the next one
    PHASES = 69  # when the phases of a layer's block ended; see docs/trace-format.md
    COPIED = 70  # copy `id` took the link from x to y, both us of the recorder's clock; z: bytes


class StepKind(enum.IntEnum):
    """What a step is for. A warm-up moves decisions, but its tokens are no tokens of the trace."""

    PREFILL = 0
    DECODE = 1
    WARM_UP = 2


# Column: type. `n_rows`, `a`, `b`, `c`, `id`, `x`, `y`, `z` mean what the event's kind says.
COLUMNS: dict[str, str] = {
    "type": "u1",
    "layer": "<i2",
    "n_rows": "<i4",
    "a": "<i4",
    "b": "<i4",
    "c": "<i4",
    "id": "<i8",
    "offset": "<i8",  # of the first id of this layer in `ids`, counted in the block; -1: none
    "scores_offset": "<i8",  # of the first score in `scores`; -1: none
    "lookahead_offset": "<i8",  # of the first look-ahead score in `lookahead`, [3, n_expert] each; -1: none
    "now_us": "<f8",  # the recorder's clock; never goes back
    "cpu_ready_us": "<f8",
    "gap_us": "<f8",
    "gpu_ready_us": "<f8",  # [MAX_DEVICES]
    "x": "<f8",
    "y": "<f8",
    "z": "<f8",
}


def event_dtype() -> np.dtype[Any]:
    """The structured dtype of one event."""
    import numpy as np

    return np.dtype([(n, t, (MAX_DEVICES,)) if n == "gpu_ready_us" else (n, t) for n, t in COLUMNS.items()])


def new_events(n: int) -> npt.NDArray[Any]:
    """`n` events of zeros, without ids, scores and look-ahead."""
    import numpy as np

    events = np.zeros(n, dtype=event_dtype())
    for name in ("offset", "scores_offset", "lookahead_offset"):
        events[name] = -1
    return events
