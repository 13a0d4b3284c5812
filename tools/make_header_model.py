#!/usr/bin/env python3
"""Writes the header alone of a well-known MoE model: all layers and its true vocabulary size, no weights.

`hybrimoe plan` works on such a file, as on the first bytes of a download. Shapes are those of the models' published
configurations; the tensors' types are those of the usual file of that model (Q4_0, or MXFP4 experts).
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from make_bench_model import Preset
from moe_shapes import ARCHITECTURES, Shape, add_metadata, tensor_type

from hybrimoe.errors import as_script, from_os_error

PRESETS = {
    "qwen3-30b-a3b": Preset(
        "qwen3moe",
        Shape(n_layers=48, n_embd=2048, n_ff=768, n_experts=128, top_k=8, n_head=32, n_head_kv=4, head_dim=128,
              n_vocab=151936, n_ctx=40960),
    ),
    "gpt-oss-120b": Preset(
        "gpt-oss",
        Shape(n_layers=36, n_embd=2880, n_ff=2880, n_experts=128, top_k=4, n_head=64, n_head_kv=8, head_dim=64,
              n_vocab=201088, n_ctx=131072),
        expert_type="MXFP4",
        type_name="Q8_0",
    ),
    "mixtral-8x7b": Preset(
        "mixtral",
        Shape(n_layers=32, n_embd=4096, n_ff=14336, n_experts=8, top_k=2, n_head=32, n_head_kv=8, head_dim=128,
              n_vocab=32000, n_ctx=32768),
    ),
    "deepseek-v3": Preset(
        "deepseek2",
        Shape(n_layers=61, n_embd=7168, n_ff=2048, n_experts=256, top_k=8, n_head=128, n_head_kv=1, head_dim=192,
              head_dim_rope=64, kv_rank=512, q_rank=1536, n_shared=1, n_groups=8, n_groups_used=4, n_ff_dense=18432,
              n_dense_lead=3, n_vocab=129280, n_ctx=163840),
    ),
    "deepseek-v2-lite": Preset(
        "deepseek-lite",
        Shape(n_layers=27, n_embd=2048, n_ff=1408, n_experts=64, top_k=6, n_head=16, n_head_kv=1, head_dim=192,
              head_dim_rope=64, kv_rank=512, n_shared=2, n_ff_dense=10944, n_vocab=102400, n_ctx=163840),
    ),
}  # fmt: skip


def write_header(path: Path, preset: Preset, *, n_layers: int | None = None) -> Path:
    """Writes the header of a model, or of its first `n_layers`. Returns `path`.

    Raises `HybrimoeError` when the file cannot be written; nothing is left then.
    """
    import gguf
    import numpy as np

    from hybrimoe.models.quantise import row_bytes, type_of

    architecture = ARCHITECTURES[preset.architecture]
    shape = preset.shape if n_layers is None else replace(preset.shape, n_layers=n_layers)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    writer: Any = gguf.GGUFWriter(None, architecture.arch)
    writer.add_name(path.stem)
    add_metadata(writer, architecture, shape)
    for tensor in architecture.tensors(shape):
        kind = tensor_type(tensor, preset.type_name, preset.expert_type)
        n_rows = int(np.prod(tensor.shape[1:], dtype=np.int64))
        raw = gguf.GGMLQuantizationType(type_of(kind)[0])
        n_bytes = n_rows * row_bytes(tensor.shape[0], kind)
        writer.add_tensor_info(tensor.name, tuple(reversed(tensor.shape)), np.dtype(np.float32), n_bytes, raw_dtype=raw)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file(part)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        part.replace(path)
    except OSError as error:
        raise from_os_error(error, f"write '{path}'") from error
    finally:
        part.unlink(missing_ok=True)
    return path


@as_script
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="qwen3-30b-a3b", help="default: %(default)s")
    parser.add_argument("--layers", type=int, metavar="N", help="number of layers (default: all)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: PRESET-header.gguf")
    args = parser.parse_args(argv)
    path = args.out or Path(f"{args.preset}-header.gguf")
    write_header(path, PRESETS[args.preset], n_layers=args.layers)
    print(f"{path}  {path.stat().st_size / 2**10:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
