"""Trace files: what one holds, and `read`. The format is in docs/trace-format.md; `writer` writes it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hybrimoe.errors import from_os_error
from hybrimoe.files import open_regular
from hybrimoe.trace.blocks import read_blocks, read_head
from hybrimoe.trace.checks import check_events, check_prompts, check_tokens, mapping
from hybrimoe.trace.errors import TraceError
from hybrimoe.trace.events import COLUMNS, EventType, Note, StepKind

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hybrimoe.native.core_replay import Trace

__all__ = ["MAX_LOOKAHEAD", "ModelIdentity", "TraceFile", "id_dtype", "read"]

MAX_LOOKAHEAD = 3
_MAX_EXPERTS = 1024
_MAX_LAYERS = 1024
# Tokens of one step, and what a recorded id can stand for at most (where only the last layer has experts, a prompt's
# other tokens have none).
_MAX_STEP_TOKENS = 1 << 16
_TOKENS_PER_ID = 64
_MOST = 1 << 53  # what is still exact as a float
_EVENT_FIELDS = ("ids", "weights", "scores", "lookahead", "device")


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a trace is of.

    `layers` are the model's own indices of its MoE layers; everywhere else layers count from 0 over these.
    `expert_bytes` has one entry per MoE layer, 0 where unknown; so have `dense_bytes` (all weights that are no routed
    experts) and `expert_macs` (multiplications per token of one expert, per layer; 0: unknown). `sha256` is empty where
    it was not taken.
    """

    name: str
    n_layers: int
    n_expert: int
    top_k: int
    layers: tuple[int, ...] = ()
    expert_bytes: tuple[int, ...] = ()
    dense_bytes: int = 0
    expert_macs: tuple[int, ...] = ()
    architecture: str = ""
    sha256: str = ""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelIdentity:
        """Reads the head's `model`; unknown keys are left alone. Raises TypeError for values of other types."""
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in known}
        made = cls(**values)
        for f in fields(cls):
            value = getattr(made, f.name)
            items = value if f.name in ("layers", "expert_bytes", "expert_macs") else (value,)
            kind = str if f.name in ("name", "architecture", "sha256") else int
            if not isinstance(items, tuple) or not all(type(item) is kind for item in items):
                raise TypeError(f"a '{f.name}' of the right type")
        return made

    def check(self, name: str) -> None:
        """Raises TraceError if the numbers cannot be true."""
        sizes = (*self.layers, *self.expert_bytes, *self.expert_macs, self.dense_bytes)
        problems = [
            (not 1 <= self.n_layers <= _MAX_LAYERS, f"{self.n_layers} layers (1..{_MAX_LAYERS} are possible)"),
            (not 1 <= self.n_expert <= _MAX_EXPERTS, f"{self.n_expert} experts (1..{_MAX_EXPERTS} are possible)"),
            (not 1 <= self.top_k <= max(1, self.n_expert), f"top-{self.top_k} of {self.n_expert} experts"),
            (
                len(self.layers) not in (0, self.n_layers),
                f"{len(self.layers)} layer numbers for {self.n_layers} layers",
            ),
            (len(self.expert_bytes) not in (0, self.n_layers), f"{len(self.expert_bytes)} expert sizes"),
            (len(self.expert_macs) not in (0, self.n_layers), f"{len(self.expert_macs)} expert costs"),
            (not all(0 <= n <= _MOST for n in sizes), "sizes that no model has"),
        ]
        for wrong, what in problems:
            if wrong:
                raise TraceError(f"the trace '{name}' is corrupt: its model has {what}", "record or import it again")

    @property
    def knows_bytes(self) -> bool:
        return bool(self.expert_bytes) and min(self.expert_bytes) > 0


def id_dtype(n_expert: int) -> np.dtype[Any]:
    """Type of stored expert ids; its largest value marks a layer that did not run."""
    import numpy as np

    return np.dtype("u1") if n_expert <= 255 else np.dtype("<u2")


