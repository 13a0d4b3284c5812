"""Import of `.npz` files with `experts` [n_tokens, n_layers, top_k] (255: did not run) and `prompt_offsets`.

Also `weights`, `is_decode`, `first_layer`, `n_expert`, `expert_bytes`, `model`, where the file has them.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybrimoe.errors import UsageError, from_os_error
from hybrimoe.trace.errors import TraceError
from hybrimoe.trace.importers.common import Imported, ImportOptions, identity


def fits(start: bytes) -> bool:
    return start.startswith(b"PK\x03\x04")


def load(paths: Sequence[Path], options: ImportOptions) -> Imported:
    import numpy as np

    if len(paths) > 1:
        raise UsageError("an .npz file is a whole trace", "import them one by one")
    path = paths[0]
    try:
        with np.load(path, allow_pickle=False) as z:
            data = {name: z[name] for name in z.files}
    except OSError as error:
        raise from_os_error(error, f"read '{path}'") from error
    except (ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise TraceError(f"'{path}' is no sound .npz file: {error}") from error
    missing = [name for name in ("experts", "prompt_offsets") if name not in data]
    if missing:
        raise TraceError(f"'{path}' lacks the array '{missing[0]}'")
    given = data["experts"]
    if given.ndim != 3 or given.dtype.kind not in "iu" or 0 in given.shape:
        raise TraceError(f"'{path}': experts are {given.dtype}{list(given.shape)}, must be ids [tokens, layers, top-k]")
    experts = given.astype(np.int32)
    if given.dtype == np.uint8:
        experts[given == 255] = -1
    absent = experts < 0
    if (absent != absent[:, :, :1]).any():
        token, layer = np.argwhere(absent != absent[:, :, :1])[0][:2]
        raise TraceError(f"'{path}': token {token}, layer {layer} has fewer than {experts.shape[2]} experts")
    n = len(experts)
    notes: list[str] = []
    first = int(data.get("first_layer", 0))
    size = int(data["expert_bytes"]) if "expert_bytes" in data else 0
    model = identity(
        options,
        experts,
        range(first, first + experts.shape[1]),
        notes,
        name=str(data.get("model", path.stem)),
        n_expert=int(data.get("n_expert", 0)),
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


def _prompts(path: Path, offsets: Any, n: int) -> Any:
    import numpy as np

    if offsets.ndim != 1 or len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != n or (np.diff(offsets) < 0).any():
        raise TraceError(f"'{path}': prompt_offsets must rise from 0 to the {n} tokens")
    return np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))


def _decode(path: Path, phase: Any, n: int) -> Any:
    if phase is not None and phase.shape != (n,):
        raise TraceError(f"'{path}': is_decode has shape {list(phase.shape)}, must have {n} entries")
    return phase


def _weights(path: Path, weights: Any, experts: Any) -> Any:
    if weights is not None and weights.shape != experts.shape:
        raise TraceError(f"'{path}': weights have shape {list(weights.shape)}, experts {list(experts.shape)}")
    return weights
