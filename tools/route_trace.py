#!/usr/bin/env python3
"""Turns a recorded routing trace into the file that the plug-in's benchmark-only setting `route_trace` reads.

A random model's router has no locality, so a benchmark of an expert cache replays the expert choices of a real model.
Input: an npz file with an array `experts` [n_tokens, n_moe_layers, top_k] (255: the model did not run that layer) and,
where they are known, `n_expert` and `is_decode`; or a plain integer array of that shape (.npy). Output: int32 header
{magic, version, n_steps, n_layers, top_k}, then int32 ids [n_steps, n_layers, top_k].

A trace of other dimensions than the model's is fitted to it: layers are taken in turn, ids modulo the number of
experts, choices beyond the model's top-k are cut, and missing ones are taken from the same layer half a trace away. So
the locality is that of the trace at best, not that of the model.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hybrimoe.errors import UsageError, as_script, from_os_error

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Ids = npt.NDArray[np.int32]

MAGIC = 0x52544D48
VERSION = 1
NOT_RUN = 255
N_HEADER = 5


def read_trace(path: Path, *, decode_only: bool = False) -> Ids:
    """Ids [n_steps, n_layers, top_k] of the steps that every layer ran.

    Raises UsageError for a file that is missing, of another layout, or without such a step.
    """
    import numpy as np

    try:
        loaded = np.load(path, allow_pickle=False)
        with_names = isinstance(loaded, np.lib.npyio.NpzFile)
        experts = np.asarray(loaded["experts"] if with_names else loaded)
        is_decode = np.asarray(loaded["is_decode"]) if with_names and "is_decode" in loaded else None
    except OSError as error:
        raise UsageError(
            f"cannot read the trace {path}: {error.strerror or error}", "give an npz or npy file"
        ) from error
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(
            f"{path} is no routing trace: {error}", "an array experts [tokens, layers, top-k] is needed"
        ) from error
    if experts.ndim != 3 or experts.dtype.kind not in "ui" or 0 in experts.shape:
        raise UsageError(
            f"the trace {path} has the shape {experts.shape} of {experts.dtype}",
            "an integer array experts [tokens, layers, top-k] is needed",
        )
    if decode_only and is_decode is None:
        raise UsageError(f"the trace {path} does not say which steps are decode", "use it without --decode-only")
    keep = (experts != NOT_RUN).all(axis=(1, 2)) if experts.dtype == np.uint8 else np.ones(len(experts), bool)
    if decode_only and is_decode is not None:
        keep &= is_decode.astype(bool)
    ids: Ids = experts[keep].astype(np.int32)
    if len(ids) == 0:
        raise UsageError(f"the trace {path} has no step that every layer ran", "use another trace")
    return ids


def fit(ids: Ids, *, n_layers: int, moe_layers: Sequence[int], n_experts: int, top_k: int) -> Ids:
    """The trace for a model with `n_layers` layers, of which `moe_layers` have experts: ids [n_steps, n_layers, top_k].

    Rows of layers without experts repeat those of another layer; nothing reads them. The ids of one row are distinct.
    """
    import numpy as np

    if not 1 <= top_k <= n_experts:
        raise UsageError(f"top-{top_k} of {n_experts} experts is impossible", "give the model's own figures")
    result = np.zeros((len(ids), n_layers, top_k), np.int32)
    for number, layer in enumerate(moe_layers):
        rows = ids[:, number % ids.shape[1]] % n_experts
        for step in range(len(rows)):
            # Half a trace away: as skewed as the layer itself, but not correlated with this step.
            others = (rows[(step + len(rows) // 2 + i) % len(rows)] for i in range(len(rows)))
            candidates = itertools.chain(rows[step], itertools.chain.from_iterable(others), range(n_experts))
            chosen: dict[int, None] = {}
            for expert in candidates:
                chosen[int(expert)] = None
                if len(chosen) == top_k:
                    break
            result[step, layer] = list(chosen)
    for layer in set(range(n_layers)) - set(moe_layers):
        result[:, layer] = result[:, moe_layers[0]]
    return result


def uniform(n_steps: int, *, n_layers: int, n_experts: int, top_k: int, seed: int = 0) -> Ids:
    """Routing without any locality: each row is a random choice, all experts alike."""
    import numpy as np

    rng = np.random.default_rng(seed)
    ids: Ids = rng.random((n_steps, n_layers, n_experts)).argpartition(top_k - 1)[..., :top_k].astype(np.int32)
    return ids


def write_raw(path: Path, ids: Ids) -> None:
    """Writes the plug-in's file under a temporary name, then renames it. Raises HybrimoeError when that fails."""
    import numpy as np

    header = np.array([MAGIC, VERSION, *ids.shape], "<i4")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
            file.write(header.tobytes())
            file.write(ids.astype("<i4").tobytes())
        Path(file.name).replace(path)
    except OSError as error:
        raise from_os_error(error, f"write {path}") from error


def read_raw(path: Path) -> Ids:
    """The ids of a file that `write_raw` wrote. Raises UsageError for any other file."""
    import numpy as np

    data = np.fromfile(path, "<i4")
    if len(data) < N_HEADER or data[0] != MAGIC or data[1] != VERSION:
        raise UsageError(f"{path} is no route trace of the plug-in", "write one with tools/route_trace.py")
    shape = tuple(int(n) for n in data[2:N_HEADER])
    if min(shape) < 1 or len(data) != N_HEADER + shape[0] * shape[1] * shape[2]:
        raise UsageError(f"the route trace {path} is cut off", "write it again with tools/route_trace.py")
    ids: Ids = data[N_HEADER:].reshape(shape).astype(np.int32)
    return ids


@as_script
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", help="npz or npy file, or the word 'uniform'")
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--model", type=Path, required=True, metavar="FILE", help="the GGUF model that shall run it")
    parser.add_argument("--decode-only", action="store_true", help="leave out prompt tokens")
    parser.add_argument(
        "--steps", type=int, default=4096, metavar="N", help="length of 'uniform' (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    from hybrimoe.gguf_model import inspect

    model = inspect(args.model).require_moe()
    shape = {"n_layers": model.n_layers, "n_experts": model.n_experts, "top_k": model.n_experts_used}
    if args.trace == "uniform":
        ids = uniform(args.steps, **shape)
    else:
        trace = read_trace(Path(args.trace), decode_only=args.decode_only)
        ids = fit(trace, moe_layers=model.moe_layer_indices, **shape)
    write_raw(args.out, ids)
    print(f"{args.out}: {ids.shape[0]} steps, {ids.shape[1]} layers, top-{ids.shape[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