@dataclass
class TraceFile:
    """A trace as it was read.

    `experts` is int32 [n_tokens, n_layers, top_k], -1 where a layer did not run. Optional arrays are None where the
    file has none. `complete` is False for a file whose writer never closed it; `note` says how it ends. `events` holds
    the columns of all events, `event_arrays` what they refer to.
    """

    path: Path
    model: ModelIdentity
    source: Mapping[str, Any]
    run: Mapping[str, Any] | None
    experts: npt.NDArray[np.int32]
    prompt_offsets: npt.NDArray[np.int64]
    is_decode: npt.NDArray[np.uint8] | None = None
    weights: npt.NDArray[np.float32] | None = None
    scores: npt.NDArray[np.float32] | None = None
    lookahead: npt.NDArray[np.float32] | None = None
    device: npt.NDArray[np.int8] | None = None
    time_us: npt.NDArray[np.float32] | None = None
    bytes: npt.NDArray[np.int64] | None = None
    events: npt.NDArray[Any] | None = None
    event_arrays: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    costs: Sequence[Mapping[str, Any]] = ()
    counters: Mapping[str, Any] | None = None
    complete: bool = True
    note: str = ""
    n_blocks: int = 0
    file_bytes: int = 0

    @property
    def n_tokens(self) -> int:
        return len(self.experts)

    @property
    def n_prompts(self) -> int:
        return len(self.prompt_offsets) - 1

    def head(self, n_prompts: int) -> TraceFile:
        """The first prompts alone (their tokens; the events stay as they are)."""
        from dataclasses import replace

        if n_prompts >= self.n_prompts:
            return self
        offsets = self.prompt_offsets[: n_prompts + 1]
        n = int(offsets[-1])
        names = ("is_decode", "weights", "scores", "lookahead", "device", "time_us", "bytes")
        cut: dict[str, Any] = {name: None if getattr(self, name) is None else getattr(self, name)[:n] for name in names}
        return replace(self, experts=self.experts[:n], prompt_offsets=offsets, **cut)

    def trace(self) -> Trace:
        """For the core's replays."""
        from hybrimoe.native.core_replay import Trace

        return Trace(
            self.experts,
            self.model.n_expert,
            weights=self.weights,
            scores=self.scores,
            prompt_offsets=self.prompt_offsets,
        )


