"""Every MoE architecture that llama.cpp knows, on the tiny models that its own test program writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import ARCHITECTURES, N_BLOCKS_PER_LAYER, WITHOUT_MOE_GRAPH, model_file
from checks import check_dispatch
from sides import Side, compare
from widen_arch_models import widen

from hybrimoe.errors import HybrimoeError
from hybrimoe.gguf_model import inspect

pytestmark = pytest.mark.slow

PREFILL = [1, 7, 33]


def is_moe(path: Path) -> bool:
    try:
        return bool(inspect(path).require_moe().moe_layer_indices)
    except HybrimoeError:
        return False


def test_the_list_is_complete(architecture_models: Path) -> None:
    found = {path.name.removesuffix("-moe.gguf") for path in architecture_models.glob("*-moe.gguf") if is_moe(path)}
    assert found == {*ARCHITECTURES, *WITHOUT_MOE_GRAPH}


def check(plain: Side, ours: Side, path: Path, arch: str) -> bool:
    """True when the logits are bit-equal; NMSE and dispatch are asserted."""
    got = ours.ask("logits", path, prefill=PREFILL)
    difference = compare(plain.ask("logits", path, prefill=PREFILL), got)
    assert difference.nmse <= 1e-5, difference
    check_dispatch(path, got, n_blocks_per_layer=N_BLOCKS_PER_LAYER.get(arch, 1))
    return difference.is_equal


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_as_llama_cpp_writes_it(plain: Side, ours: Side, architecture_models: Path, arch: str) -> None:
    assert check(plain, ours, model_file(architecture_models, arch), arch)


@pytest.mark.parametrize(("top_k", "kind"), [(2, None), (3, "Q8_0"), (4, "Q4_0")])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_widened(
    plain: Side, ours: Side, architecture_models: Path, tmp_path: Path, arch: str, top_k: int, kind: str | None
) -> None:
    """With 8 experts, so that the choice among them counts, and quantised."""
    source = model_file(architecture_models, arch)
    path = widen(source, tmp_path / f"{arch}.gguf", n_experts=8, top_k=top_k, type_name=kind)
    assert check(plain, ours, path, arch)


@pytest.mark.parametrize("arch", sorted(WITHOUT_MOE_GRAPH))
def test_experts_that_no_graph_uses(plain: Side, ours: Side, architecture_models: Path, arch: str) -> None:
    path = model_file(architecture_models, arch)
    got = ours.ask("logits", path, prefill=PREFILL)
    assert compare(plain.ask("logits", path, prefill=PREFILL), got).is_equal
    assert not got.layers
