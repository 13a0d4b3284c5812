"""Our own CPU kernels, the plug-in's default: no further from exact arithmetic than llama.cpp's are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from architectures import ARCHITECTURES, N_BLOCKS_PER_LAYER, model_file
from checks import check_dispatch
from sides import Reply, Side, compare

from hybrimoe.models.gguf_write import GgufOutput, copy_metadata

PREFILL = [1, 7, 33, 128]
# They scale the experts' sum within the block; grovemoe adds its other group's sum to it.
SUM_IS_CHANGED = {"grovemoe", "minicpm"}
KINDS = ["F16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4"]


def dequantised(source: Path, out: Path) -> Path:
    """The same model with every weight in F32."""
    reader: Any = gguf.GGUFReader(source)
    with GgufOutput(out, reader.fields["general.architecture"].contents()) as output:
        copy_metadata(reader, output)
        for tensor in reader.tensors:
            output.declare(tensor.name, tuple(int(n) for n in tensor.shape), "F32")
        for tensor in reader.tensors:
            output.write(tensor.name, [gguf.quants.dequantize(tensor.data, tensor.tensor_type)])
    return out


def typical_error(reference: Reply, got: Reply) -> float:
    """The median over all logits rows of their normalised squared error.

    Not the mean: a token whose router hesitates between two experts may get the other one, by chance on either side.
    """
    errors: list[float] = []
    for name, exact in reference.arrays.items():
        difference = np.square(got.arrays[name] - exact, dtype=np.float64).sum(axis=1)
        errors += list(difference / np.square(exact, dtype=np.float64).sum(axis=1))
    return float(np.median(errors))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss"])
def test_error_against_exact_weights(
    plain: Side, own: Side, tiny_model: Callable[..., Path], tmp_path: Path, arch: str, kind: str
) -> None:
    path = tiny_model(arch, "F32", kind)
    exact = plain.ask("logits", dequantised(path, tmp_path / "exact.gguf"), prefill=PREFILL)
    stock = plain.ask("logits", path, prefill=PREFILL)
    got = own.ask("logits", path, prefill=PREFILL)
    check_dispatch(path, got)
    assert typical_error(exact, got) <= 1.1 * typical_error(exact, stock)


@pytest.mark.parametrize(
    ("scenario", "options"),
    [
        ("logits", {"prefill": PREFILL}),
        ("logits", {"prefill": [33], "last_only": True}),
        ("logits", {"prefill": [33], "threads": 1}),
        ("callback", {"watch": "experts"}),
        ("callback", {"watch": "third"}),
        ("warmup", {}),
        ("thread_counts", {"counts": [1, 2, 1, 3]}),
        ("two_contexts", {}),
        ("sequences", {}),
    ],
)
@pytest.mark.parametrize("arch", ["mixtral", "deepseek2", "gpt-oss", "llama4", "nogate"])
def test_seams(
    plain: Side, own: Side, tiny_model: Callable[..., Path], arch: str, scenario: str, options: dict[str, Any]
) -> None:
    """In F32 only the order of sums differs."""
    path = tiny_model(arch, "F32")
    difference = compare(plain.ask(scenario, path, **options), own.ask(scenario, path, **options))
    assert difference.nmse <= 1e-6, difference


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture(plain: Side, own: Side, architecture_models: Path, arch: str) -> None:
    """Our kernels run all of them: the sum that they fuse takes no time of its own, only what follows it."""
    path = model_file(architecture_models, arch)
    got = own.ask("logits", path, prefill=PREFILL)
    difference = compare(plain.ask("logits", path, prefill=PREFILL), got)
    assert difference.nmse <= 1e-6, difference
    check_dispatch(path, got, n_blocks_per_layer=N_BLOCKS_PER_LAYER.get(arch, 1))
    assert all((counts["merge_us"] > 0) == (arch in SUM_IS_CHANGED) for counts in got.layers.values())
