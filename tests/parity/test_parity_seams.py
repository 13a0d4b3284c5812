"""Uses of a context that cut, repeat or interleave graphs: the plug-in's logits stay those of plain llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from checks import check_dispatch
from sides import Reply, Side, compare

from hybrimoe.gguf_model import inspect

ARCHS = ["mixtral", "deepseek2", "gpt-oss", "llama4"]


def ask_both(plain: Side, ours: Side, scenario: str, path: Path, **options: Any) -> tuple[Reply, Reply]:
    """Both sides' replies, which must have equal logits."""
    got = ours.ask(scenario, path, **options)
    reference = plain.ask(scenario, path, **options)
    difference = compare(reference, got)
    assert difference.is_equal, difference
    return reference, got


@pytest.mark.parametrize("watch", ["all", "third", "experts"])
@pytest.mark.parametrize("arch", ARCHS)
def test_evaluation_callback(plain: Side, ours: Side, tiny_model: Callable[..., Path], arch: str, watch: str) -> None:
    """The callback sees the same nodes with the same values, though each stop cuts a block into pieces."""
    path = tiny_model(arch, "Q4_0")
    reference, got = ask_both(plain, ours, "callback", path, watch=watch)
    experts = [name for name, _ in got.facts["seen"] if name.startswith("ffn_moe_")]
    assert len(experts) >= 3 * len(inspect(path).moe_layer_indices)
    assert got.facts["n_nodes_delegated"] > 0, "the callback cut no block"
    if watch != "third":  # the order of nodes in splits decides which every third one is
        assert got.facts["seen"] == reference.facts["seen"]


@pytest.mark.parametrize("arch", ARCHS)
def test_thread_counts(plain: Side, ours: Side, tiny_model: Callable[..., Path], arch: str) -> None:
    ask_both(plain, ours, "thread_counts", tiny_model(arch, "Q8_0"), counts=[1, 2, 1, 3])


@pytest.mark.parametrize("arch", ARCHS)
def test_warm_up(plain: Side, ours: Side, tiny_model: Callable[..., Path], arch: str) -> None:
    """llama_set_warmup routes each token to every expert; an ordinary step must not inherit anything from it."""
    path = tiny_model(arch, "Q4_0")
    _, got = ask_both(plain, ours, "warmup", path)
    n_experts = inspect(path).n_experts
    layers = got.facts["after_warmup"]["layers"]
    assert len(layers) == len(inspect(path).moe_layer_indices)
    assert all(layer["n_experts_cpu"] == n_experts for layer in layers)
    assert all(layer["n_blocks_delegated"] == 0 for layer in layers)


@pytest.mark.parametrize("arch", ARCHS)
def test_contexts_are_independent(plain: Side, ours: Side, tiny_model: Callable[..., Path], arch: str) -> None:
    path = tiny_model(arch, "F32")
    _, got = ask_both(plain, ours, "two_contexts", path)
    facts = got.facts
    instances = [facts[name]["instance"] for name in ("first", "second", "again0", "again1", "again2")]
    assert len(set(instances)) == len(instances) and min(instances) > 0

    def totals(name: str) -> set[tuple[int, int, int]]:
        layers = facts[name]["layers"]
        return {(layer["n_blocks"], layer["n_tokens"], layer["n_blocks_delegated"]) for layer in layers}

    # One prefill and three single tokens each; the second context's work does not show in the first's counters.
    assert totals("first") == {(4, 5 + 3, 0)}
    assert totals("second") == {(4, 33 + 3, 0)}
    assert totals("first_after") == {(5, 5 + 4, 0)}
    assert facts["freed"]["layers"] == []
    assert facts["first_reset"]["layers"] == []
    for again in range(3):
        assert totals(f"again{again}") == {(1, 9, 0)}


@pytest.mark.parametrize("arch", ["mixtral", "deepseek2"])
def test_sequences(plain: Side, ours: Side, tiny_model: Callable[..., Path], arch: str) -> None:
    ask_both(plain, ours, "sequences", tiny_model(arch, "Q4_0"))


@pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss"])
def test_split_file(plain: Side, ours: Side, tiny_model: Callable[..., Path], tmp_path: Path, arch: str) -> None:
    whole = tiny_model(arch, "Q4_0")
    parts = split_gguf(whole, tmp_path, n_tensors=7)
    assert len(parts) > 2
    options: dict[str, Any] = {"prefill": [1, 33]}
    reference, got = ask_both(plain, ours, "logits", parts[0], **options)
    check_dispatch(parts[0], got)
    assert compare(plain.ask("logits", whole, **options), reference).is_equal


def test_without_memory_map(plain: Side, ours: Side, tiny_model: Callable[..., Path]) -> None:
    """Experts that are read into a buffer of the plug-in instead of being mapped."""
    path = tiny_model("mixtral", "Q4_0")
    _, got = ask_both(plain, ours, "logits", path, prefill=[7], mmap=False)
    check_dispatch(path, got)


def split_gguf(source: Path, folder: Path, n_tensors: int) -> list[Path]:
    """Writes `source` anew as parts of at most `n_tensors` tensors; returns their paths in order."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(folder / "part.gguf", architecture, split_max_tensors=n_tensors)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub_type = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("part-*.gguf"))
