#!/usr/bin/env python3
"""Writes a random MoE model with the layer shapes of a well-known one, for benchmarks: few layers, a small vocabulary.

Weights are blocks of random normal weights, quantised once and repeated in random order: every byte is valid for its
type and scaled as in a trained model, and a file of gigabytes is written in seconds. Text from such a model means
nothing; its speed and memory traffic are those of the real model's layers.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moe_shapes import ARCHITECTURES, Shape, Tensor, add_metadata, random_weights, tensor_type

from hybrimoe.errors import UsageError, as_script

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_POOL_ELEMS = 8 << 20


@dataclass(frozen=True)
class Preset:
    """A known model's layer; sizes from its published configuration."""

    architecture: str
    shape: Shape
    expert_type: str = "Q4_0"
    type_name: str = "Q4_0"


PRESETS = {
    "qwen3-30b-a3b": Preset(
        "qwen3moe",
        Shape(n_layers=4, n_embd=2048, n_ff=768, n_experts=128, top_k=8, n_head=32, n_head_kv=4, head_dim=128),
    ),
    "deepseek-v2-lite": Preset(
        "deepseek-lite",
        Shape(
            n_layers=4, n_embd=2048, n_ff=1408, n_experts=64, top_k=6, n_head=16, n_head_kv=1, head_dim=192,
            head_dim_rope=64, kv_rank=512, n_shared=2, n_ff_dense=10944,
        ),
    ),
    "gpt-oss-20b": Preset(
        "gpt-oss",
        Shape(n_layers=4, n_embd=2880, n_ff=2880, n_experts=32, top_k=4, n_head=64, n_head_kv=8, head_dim=64),
        expert_type="MXFP4",
        type_name="Q8_0",
    ),
    "mixtral": Preset(
        "mixtral",
        Shape(n_layers=2, n_embd=4096, n_ff=14336, n_experts=8, top_k=2, n_head=32, n_head_kv=8, head_dim=128),
    ),
    # No known model: next to no weights, so that what remains is the fixed cost of a layer.
    "fixed-cost": Preset(
        "qwen3moe",
        Shape(n_layers=48, n_embd=256, n_ff=32, n_experts=8, top_k=2, n_head=4, n_head_kv=2, head_dim=64),
    ),
}  # fmt: skip


class _Blocks:
    """Random quantised rows, made once for each row length and type."""

    def __init__(self, seed: int) -> None:
        import numpy as np

        self._rng = np.random.default_rng(seed)
        self._pools: dict[tuple[int, str], npt.NDArray[np.uint8]] = {}

    def rows(self, tensor: Tensor, kind: str) -> Iterator[npt.NDArray[np.uint8]]:
        """All rows of a large matrix, in chunks."""
        import numpy as np

        from hybrimoe.models.quantise import quantise

        key = (tensor.fan_in, kind)
        if key not in self._pools:
            n = max(1, _POOL_ELEMS // tensor.fan_in)
            weights = self._rng.standard_normal((n, tensor.fan_in), dtype=np.float32) / np.float32(tensor.fan_in**0.5)
            self._pools[key] = quantise(weights, kind).reshape(n, -1)
        pool = self._pools[key]
        n_left = 1
        for extent in tensor.shape[1:]:
            n_left *= extent
        while n_left:
            start = int(self._rng.integers(len(pool)))
            chunk = pool[start : start + n_left]
            n_left -= len(chunk)
            yield chunk


def write_bench_model(
    path: Path, preset: Preset, *, type_name: str | None = None, n_layers: int | None = None, seed: int = 0
) -> Path:
    """Writes one model; `type_name` is the type of experts and dense matrices (default: the preset's). Returns `path`.

    Raises `UsageError` for an unknown type or fewer than two layers (the last layer's experts see only output tokens in
    prefill, so one layer measures nothing), `HybrimoeError` when the file cannot be written.
    """
    from hybrimoe.models.gguf_write import GgufOutput
    from hybrimoe.models.quantise import quantise, type_of

    architecture = ARCHITECTURES[preset.architecture]
    shape = replace(preset.shape, n_layers=preset.shape.n_layers if n_layers is None else n_layers)
    if shape.n_layers < 2:
        raise UsageError("a benchmark model needs two layers at least", "use --layers 2 or more")
    type_name = type_name or preset.type_name
    expert_type = preset.expert_type if type_name == preset.type_name else type_name
    type_of(type_name)
    tensors = [(t, tensor_type(t, type_name, expert_type)) for t in architecture.tensors(shape)]
    blocks = _Blocks(seed)
    with GgufOutput(path, architecture.arch) as output:
        output.metadata.add_name(f"HybriMoE benchmark {path.stem}")
        add_metadata(output.metadata, architecture, shape)
        for tensor, kind in tensors:
            output.declare(tensor.name, tensor.shape, kind)
        for tensor, kind in tensors:
            if tensor.role in ("matrix", "expert"):
                output.write(tensor.name, blocks.rows(tensor, kind))
            else:
                output.write(tensor.name, [quantise(random_weights(tensor, seed), kind)])
    return path


@as_script
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="qwen3-30b-a3b", help="default: %(default)s")
    parser.add_argument("--type", metavar="TYPE", help="Q4_0, Q8_0, Q4_K, Q6_K, MXFP4, ... (default: the preset's)")
    parser.add_argument(
        "--layers", type=int, metavar="N", help="number of layers, two at least (default: the preset's)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: bench-PRESET-TYPE-LAYERSl.gguf")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    preset = PRESETS[args.preset]
    type_name = (args.type or preset.expert_type).upper()
    n_layers = args.layers if args.layers is not None else preset.shape.n_layers
    path = args.out or Path(f"bench-{args.preset}-{type_name}-{n_layers}l.gguf")
    start = time.monotonic()
    write_bench_model(path, preset, type_name=args.type and type_name, n_layers=n_layers, seed=args.seed)
    print(f"{path}  {path.stat().st_size / 2**20:.0f} MiB in {time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
