#!/usr/bin/env python3
"""Gives the MoE models that llama.cpp's `test-llama-archs -o DIR` writes more experts than they have places for.

Those models have 2 experts and use both, in F32: neither the choice of experts nor quantised kernels are exercised.
This writes copies with more experts (random, like the rest), a smaller top-k and, if wanted, quantised expert weights,
and keeps everything else.
"""

from __future__ import annotations

import argparse
import re
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hybrimoe.errors import ModelError, UsageError, as_script

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Tensors whose slowest dimension counts experts.
_PER_EXPERT = re.compile(
    r"blk\.\d+\.(?:ffn_\w+_(?:ch)?exps\.\w+|ffn_gate_inp\.(?:weight|bias)|exp_probs_b\w*(?:\.bias)?)"
)
_EXPERT_WEIGHT = re.compile(r".*_(?:ch)?exps\.weight")
# The deviation that test-llama-archs itself draws weights with.
_DEVIATION = 0.1
# A selection bias as large as the router's scores would choose the same experts for every token.
_BIAS = re.compile(r"blk\.\d+\.exp_probs_b\w*(?:\.bias)?")
_BIAS_DEVIATION = 0.01


def widen(
    source: Path, out: Path, *, n_experts: int = 8, top_k: int = 2, type_name: str | None = None, seed: int = 0
) -> Path:
    """Writes a copy of `source` with `n_experts` experts, of which `top_k` are used; returns `out`.

    `type_name` quantises the experts' matrices where their rows allow it (else to Q8_0, else F32). Raises `ModelError`
    when the model has no experts or more than `n_experts`, `UsageError` for an impossible choice.
    """
    import gguf

    from hybrimoe.gguf_model import inspect
    from hybrimoe.models.gguf_write import GgufOutput, copy_metadata
    from hybrimoe.models.quantise import fitting_type, quantise

    model = inspect(source).require_moe()
    if not 1 <= top_k <= n_experts:
        raise UsageError(f"top-{top_k} of {n_experts} experts is impossible", "choose a smaller --top-k")
    if model.n_experts > n_experts:
        raise ModelError(f"'{source.name}' has {model.n_experts} experts already", "choose more --experts")
    reader: Any = gguf.GGUFReader(source)
    count_key, used_key = f"{model.architecture}.expert_count", f"{model.architecture}.expert_used_count"
    used = reader.fields[used_key].contents()
    with GgufOutput(out, model.architecture) as output:
        copy_metadata(reader, output, skip=(count_key, used_key))
        output.metadata.add_uint32(count_key, n_experts)
        if isinstance(used, list):
            output.metadata.add_array(used_key, [top_k if n else 0 for n in used])
        else:
            output.metadata.add_uint32(used_key, top_k)
        plans = []
        for tensor in reader.tensors:
            shape = tuple(int(n) for n in tensor.shape)
            kind = tensor.tensor_type.name
            wider = _PER_EXPERT.fullmatch(tensor.name) is not None and shape[-1] == model.n_experts
            if wider:
                shape = (*shape[:-1], n_experts)
                if type_name and _EXPERT_WEIGHT.fullmatch(tensor.name):
                    kind = fitting_type(shape[0], type_name)
            output.declare(tensor.name, shape, kind)
            plans.append((tensor, kind, wider))
        for tensor, kind, wider in plans:
            if wider:
                output.write(tensor.name, [quantise(_more_experts(tensor, n_experts, seed), kind)])
            else:
                output.write(tensor.name, [tensor.data])
    return out


def _more_experts(tensor: Any, n_experts: int, seed: int) -> npt.NDArray[np.float32]:
    """The tensor's experts followed by random ones, in C order."""
    import gguf
    import numpy as np

    there: npt.NDArray[np.float32] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    rng = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
    deviation = _BIAS_DEVIATION if _BIAS.fullmatch(tensor.name) else _DEVIATION
    more = rng.standard_normal((n_experts - len(there), *there.shape[1:]), dtype=np.float32) * np.float32(deviation)
    return np.concatenate([there, more])


def _models(paths: Iterable[Path]) -> list[Path]:
    """The files that were named, and every model with experts in the folders."""
    from hybrimoe.gguf_model import inspect

    found: list[Path] = []
    for path in paths:
        # Of an architecture with dense and MoE variants the file's name alone does not tell.
        found += [p for p in sorted(path.glob("*-moe.gguf")) if inspect(p).is_moe] if path.is_dir() else [path]
    if not found:
        raise UsageError("no models to widen", "give the folder that 'test-llama-archs -o DIR' wrote")
    return found


@as_script
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", type=Path, nargs="+", metavar="FILE-OR-DIR", help="of a folder, every *-moe.gguf with experts"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the copies")
    parser.add_argument("--experts", type=int, default=8, metavar="N", help="experts a layer (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=2, metavar="N", help="experts a token (default: %(default)s)")
    parser.add_argument("--type", metavar="TYPE", help="quantise the experts: Q4_0, Q8_0, ... (default: as they are)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for path in _models(args.models):
        suffix = f"-{args.type}" if args.type else ""
        out = args.out / f"{path.stem}-e{args.experts}k{args.top_k}{suffix}.gguf"
        widen(path, out, n_experts=args.experts, top_k=args.top_k, type_name=args.type, seed=args.seed)
        print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
