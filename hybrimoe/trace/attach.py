"""Records what another process computes: reads along through its observer (docs/observability.md)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import HybrimoeError
from hybrimoe.live.sockets import Observer, TraceStream
from hybrimoe.native.trace_ring import Pass, split_passes
from hybrimoe.trace.errors import TraceError
from hybrimoe.trace.format import ModelIdentity
from hybrimoe.trace.live import LiveRecorder

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Attached", "attach"]

_POLL_S = 0.2


@dataclass
class Attached:
    """A closed recording, and notes for the user."""

    recorder: LiveRecorder
    notes: list[str] = field(default_factory=list)


class _Stream:
    """The stream as a recorder reads it. What the process had decided before is unknown, so its run and counters,
    which would have to be replayed from the start, are left out."""

    def __init__(self, path: Path, stream: TraceStream) -> None:
        self._path = path
        self._stream = stream

    def read(self) -> list[Pass]:
        return split_passes(self._stream.read())

    def stop(self) -> None:
        """Nothing: the process goes on."""

    def describe(self) -> dict[str, Any]:
        facts = self._stream.instance["trace"]
        if not facts.get("is_set_up"):  # it was attached to before the first pass
            with contextlib.suppress(HybrimoeError), Observer(self._path) as observer:
                found = observer.ask(f"snapshot instance={self._stream.instance['id']} state trace")["instances"]
                facts = found[0]["trace"] if found else facts
        return {**facts, "run": None, "counters": None, "n_dropped": 0}


def attach(
    path: Path, output: Path, n_tokens: int | None, progress: Callable[[int], None] = lambda n: None
) -> Attached:
    """Records until Ctrl-C, until `n_tokens` tokens were computed, or until the process ends.

    Raises:
        HybrimoeError: there is no such process, it records nothing, or the file cannot be written.
        TraceError: its layers differ in their experts.
    """
    output.unlink(missing_ok=True)
    with Observer(path) as observer:
        stream = observer.stream()
        failures: list[str] = []
        source = {"tool": "hybrimoe trace record --attach", "program": stream.head.get("program", "")}
        recorder = LiveRecorder(
            _Stream(path, stream),
            output,
            _identity(path, stream),
            source=source,
            on_failure=failures.append,
            warms_up=False,
        )
        made = Attached(recorder)
        try:
            while not stream.has_ended and not failures and (n_tokens is None or recorder.n_tokens < n_tokens):
                time.sleep(_POLL_S)
                progress(recorder.n_tokens)
        except KeyboardInterrupt:
            pass
        finally:
            recorder.close()
    if failures:
        raise HybrimoeError(failures[0], "free some disk space, or choose another folder")
    if stream.has_ended:
        made.notes.append("the process has ended: what it computed until then is kept")
    return made


def _identity(path: Path, stream: TraceStream) -> ModelIdentity:
    """From the model's file where the process says which it is and it is there, else from what its blocks showed."""
    head, layers = stream.head, stream.instance["state"]["layers"]
    file = (head.get("host") or {}).get("model_file") or head.get("model_file")
    if file and Path(file).is_file():
        from hybrimoe.gguf_model import inspect
        from hybrimoe.trace.identity import identity_of

        return identity_of(inspect(file).require_moe())
    if not layers:
        raise HybrimoeError(f"the model of '{path.name}' is not known yet", "try again once it has answered something")
    return _shown_identity(Path(file).stem if file else str(head.get("program", "")), layers)


def _shown_identity(name: str, layers: list[Mapping[str, Any]]) -> ModelIdentity:
    shapes = {(layer["n_experts"], layer["top_k"]) for layer in layers}
    if len(shapes) != 1:
        raise TraceError("the layers differ in their number of experts", "such models cannot be traced yet")
    ((n_expert, top_k),) = shapes
    return ModelIdentity(
        name,
        n_layers=len(layers),
        n_expert=n_expert,
        top_k=top_k,
        layers=tuple(layer["layer"] for layer in layers),
        expert_bytes=tuple(layer["expert_bytes"] for layer in layers),
    )
