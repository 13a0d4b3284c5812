"""A CPU as accelerator for every MoE architecture that llama.cpp knows: each block is read, shared, and bit-equal."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import ARCHITECTURES, model_file
from hybrid_checks import ask_both, check_used, settings_of
from sides import Side
from widen_arch_models import widen

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_as_llama_cpp_writes_it(plain: Side, hybrid: Side, architecture_models: Path, arch: str) -> None:
    got, difference = ask_both(plain, hybrid, model_file(architecture_models, arch), settings_of())
    assert difference.is_equal, difference
    check_used(got, evictions=False)


@pytest.mark.parametrize(("top_k", "kind"), [(1, "Q4_0"), (3, "Q8_0")])
@pytest.mark.parametrize("arch", ["kimi-k3", "llama4", "minicpm", "llama"])
def test_widened(
    plain: Side,
    hybrid: Side,
    architecture_models: Path,
    tmp_path: Path,
    arch: str,
    top_k: int,
    kind: str,
) -> None:
    """Eight experts, quantised, one or several a token: the blocks that differ most from the common ones."""
    source = model_file(architecture_models, arch)
    path = widen(source, tmp_path / f"{arch}.gguf", n_experts=8, top_k=top_k, type_name=kind)
    got, difference = ask_both(plain, hybrid, path, settings_of(expert_cache=2))
    assert difference.is_equal, difference
    check_used(got)