def read(path: Path | str, *, want: Collection[str] | None = None) -> TraceFile:
    """Reads a trace file.

    Args:
        want: optional arrays to read (`weights`, `scores`, `lookahead`, ...); None: all. Expert ids are always read.

    Raises:
        TraceError: the file is missing, no trace, of a later version, corrupt (the block is named), holds ids that its
            model does not have (the place is named), or has no whole block.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            return _read(file, path, want)
    except FileNotFoundError as error:
        raise TraceError(f"no such trace: '{path}'", "hybrimoe trace record, or hybrimoe trace import") from error
    except OSError as error:
        raise from_os_error(error, f"read '{path}'") from error


def _read(file: IO[bytes], path: Path, want: Collection[str] | None) -> TraceFile:
    import numpy as np

    head = read_head(file, path.name)
    try:
        model = ModelIdentity.from_dict(head["model"])
        model.check(path.name)
    except (KeyError, TypeError, AttributeError) as error:
        raise TraceError(
            f"the trace '{path.name}' is corrupt: its head lacks {error}", "record or import it again"
        ) from error
    always = {"experts", "prompt", "is_decode", "ids", *COLUMNS}
    wanted = None if want is None else always | set(want)
    tokens: list[Mapping[str, Any]] = []
    events: list[Mapping[str, Any]] = []
    costs: list[Mapping[str, Any]] = []
    end: Mapping[str, Any] | None = None
    cut, n_blocks = False, 0
    n_tokens = 0
    for block in read_blocks(file, path.name, wanted):
        if block is None:
            cut = True
            break
        n_blocks += 1
        if block.kind == "tokens":
            check_tokens(block, model, path.name)
            _check_ids(block.arrays["experts"], model, path.name, n_tokens)
            tokens.append(block.arrays)
            n_tokens += len(block.arrays["experts"])
        elif block.kind == "events":
            check_events(block, path.name)
            events.append(block.arrays)
        elif block.kind == "costs":
            costs.append(mapping(block.values.get("costs"), "costs", path.name))
        elif block.kind == "end":
            end = block.values
    check_prompts([block["prompt"] for block in tokens], path.name)
    note, counters = "", None
    if end is not None and end.get("counters") is not None:
        counters = mapping(end["counters"], "counters", path.name)
    if end is None:
        how = "ends in the middle of a block" if cut else "was never closed"
        note = f"the trace '{path.name}' {how}: read up to its last whole block"
    if not n_tokens and not any(len(block["type"]) for block in events):
        what = "has no whole block" if end is None else "holds no tokens"
        raise TraceError(f"the trace '{path.name}' {what}", "record or import it again")
    result = TraceFile(
        path,
        model,
        mapping(head.get("source", {}), "source", path.name),
        None if head.get("run") is None else mapping(head["run"], "run", path.name),
        np.zeros((0, model.n_layers, model.top_k), np.int32),
        np.zeros(1, np.int64),
        costs=costs,
        counters=counters,
        complete=end is not None,
        note=note,
        n_blocks=n_blocks,
        file_bytes=path.stat().st_size,
    )
    if events:
        result.events, result.event_arrays = _join_events(events, path.name)
    if tokens:
        _join_tokens(result, tokens)
    else:
        _tokens_of_events(result)
    return result


def _check_ids(ids: npt.NDArray[Any], model: ModelIdentity, name: str, first: int) -> None:
    """Raises TraceError naming token and layer of an id that the model does not have, or of a half-empty layer."""
    import numpy as np

    hint = "record or import it again"
    if ids.ndim != 3 or ids.shape[1:] != (model.n_layers, model.top_k):
        raise TraceError(f"the trace '{name}' is corrupt: ids of shape {list(ids.shape)} at token {first}", hint)
    missing = np.iinfo(ids.dtype).max
    absent = ids == missing
    wrong = ((ids >= model.n_expert) & ~absent) | (absent != absent[:, :, :1])
    if wrong.any():
        token, layer, k = np.argwhere(wrong)[0]
        value = ids[token, layer, k]
        what = "no expert" if value == missing else f"expert {value}"
        raise TraceError(
            f"the trace '{name}' has {what} at token {first + token}, layer {layer}, outside 0..{model.n_expert - 1}",
            hint,
        )


def _join_tokens(result: TraceFile, blocks: Sequence[Mapping[str, Any]]) -> None:
    import numpy as np

    def joined(name: str) -> Any:
        parts = [b[name] for b in blocks if name in b]
        return np.concatenate(parts) if len(parts) == len(blocks) else None

    ids = joined("experts")
    result.experts = ids.astype(np.int32)
    result.experts[ids == np.iinfo(ids.dtype).max] = -1
    prompt = joined("prompt")
    result.prompt_offsets = offsets_of(prompt)
    for name in ("is_decode", "device", "time_us", "bytes"):
        setattr(result, name, joined(name))
    for name in ("weights", "scores", "lookahead"):
        array = joined(name)
        setattr(result, name, None if array is None else array.astype(np.float32))


def offsets_of(prompt: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """[n_prompts + 1] first token of each prompt, from each token's prompt number. Prompts without tokens vanish."""
    import numpy as np

    starts = np.flatnonzero(np.diff(prompt)) + 1
    return np.concatenate([[0], starts, [len(prompt)]]).astype(np.int64)


def _join_events(
    blocks: Sequence[Mapping[str, Any]], name: str
) -> tuple[npt.NDArray[Any], dict[str, npt.NDArray[Any]]]:
    """All events with offsets into the joined arrays."""
    import numpy as np

    from hybrimoe.trace.events import event_dtype

    parts, arrays = [], {}
    sizes = dict.fromkeys(_EVENT_FIELDS, 0)
    for block in blocks:
        events = np.zeros(len(block["type"]), dtype=event_dtype())
        for column in COLUMNS:
            events[column] = block[column]
        for column, array in (("offset", "ids"), ("scores_offset", "scores"), ("lookahead_offset", "lookahead")):
            events[column] = np.where(events[column] >= 0, events[column] + sizes[array], -1)
        for array in _EVENT_FIELDS:
            sizes[array] += len(block[array]) if array in block else 0
        parts.append(events)
    for array in _EVENT_FIELDS:
        found = [b[array] for b in blocks if array in b]
        if found:
            arrays[array] = np.concatenate(found)
    joined = np.concatenate(parts)
    if len(joined) > 1 and (np.diff(joined["now_us"][joined["now_us"] > 0]) < 0).any():
        raise TraceError(f"the trace '{name}' is corrupt: its events' clock goes back", "record it again")
    return joined, arrays


