"""Import of `.npz` files with `experts` [n_tokens, n_layers, top_k] (255: did not run) and `prompt_offsets`.

Also `weights`, `is_decode`, `first_layer`, `n_expert`, `expert_bytes`, `model`, where the file has them.
"""

from __future__ import annotations

import io
import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrimoe.errors import UsageError, from_os_error
from hybrimoe.files import read_bytes
from hybrimoe.trace.blocks import check_memory
from hybrimoe.trace.errors import TraceError
from hybrimoe.trace.importers.common import Imported, ImportOptions, identity

# What numpy and zipfile raise for damaged files: they are made for whole ones.
_DAMAGE = (
    ValueError, EOFError, KeyError, TypeError, OverflowError, NotImplementedError, RuntimeError,
    SyntaxError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
    lzma.LZMAError, OSError,  # the latter is bz2's
)  # fmt: skip


def fits(start: bytes) -> bool:
    return start.startswith(b"PK\x03\x04")


def load(paths: Sequence[Path], options: ImportOptions) -> Imported:
    import numpy as np

    if len(paths) > 1:
        raise UsageError("an .npz file is a whole trace", "import them one by one")
    path = paths[0]
    try:
        file = io.BytesIO(read_bytes(path))
    except OSError as error:
        raise from_os_error(error, f"read '{path}'") from error
    try:
        _check_sizes(file, path)
        file.seek(0)
        with np.load(file, allow_pickle=False) as z:
            data = {name: z[name] for name in z.files}
    except _DAMAGE as error:
        raise TraceError(f"'{path}' is no sound .npz file: {error}") from error
    missing = [name for name in ("experts", "prompt_offsets") if name not in data]
    if missing:
        raise TraceError(f"'{path}' lacks the array '{missing[0]}'")
    given = data["experts"]
    if given.ndim != 3 or given.dtype.kind not in "iu" or 0 in given.shape:
        raise TraceError(f"'{path}': experts are {given.dtype}{list(given.shape)}, must be ids [tokens, layers, top-k]")
    if given.max() > np.iinfo(np.int32).max or given.min() < np.iinfo(np.int32).min:
        raise TraceError(f"'{path}': expert {given.max()} is no id")
    experts = given.astype(np.int32)
    if given.dtype == np.uint8:
        experts[given == 255] = -1
    absent = experts < 0
    if (absent != absent[:, :, :1]).any():
        token, layer = np.argwhere(absent != absent[:, :, :1])[0][:2]
        raise TraceError(f"'{path}': token {token}, layer {layer} has fewer than {experts.shape[2]} experts")
    n = len(experts)
    notes: list[str] = []
    first = _number(path, data, "first_layer")
    size = _number(path, data, "expert_bytes")
    model = identity(
        options,
        experts,
        range(first, first + experts.shape[1]),
        notes,
        name=_text(data.get("model"), path.stem),
        n_expert=_number(path, data, "n_expert"),
        expert_bytes=[size] * experts.shape[1] if size else (),
    )
    return Imported(
        model,
        experts,
        _prompts(path, data["prompt_offsets"], n),
        _decode(path, data.get("is_decode"), n),
        _weights(path, data.get("weights"), experts),
        {"format": "npz", "file": path.name},
        notes,
    )


def _check_sizes(file: io.BytesIO, path: Path) -> None:
    """Raises DoesNotFitError for an archive that unpacks to more than the free memory, TraceError for a false size."""
    import numpy as np

    with zipfile.ZipFile(file) as archive:
        check_memory(sum(entry.file_size for entry in archive.infolist()), path.name)
        for entry in archive.infolist():
            if not entry.filename.endswith(".npy"):
                continue
            # numpy allocates what an array's head says before it reads: it must be what follows the head.
            with archive.open(entry) as member:
                version = np.lib.format.read_magic(member)
                if version > (2, 0):
                    raise ValueError(f"'{entry.filename}' is of a later version")
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(member)
                if not all(n >= 0 for n in shape) or math.prod(shape) * dtype.itemsize > entry.file_size:
                    raise ValueError(f"'{entry.filename}' has another size than its head says")


def _text(value: Any, default: str) -> str:
    """A text without halves of characters, which numpy's arrays can hold."""
    return default if value is None else str(value).encode("utf-8", "replace").decode()


def _number(path: Path, data: Mapping[str, Any], name: str) -> int:
    value = data.get(name)
    if value is None:
        return 0
    if value.shape != () or value.dtype.kind not in "iu" or not 0 <= int(value) < 1 << 53:
        raise TraceError(f"'{path}': {name} is {value.dtype}{list(value.shape)}, must be a number of at least 0")
    return int(value)


def _prompts(path: Path, offsets: Any, n: int) -> Any:
    import numpy as np

    sound = offsets.ndim == 1 and offsets.dtype.kind in "iu" and len(offsets) >= 2
    if not sound or offsets[0] != 0 or offsets[-1] != n or (offsets[1:] < offsets[:-1]).any():
        raise TraceError(f"'{path}': prompt_offsets must rise from 0 to the {n} tokens")
    return np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))


def _decode(path: Path, phase: Any, n: int) -> Any:
    if phase is not None and (phase.shape != (n,) or phase.dtype.kind not in "iub"):
        raise TraceError(f"'{path}': is_decode is {phase.dtype}{list(phase.shape)}, must have {n} entries of 0 or 1")
    return phase


def _weights(path: Path, weights: Any, experts: Any) -> Any:
    if weights is not None and (weights.shape != experts.shape or weights.dtype.kind != "f"):
        raise TraceError(
            f"'{path}': weights have shape {list(weights.shape)} of {weights.dtype}, experts {list(experts.shape)}"
        )
    return weights
