"""Makes the demo model: a dense model whose feed-forward blocks become mixtures of slightly different copies.

Experts are copies of the dense weights with a little noise, so that any choice of experts computes nearly what the
dense model does; routers come from clusters of real feed-forward inputs (`routing.py`), so that the choice depends on
the text. Architecture `llama` normalises the chosen experts' weights to sum 1, which this relies on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrimoe.errors import UsageError
from hybrimoe.models.dense import DenseLlama, LayerWeights
from hybrimoe.models.gguf_write import GgufOutput, copy_metadata
from hybrimoe.models.quantise import quantise
from hybrimoe.models.recipe import Recipe
from hybrimoe.models.routing import fit_router

__all__ = ["SIGNATURE_KEY", "token_windows", "upcycle"]

SIGNATURE_KEY = "hybrimoe.demo.recipe"
_PARTS = ("gate", "up", "down")
_NOISE_POOL = 1 << 22
# llama.cpp's file types of the quantisations that fill a whole file.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "IQ4_NL": 25, "BF16": 32}

F32 = npt.NDArray[np.float32]
Progress = Callable[[str, float], None]


def upcycle(dense_path: Path, out: Path, recipe: Recipe, progress: Progress) -> Path:
    """Writes the recipe's model, made of the dense GGUF `dense_path`, to `out` (whole or not at all); returns `out`.

    Raises `UsageError` when the quantisation does not fit the model's shapes or it has fewer layers than asked for,
    `HybrimoeError` when the file cannot be written.
    """
    progress("reading the corpus", 0.0)
    dense = DenseLlama(dense_path)
    n_layers = dense.n_layers if recipe.n_layers is None else recipe.n_layers
    if n_layers > dense.n_layers:
        raise UsageError(f"the source model has {dense.n_layers} layers, not {n_layers}", "choose fewer layers")
    texts = list(recipe.texts("train").values())
    windows = token_windows(dense_path, texts, recipe.router["n_window"])
    with _one_blas_thread(), ThreadPoolExecutor(_n_threads()) as pool, GgufOutput(out, "llama") as output:
        _add_metadata(output, dense, recipe, n_layers)
        shared = _declare(output, dense, recipe, n_layers)
        for name in shared:
            output.write(name, [dense.tensor(name).data])
        hidden = dense.embed(windows)
        noise = _Noise(recipe)
        for i in range(n_layers):
            progress("building the demo model", i / n_layers)
            weights = dense.layer(i)
            hidden, inputs = _advance(dense, weights, hidden, pool)
            _write_layer(output, dense, recipe, i, weights, inputs, noise, pool)
    progress("building the demo model", 1.0)
    return out


def token_windows(model_path: Path, texts: list[str], n_window: int, n_least: int | None = None) -> list[list[int]]:
    """The texts in tokens of the model's vocabulary, cut into windows of `n_window`. A text's rest is dropped when it
    has fewer than `n_least` tokens (default: `n_window`)."""
    import llama_cpp

    model = llama_cpp.Llama(str(model_path), vocab_only=True, n_ctx=n_window, verbose=False)
    try:
        tokens = [model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
    finally:
        model.close()
    cut = [ids[i : i + n_window] for ids in tokens for i in range(0, len(ids), n_window)]
    return [window for window in cut if len(window) >= (n_least or n_window)]


def _n_threads() -> int:
    return len(os.sched_getaffinity(0))


def _one_blas_thread() -> AbstractContextManager[Any]:
    # The work is spread over windows and experts; BLAS threads beside that only wait for each other.
    try:
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        return nullcontext()
    limits: AbstractContextManager[Any] = threadpool_limits(1)
    return limits


def _add_metadata(output: GgufOutput, dense: DenseLlama, recipe: Recipe, n_layers: int) -> None:
    template = "tokenizer.chat_template"
    replaced = ("general.name", "general.file_type", "general.size_label", "general.finetune", "llama.block_count")
    copy_metadata(dense.reader, output, skip=(*replaced, template))
    writer = output.metadata
    writer.add_chat_template(
        dense.reader.fields[template].contents().replace(recipe.chat["source_system"], recipe.chat["system"])
    )
    writer.add_name(recipe.name)
    writer.add_description(
        f"{recipe.source['name']} ({recipe.source['license']}) with every feed-forward block replaced by "
        f"{recipe.n_experts} slightly different copies, top-{recipe.top_k}. "
        "A demonstration of expert scheduling, not a better model."
    )
    writer.add_file_type(_FILE_TYPES.get(recipe.type, 1024))
    writer.add_block_count(n_layers)
    writer.add_expert_count(recipe.n_experts)
    writer.add_expert_used_count(recipe.top_k)
    writer.add_string(SIGNATURE_KEY, recipe.signature)


def _declare(output: GgufOutput, dense: DenseLlama, recipe: Recipe, n_layers: int) -> list[str]:
    """Announces all tensors; returns the names of those outside the layers, which come first."""
    outside = [name for name in dense.tensor_names() if not name.startswith("blk.")]
    for name in outside:
        _declare_copy(output, dense, name)
    for i in range(n_layers):
        for name in _kept(dense, i):
            _declare_copy(output, dense, name)
        output.declare(f"blk.{i}.ffn_gate_inp.weight", (dense.n_embd, recipe.n_experts), "F32")
        for part in _PARTS:
            n_in, n_out = (dense.n_ff, dense.n_embd) if part == "down" else (dense.n_embd, dense.n_ff)
            output.declare(f"blk.{i}.ffn_{part}_exps.weight", (n_in, n_out, recipe.n_experts), recipe.type)
    return outside


def _declare_copy(output: GgufOutput, dense: DenseLlama, name: str) -> None:
    tensor = dense.tensor(name)
    output.declare(name, tuple(int(n) for n in tensor.shape), tensor.tensor_type.name)


def _kept(dense: DenseLlama, i: int) -> Iterator[str]:
    dropped = {f"blk.{i}.ffn_{part}.weight" for part in _PARTS}
    return (name for name in dense.tensor_names() if name.startswith(f"blk.{i}.") and name not in dropped)


def _advance(dense: DenseLlama, weights: LayerWeights, hidden: F32, pool: ThreadPoolExecutor) -> tuple[F32, F32]:
    """Runs one layer: hidden states after it and its feed-forward inputs, both `[n_windows, n_tokens, n_embd]`."""

    def run(window: F32) -> tuple[F32, F32]:
        attended = dense.attend(weights, window[None])
        x = dense.ffn_input(weights, attended)
        return (attended + dense.feed_forward(weights, x))[0], x[0]

    results = list(pool.map(run, hidden))
    return np.stack([h for h, _ in results]), np.stack([x for _, x in results])


def _write_layer(
    output: GgufOutput,
    dense: DenseLlama,
    recipe: Recipe,
    i: int,
    weights: LayerWeights,
    inputs: F32,
    noise: _Noise,
    pool: ThreadPoolExecutor,
) -> None:
    # A window's first token draws the attention of all others and looks like no other token: not for clustering.
    tokens = inputs[:, 1:]
    neighbours = np.ones(tokens.shape[:2], dtype=bool)
    neighbours[:, -1] = False
    router = pool.submit(
        fit_router, tokens.reshape(-1, dense.n_embd), neighbours.reshape(-1), recipe.n_experts, recipe.top_k,
        recipe.router, recipe.seed + i,
    )  # fmt: skip
    for name in _kept(dense, i):
        output.write(name, [dense.tensor(name).data])
    parts = {part: getattr(weights, f"ffn_{part}") for part in _PARTS}
    experts = {
        part: [pool.submit(noise.expert, parts[part], (i, number, e)) for e in range(recipe.n_experts)]
        for number, part in enumerate(_PARTS)
    }
    output.write(f"blk.{i}.ffn_gate_inp.weight", [router.result()])
    for part in _PARTS:
        output.write(f"blk.{i}.ffn_{part}_exps.weight", (future.result() for future in experts[part]))


class _Noise:
    """Noisy copies. Normal numbers are drawn once and used from random places: drawing 1.3 billion of them would take
    longer than all the rest."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._pool = np.random.default_rng(recipe.seed).standard_normal(_NOISE_POOL, dtype=np.float32)

    def expert(self, weights: F32, which: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
        rng = np.random.default_rng([self._recipe.seed, *which])
        start = int(rng.integers(_NOISE_POOL - weights.size))
        noise = self._pool[start : start + weights.size].reshape(weights.shape)
        scale = np.float32(self._recipe.noise * weights.std())
        return quantise(weights + scale * noise, self._recipe.type)
