#!/usr/bin/env python3
"""Writes small random MoE models in GGUF for tests: one for each way in which llama.cpp builds a MoE block."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moe_shapes import ARCHITECTURES, Architecture, Shape, add_metadata, random_weights, tensor_type

from hybrimoe.errors import UsageError, as_script


def write_tiny_model(
    path: Path,
    architecture: Architecture | str,
    type_name: str = "F32",
    *,
    shape: Shape | None = None,
    expert_type: str | None = None,
    seed: int = 0,
) -> Path:
    """Writes one model; `expert_type` gives the experts another type than the rest. Returns `path`.

    Raises `UsageError` for an unknown architecture, type or impossible shape, `HybrimoeError` when it cannot write.
    """
    from hybrimoe.models.gguf_write import GgufOutput
    from hybrimoe.models.quantise import quantise, row_bytes, type_of

    if isinstance(architecture, str):
        if architecture not in ARCHITECTURES:
            raise UsageError(f"unknown architecture '{architecture}'", "known: " + " ".join(ARCHITECTURES))
        architecture = ARCHITECTURES[architecture]
    shape = shape or architecture.tiny
    if not 1 <= shape.top_k <= shape.n_experts:
        raise UsageError(f"top-{shape.top_k} of {shape.n_experts} experts is impossible", "choose a smaller --top-k")
    type_of(type_name)
    tensors = [(t, tensor_type(t, type_name, expert_type)) for t in architecture.tensors(shape)]
    for tensor, kind in tensors:
        row_bytes(tensor.shape[0], kind)
    with GgufOutput(path, architecture.arch) as output:
        output.metadata.add_name(f"HybriMoE tiny {architecture.name} {type_name}")
        add_metadata(output.metadata, architecture, shape)
        for tensor, kind in tensors:
            output.declare(tensor.name, tensor.shape, kind)
        for tensor, kind in tensors:
            output.write(tensor.name, [quantise(random_weights(tensor, seed), kind)])
    return path


@as_script
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("tiny-models"), metavar="DIR", help="folder (default: %(default)s)"
    )
    parser.add_argument("--arch", action="append", metavar="NAME", help="architecture, may be repeated (default: all)")
    parser.add_argument("--type", action="append", metavar="TYPE", help="F32, Q4_0, Q8_0, Q4_K, ...; may be repeated")
    parser.add_argument("--expert-type", metavar="TYPE", help="another type for the experts, such as MXFP4")
    parser.add_argument("--n-embd", type=int, metavar="N", help="model width (a multiple of 256 for K-quants)")
    parser.add_argument("--n-ff", type=int, metavar="N", help="width of one expert (a multiple of 256 for K-quants)")
    parser.add_argument("--experts", type=int, metavar="N", help="experts a layer")
    parser.add_argument("--top-k", type=int, metavar="N", help="experts a token")
    parser.add_argument("--layers", type=int, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="list the architectures and stop")
    args = parser.parse_args(argv)
    if args.list:
        for a in ARCHITECTURES.values():
            print(f"{a.name:18} {a.arch:10} {a.tiny.n_experts:3} experts, top-{a.tiny.top_k}: {a.about}")
        return 0
    sizes = {
        "n_embd": args.n_embd, "n_ff": args.n_ff, "n_experts": args.experts, "top_k": args.top_k,
        "n_layers": args.layers,
    }  # fmt: skip
    changes = {key: value for key, value in sizes.items() if value is not None}
    if any(value < 1 for value in changes.values()):
        raise UsageError("sizes must be at least 1", "see --help")
    for name in args.arch or ARCHITECTURES:
        for type_name in args.type or ["F32"]:
            if name not in ARCHITECTURES:
                raise UsageError(f"unknown architecture '{name}'", "known: " + " ".join(ARCHITECTURES))
            suffix = f"-{args.expert_type}" if args.expert_type else ""
            path = write_tiny_model(
                args.out / f"tiny-{name}-{type_name}{suffix}.gguf", name, type_name,
                shape=replace(ARCHITECTURES[name].tiny, **changes), expert_type=args.expert_type, seed=args.seed,
            )  # fmt: skip
            print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
