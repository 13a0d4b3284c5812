"""The plug-in's recording, read from Python (C prototypes: native/include/hybrimoe.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Pass", "TraceRing", "split_passes"]

# struct hybrimoe_trace_event; the columns of hybrimoe.trace.events have the same names.
_EVENT = [
    *((name, "<i4") for name in ("type", "layer", "n_rows", "a", "b", "c")),
    *((name, "<i8") for name in ("id", "offset", "scores_offset", "lookahead_offset")),
    *((name, "<f8") for name in ("now_us", "cpu_ready_us", "gap_us", "x", "y", "z")),
    ("gpu_ready_us", "<f8", (8,)),
]
# struct hybrimoe_trace_pass
_HEAD = ("n_bytes", "n_dropped", "n_events", "n_ids", "n_scores", "n_lookahead", "n_text")
_FIRST_BYTES = 1 << 20


@dataclass
class Pass:
    """One pass of the model. Arrays are copies; offsets of the events count within them."""

    n_dropped: int
    events: npt.NDArray[Any]
    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    lookahead: npt.NDArray[np.float32]
    device: npt.NDArray[np.int8]
    text: bytes


class TraceRing:
    """The reading end of one instance's recording. For one thread at a time.

    `describe` gives the instance's snapshot with its state and trace.
    """

    def __init__(self, library: ctypes.CDLL, instance: int, describe: Callable[[], dict[str, Any]]) -> None:
        # int64_t hybrimoe_read_trace(uint64_t instance, void * out, int64_t size)
        library.hybrimoe_read_trace.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int64]
        library.hybrimoe_read_trace.restype = ctypes.c_int64
        # int hybrimoe_stop_trace(uint64_t instance)
        library.hybrimoe_stop_trace.argtypes = [ctypes.c_uint64]
        library.hybrimoe_stop_trace.restype = ctypes.c_int
        self._library = library
        self._instance = instance
        self._describe = describe
        self._buffer = ctypes.create_string_buffer(_FIRST_BYTES)

    def read(self) -> list[Pass]:
        """All passes that were handed over since the last call, in order."""
        passes: list[Pass] = []
        while True:
            n = self._library.hybrimoe_read_trace(self._instance, self._buffer, len(self._buffer))
            if n < -1:
                self._buffer = ctypes.create_string_buffer(int(-n))
                continue
            if n <= 0:
                return passes
            passes += split_passes(self._buffer.raw[:n])

    def stop(self) -> None:
        """Nothing is recorded from now on; what was recorded may still be read."""
        self._library.hybrimoe_stop_trace(self._instance)

    def describe(self) -> dict[str, Any]:
        """What belongs to the recording (docs/observability.md, `trace`); empty for an instance that is gone."""
        return dict(self._describe().get("trace", {}))


def split_passes(data: bytes) -> list[Pass]:
    """Whole passes, one behind the other."""
    import numpy as np

    passes, at = [], 0
    event = np.dtype(_EVENT)
    while at < len(data):
        head = dict(zip(_HEAD, np.frombuffer(data, "<i8", len(_HEAD), at).tolist(), strict=True))
        where = at + 8 * len(_HEAD)
        arrays: dict[str, Any] = {}
        for name, dtype, count in (
            ("events", event, "n_events"),
            ("ids", np.dtype("<i4"), "n_ids"),
            ("weights", np.dtype("<f4"), "n_ids"),
            ("scores", np.dtype("<f4"), "n_scores"),
            ("lookahead", np.dtype("<f4"), "n_lookahead"),
            ("device", np.dtype("i1"), "n_ids"),
        ):
            arrays[name] = np.frombuffer(data, dtype, head[count], where).copy()
            where += head[count] * dtype.itemsize
        passes.append(Pass(head["n_dropped"], **arrays, text=data[where : where + head["n_text"]]))
        at += head["n_bytes"]
    return passes