def _tokens_of_events(result: TraceFile) -> None:
    """Routing per token, from LAYER and ROUTED events. A layer with fewer rows than its step (the last one of a prompt
    computes only the tokens whose logits were asked for) belongs to the step's last tokens. Steps of the warm-up are
    left out."""
    import numpy as np

    m, events = result.model, result.events
    assert events is not None
    steps, layers = _steps_of_events(events)
    if not steps:
        return
    if "ids" not in result.event_arrays:
        raise TraceError(f"the trace '{result.path.name}' is corrupt: its events lack expert ids", "record it again")
    n_ids = len(result.event_arrays.get("ids", ()))
    n_rows = [s[0] for s in steps]
    if any(s[2] not in (-1, StepKind.PREFILL, StepKind.DECODE) for s in steps):
        raise TraceError(f"the trace '{result.path.name}' is corrupt: a step is of no known kind", "record it again")
    if not all(1 <= n <= _MAX_STEP_TOKENS for n in n_rows) or sum(n_rows) > _MAX_STEP_TOKENS + _TOKENS_PER_ID * n_ids:
        raise TraceError(
            f"the trace '{result.path.name}' is corrupt: {sum(n_rows)} tokens, {n_ids} expert ids", "record it again"
        )
    firsts = np.concatenate([[0], np.cumsum([s[0] for s in steps], dtype=np.int64)]).astype(np.int64)
    experts = np.full((int(firsts[-1]), m.n_layers, m.top_k), -1, np.int32)
    arrays = result.event_arrays
    ids = arrays["ids"].astype(np.int32)
    weights = np.zeros(experts.shape, np.float32) if len(arrays.get("weights", ())) == len(ids) else None
    has_scores = "scores" in arrays and all(at >= 0 for *_, at in layers)
    scores = np.zeros((*experts.shape[:2], m.n_expert), np.float32) if has_scores else None
    for step, layer, rows, offset, scores_offset in layers:
        last = int(firsts[step + 1])
        n = rows * m.top_k
        here = ids[offset : offset + n]
        impossible = not 0 <= layer < m.n_layers or not 1 <= rows <= steps[step][0] or offset < 0
        if impossible or len(here) < n or here.max() >= m.n_expert:
            raise TraceError(
                f"the trace '{result.path.name}': impossible layer event in step {step}: layer {layer}, {rows} rows",
                "record it again",
            )
        experts[last - rows : last, layer] = here.reshape(rows, m.top_k)
        if weights is not None:
            weights[last - rows : last, layer] = arrays["weights"][offset : offset + n].reshape(rows, m.top_k)
        if scores is not None:
            values = arrays["scores"][scores_offset : scores_offset + rows * m.n_expert]
            if len(values) < rows * m.n_expert:
                raise TraceError(f"the trace '{result.path.name}' is corrupt: scores are missing", "record it again")
            scores[last - rows : last, layer] = values.reshape(rows, m.n_expert)
    result.experts, result.weights, result.scores = experts, weights, scores
    result.prompt_offsets = offsets_of(np.repeat([s[1] for s in steps], n_rows))
    if min(s[2] for s in steps) >= 0:
        result.is_decode = np.repeat(np.array([s[2] for s in steps], np.uint8), n_rows)


def _steps_of_events(
    events: npt.NDArray[Any],
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int, int, int]]]:
    """(rows, prompt, decode or -1) of each step, and (step, layer, rows, offset, scores_offset) of each layer."""
    steps: list[tuple[int, int, int]] = []
    layers: list[tuple[int, int, int, int, int]] = []
    # A recorder that knows where prompts begin says so in its steps; PROMPT is when the policies were told.
    in_steps = bool(((events["type"] == Note.STEP) & (events["b"] != 0)).any())
    prompt, last_layer = 0, 1 << 30
    said: tuple[int, int] | None = None
    skip = False
    columns = (events[n].tolist() for n in ("type", "layer", "n_rows", "a", "b", "offset", "scores_offset"))
    for kind, layer, rows, a, b, offset, scores_offset in zip(*columns, strict=True):
        if kind == EventType.PROMPT and not in_steps:
            prompt += bool(steps)
        elif kind == Note.STEP:
            skip = a == StepKind.WARM_UP
            said = None if skip else (rows, a)
            prompt += bool(steps) and in_steps and b != 0
        elif kind in (EventType.LAYER, Note.ROUTED) and not skip:
            if said is not None or layer <= last_layer or not steps:
                steps.append((said[0] if said else rows, prompt, said[1] if said else -1))
                said = None
            last_layer = layer
            layers.append((len(steps) - 1, layer, rows, offset, scores_offset))
    return steps, layers
