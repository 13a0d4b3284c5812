"""Every MoE architecture that llama.cpp knows, its experts on a second CPU backend: the logits of plain llama.cpp."""

from __future__ import annotations

from pathlib import Path

import pytest
from hybrid_checks import ask_both, check_used, settings_of, total
from sides import Side
from test_parity_architectures import ARCHITECTURES, model_file
from widen_arch_models import widen

from hybrimoe.gguf_model import inspect

pytestmark = pytest.mark.slow

N_EXPERTS = 8
PREFILL = [3, 7, 20]


def check(
    plain: Side, hybrid: Side, path: Path, n_slots: int, n_experts: int, *, evictions: bool | None = None
) -> None:
    got, difference = ask_both(plain, hybrid, path, settings_of(expert_cache=n_slots), prefill=PREFILL)
    assert difference.nmse <= 1e-7, difference
    check_used(got, evictions=n_slots < n_experts if evictions is None else evictions)
    assert tuple(got.layers) == inspect(path).require_moe().moe_layer_indices
    if n_slots == n_experts:
        assert total(got, "n_misses") == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_as_llama_cpp_writes_it(plain: Side, hybrid: Side, architecture_models: Path, arch: str) -> None:
    """Two experts, both used by every token, so that none may go: one slot, and a slot for each."""
    path = model_file(architecture_models, arch)
    for n_slots in (1, 2):
        check(plain, hybrid, path, n_slots, 2, evictions=False)


@pytest.mark.parametrize(("top_k", "kind"), [(1, "Q8_0"), (2, None), (3, "Q4_0")])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_widened(
    plain: Side, hybrid: Side, architecture_models: Path, tmp_path: Path, arch: str, top_k: int, kind: str | None
) -> None:
    """Slots for one expert, for a token's, for half of them, for all."""
    source = model_file(architecture_models, arch)
    path = widen(source, tmp_path / f"{arch}.gguf", n_experts=N_EXPERTS, top_k=top_k, type_name=kind)
    for n_slots in sorted({1, top_k, N_EXPERTS // 2, N_EXPERTS}):
        # Top-1 routers of random weights may be content with the experts that happen to be cached.
        check(plain, hybrid, path, n_slots, N_EXPERTS, evictions=n_slots < N_EXPERTS and top_k > 1)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_two_accelerators_with_own_kernels(
    plain: Side, hybrid: Side, architecture_models: Path, tmp_path: Path, arch: str
) -> None:
    """In F32 only the order of sums differs between our kernels and ggml's, which the accelerators use."""
    source = model_file(architecture_models, arch)
    path = widen(source, tmp_path / f"{arch}.gguf", n_experts=N_EXPERTS, top_k=2)
    settings = settings_of(cpu_kernels="auto", devices=["CPU", "CPU"], expert_cache=4, prefetch="impact")
    got, difference = ask_both(plain, hybrid, path, settings, prefill=PREFILL)
    assert difference.nmse <= 1e-5, difference
    check_used(got)
