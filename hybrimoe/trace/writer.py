"""Writes trace files block by block; the format is in docs/trace-format.md."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hybrimoe.errors import UsageError, from_os_error
from hybrimoe.files import open_target
from hybrimoe.trace.blocks import MINOR_VERSION, pack_block, pack_head
from hybrimoe.trace.events import COLUMNS
from hybrimoe.trace.files import replaceable
from hybrimoe.trace.format import MAX_LOOKAHEAD, ModelIdentity, id_dtype

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["TraceWriter"]

# Tokens gathered into one block: large enough to pack well, small enough to lose little when the power fails.
_BLOCK_TOKENS = 256


class TraceWriter:
    """Appends to a trace file. For one thread: the importer, or the engine's thread that drains the recorder's ring.

    Arrays are gathered into blocks; a block is written at once and flushed, so a file that was cut off is readable up
    to its last whole block. When writing fails (a full disk), `failure` holds the reason, `on_failure` is called once,
    the file is cut back to its last whole block, and every later call does nothing: the model goes on.

    Args:
        source: where the trace comes from, for people: tool, version, command, file, licence.
        run: how the recording engine was configured, for replays: `n_slots`, policies, `costs` (a calibration's cost
            section), as `hybrimoe.trace.parity` reads it.
        level: how hard to pack, 1 (quick) to 9 (small).
        temporary: write beside `path` and rename when closed, so that nothing half-written is ever seen (imports).

    Raises:
        HybrimoeError: the file cannot be created.
        TraceError: the model's numbers cannot be true.
    """

    def __init__(
        self,
        path: Path | str,
        model: ModelIdentity,
        *,
        source: Mapping[str, Any] | None = None,
        run: Mapping[str, Any] | None = None,
        temporary: bool = False,
        on_failure: Callable[[str], None] | None = None,
        level: int = 6,
    ) -> None:
        self._level = level
        self.path = Path(path)
        self.model = model
        self.failure = ""
        self.n_tokens = self.n_events = self.n_bytes = 0
        self._on_failure = on_failure
        self._pending: dict[str, list[npt.NDArray[Any]]] = {}
        self._n_pending = 0
        model.check(self.path.name)
        head: dict[str, Any] = {"minor": MINOR_VERSION, "model": asdict(model), "source": dict(source or {})}
        if run is not None:
            head["run"] = dict(run)
        self._target = self.path
        if temporary and replaceable(self.path):
            self._target = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            self._file: IO[bytes] | None = open_target(self._target)
        except OSError as error:
            raise from_os_error(error, f"write '{path}'") from error
        self._put(pack_head(head))

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._target != self.path:
            self.discard()
        else:
            self.close()

    def append_tokens(
        self,
        experts: npt.ArrayLike,
        *,
        prompt: npt.ArrayLike,
        is_decode: npt.ArrayLike | None = None,
        weights: npt.ArrayLike | None = None,
        scores: npt.ArrayLike | None = None,
        lookahead: npt.ArrayLike | None = None,
        device: npt.ArrayLike | None = None,
        time_us: npt.ArrayLike | None = None,
        bytes: npt.ArrayLike | None = None,
    ) -> None:
        """Appends whole tokens; every call of one file gives the same arrays. Floats are stored as given (f2 or f4).

        Args:
            experts: [n_tokens, n_layers, top_k]; negative where a layer did not run.
            prompt: [n_tokens] number of the prompt, from 0, never falling.
            is_decode: [n_tokens] 1 generated, 0 prompt.
            weights: [n_tokens, n_layers, top_k] router weights.
            scores: [n_tokens, n_layers, n_expert] all router scores (after softmax or sigmoid).
            lookahead: [n_tokens, n_layers, 3, n_expert] scores predicted for the next three layers.
            device: [n_tokens, n_layers, top_k] that computed the expert (-1 CPU).
            time_us: [n_tokens, n_layers] measured.
            bytes: [n_tokens, n_layers] copied to the device.
        """
        import numpy as np

        m = self.model
        given = np.asarray(experts)
        if given.ndim != 3 or given.shape[1:] != (m.n_layers, m.top_k) or given.dtype.kind not in "iu":
            raise UsageError(f"experts are {given.dtype}{given.shape}, must be integers [n, {m.n_layers}, {m.top_k}]")
        kind = id_dtype(m.n_expert)
        missing = np.iinfo(kind).max
        wrong = (given >= m.n_expert) & (given != missing)
        if wrong.any():
            token, layer, k = np.argwhere(wrong)[0]
            raise UsageError(
                f"token {self.n_tokens + self._n_pending + token}, layer {layer}: expert {given[token, layer, k]} is "
                f"outside 0..{m.n_expert - 1}"
            )
        n, layers = given.shape[0], m.n_layers
        shapes: dict[str, tuple[Any, tuple[int, ...], str]] = {
            "weights": (weights, (n, layers, m.top_k), "f"),
            "scores": (scores, (n, layers, m.n_expert), "f"),
            "lookahead": (lookahead, (n, layers, MAX_LOOKAHEAD, m.n_expert), "f"),
            "device": (device, (n, layers, m.top_k), "i1"),
            "time_us": (time_us, (n, layers), "<f4"),
            "bytes": (bytes, (n, layers), "<i8"),
            "is_decode": (is_decode, (n,), "u1"),
            "prompt": (prompt, (n,), "<i4"),
        }
        arrays = {"experts": np.where(given < 0, missing, given).astype(kind)}
        for name, (value, shape, code) in shapes.items():
            if value is None:
                continue
            array = np.asarray(value)
            if code == "f":
                array = array if array.dtype in (np.float16, np.float32) else array.astype(np.float32)
            else:
                array = array.astype(code)
            if array.shape != shape:
                raise UsageError(f"{name} have shape {array.shape}, must be {shape}")
            arrays[name] = array
        if self._pending and set(arrays) != set(self._pending):
            raise UsageError(f"tokens come with {sorted(arrays)}, earlier ones with {sorted(self._pending)}")
        for name, array in arrays.items():
            self._pending.setdefault(name, []).append(array.copy())
        self._n_pending += n
        if self._n_pending >= _BLOCK_TOKENS:
            self.flush()

    def append_events(
        self,
        events: npt.NDArray[Any],
        *,
        ids: npt.ArrayLike = (),
        weights: npt.ArrayLike | None = None,
        scores: npt.ArrayLike | None = None,
        lookahead: npt.ArrayLike | None = None,
        device: npt.ArrayLike | None = None,
    ) -> None:
        """Appends events as one block, in order.

        Args:
            events: of `events.event_dtype()`; offsets count within this call's arrays.
            ids: experts of all LAYER events one after the other, [n_rows, top_k] each.
            weights: as ids; given by every call or by none.
            scores: [n_expert] per row; a layer's `scores_offset` is in values.
            lookahead: [3, n_expert] per layer, summed over its rows; `lookahead_offset` in values.
            device: as ids: -1 CPU.
        """
        import numpy as np

        self.flush()
        arrays: dict[str, npt.NDArray[Any]] = {name: events[name].astype(code) for name, code in COLUMNS.items()}
        arrays["ids"] = np.asarray(ids).reshape(-1).astype(id_dtype(self.model.n_expert))
        for name, value in (("weights", weights), ("scores", scores), ("lookahead", lookahead)):
            if value is not None:
                arrays[name] = np.asarray(value, dtype=np.float32).reshape(-1)
        if device is not None:
            arrays["device"] = np.asarray(device).reshape(-1).astype("i1")
        self._put(pack_block("events", {"n": len(events)}, arrays, self._level))
        self.n_events += 0 if self.failure else len(events)

    def append_costs(self, costs: Mapping[str, Any]) -> None:
        """Appends a cost section (`Costs.from_calibration`); the COSTS event with `a` = 0 means the first of them."""
        self.flush()
        self._put(pack_block("costs", {"costs": dict(costs)}, {}))

    def flush(self) -> None:
        """Writes gathered tokens as a block."""
        import numpy as np

        if not self._n_pending:
            return
        arrays = {name: np.concatenate(parts) for name, parts in self._pending.items()}
        n, self._n_pending = self._n_pending, 0
        self._pending = {name: [] for name in arrays}
        self._put(pack_block("tokens", {"first": self.n_tokens, "n": n}, arrays, self._level))
        self.n_tokens += 0 if self.failure else n

    def close(self, counters: Mapping[str, Any] | None = None) -> None:
        """Writes the end block (with the engine's counters, to be compared with a replay) and closes the file."""
        if self._file is None:
            return
        self.flush()
        values = {"n_tokens": self.n_tokens, "n_events": self.n_events}
        self._put(pack_block("end", {**values, **({"counters": dict(counters)} if counters else {})}, {}))
        if self._file is not None:
            self._file.close()
            self._file = None
            if self._target != self.path:
                self._target.replace(self.path)

    def discard(self) -> None:
        """Closes and, for a temporary file, removes what was written."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._target != self.path:
            self._target.unlink(missing_ok=True)

    def _put(self, data: bytes) -> None:
        if self._file is None:
            return
        try:
            self._file.write(data)
            self._file.flush()
            self.n_bytes += len(data)
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        file, self._file = self._file, None
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        self.failure = (
            f"recording to '{self.path}' stopped: {reason}; {self.n_tokens or self.n_events} records are kept"
        )
        # Python's buffer would write the failed block again when the file is closed.
        if file is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), self.n_bytes)
            with contextlib.suppress(OSError):
                file.close()
            with contextlib.suppress(OSError):
                os.truncate(self._target, self.n_bytes)
        if self._target != self.path:
            self._target.unlink(missing_ok=True)
        if self._on_failure is not None:
            self._on_failure(self.failure)
