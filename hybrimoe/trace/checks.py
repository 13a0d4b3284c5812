"""What a block's arrays must be like: a file with right checksums may still say anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hybrimoe.trace.errors import TraceError
from hybrimoe.trace.events import COLUMNS, MAX_DEVICES

if TYPE_CHECKING:
    import numpy.typing as npt

    from hybrimoe.trace.blocks import Block
    from hybrimoe.trace.format import ModelIdentity

__all__ = ["check_events", "check_prompts", "check_tokens", "mapping"]

_MOST = 1 << 62
_HINT = "record or import it again"


def _wrong(name: str, what: str) -> TraceError:
    return TraceError(f"the trace '{name}' is corrupt: {what}", _HINT)


def mapping(value: Any, what: str, name: str) -> Mapping[str, Any]:
    """`value` if it is an object. Raises TraceError."""
    if not isinstance(value, dict):
        raise _wrong(name, f"its {what} are no object")
    return value


def check_tokens(block: Block, model: ModelIdentity, name: str) -> None:
    """Raises TraceError for an array of tokens that is missing, or has another type or shape than its tokens need."""
    n = len(block.arrays["experts"]) if "experts" in block.arrays and block.arrays["experts"].ndim else 0
    per_expert, per_layer = (n, model.n_layers, model.top_k), (n, model.n_layers)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "experts": ("u", per_expert),
        "prompt": ("i", (n,)),
        "is_decode": ("u", (n,)),
        "weights": ("f", per_expert),
        "scores": ("f", (*per_layer, model.n_expert)),
        "lookahead": ("f", (*per_layer, 3, model.n_expert)),
        "device": ("i", per_expert),
        "time_us": ("f", per_layer),
        "bytes": ("i", per_layer),
    }
    for needed in ("experts", "prompt"):
        if needed not in block.arrays:
            raise _wrong(name, f"a block of tokens lacks '{needed}'")
    for key, array in block.arrays.items():
        if key not in shapes:
            continue
        kind, shape = shapes[key]
        if array.dtype.kind != kind or array.shape != shape:
            raise _wrong(name, f"'{key}' is {array.dtype}{list(array.shape)}, {n} tokens need {list(shape)}")


def check_prompts(prompts: Sequence[npt.NDArray[Any]], name: str) -> None:
    """Raises TraceError where the number of the prompt falls."""
    last = 0
    for prompt in prompts:
        if len(prompt) and (int(prompt[0]) < last or (prompt[1:] < prompt[:-1]).any()):
            raise _wrong(name, "its prompts are out of order")
        last = int(prompt[-1]) if len(prompt) else last


def check_events(block: Block, name: str) -> None:
    """Raises TraceError for columns that are missing or of different lengths, and for offsets outside the arrays."""
    import numpy as np

    arrays = block.arrays
    n = len(arrays["type"]) if "type" in arrays and arrays["type"].ndim else -1
    for column, code in COLUMNS.items():
        shape = (n, MAX_DEVICES) if column == "gpu_ready_us" else (n,)
        if column not in arrays or arrays[column].dtype != np.dtype(code) or arrays[column].shape != shape:
            raise _wrong(name, f"the column '{column}' of its events is missing or damaged")
    for key, kind in (("ids", "u"), ("weights", "f"), ("scores", "f"), ("lookahead", "f"), ("device", "i")):
        if key in arrays and (arrays[key].ndim != 1 or arrays[key].dtype.kind != kind):
            raise _wrong(name, f"'{key}' of its events is {arrays[key].dtype}{list(arrays[key].shape)}")
    for column, key in (("offset", "ids"), ("scores_offset", "scores"), ("lookahead_offset", "lookahead")):
        most = len(arrays[key]) if key in arrays else _MOST  # only wanted arrays were unpacked
        if (arrays[column] < -1).any() or (arrays[column] > most).any():
            raise _wrong(name, f"its events refer to '{key}' that are not there")
    if not np.isfinite(arrays["now_us"]).all():
        raise _wrong(name, "its events' clock holds numbers that are none")
