"""A dense model of llama.cpp's architecture `llama`, run in numpy layer by layer.

For reading the inputs of every feed-forward block while a model is taken apart: each layer's weights are dequantised
once, used for this, and handed on. The arithmetic is llama.cpp's (`src/models/llama.cpp`), in f32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrimoe.errors import ModelError

__all__ = ["DenseLlama", "LayerWeights"]

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LayerWeights:
    """One layer, dequantised; matrices are `[n_out, n_in]`."""

    attn_norm: F32
    attn_q: F32
    attn_k: F32
    attn_v: F32
    attn_output: F32
    ffn_norm: F32
    ffn_gate: F32
    ffn_up: F32
    ffn_down: F32


class DenseLlama:
    """A model file opened for reading. `hidden` advances one layer per `ffn_input` and `advance`."""

    def __init__(self, path: Path) -> None:
        import gguf

        self._gguf = gguf
        self.reader: Any = gguf.GGUFReader(path)
        self._tensors = {t.name: t for t in self.reader.tensors}
        if self._value("general.architecture") != "llama" or "blk.0.ffn_gate.weight" not in self._tensors:
            raise ModelError(f"'{path.name}' is no dense model of architecture llama", "see models/demo/recipe.toml")
        self.n_layers = int(self._value("llama.block_count"))
        self.n_embd = int(self._value("llama.embedding_length"))
        self.n_ff = int(self._value("llama.feed_forward_length"))
        self._n_head = int(self._value("llama.attention.head_count"))
        self._n_head_kv = int(self._value("llama.attention.head_count_kv"))
        self._eps = float(self._value("llama.attention.layer_norm_rms_epsilon"))
        self._rope_base = float(self._value("llama.rope.freq_base"))
        self._head_dim = self.n_embd // self._n_head

    def _value(self, key: str) -> Any:
        return self.reader.fields[key].contents()

    def tensor(self, name: str) -> Any:
        """The raw tensor of gguf's reader."""
        return self._tensors[name]

    def tensor_names(self) -> list[str]:
        return list(self._tensors)

    def layer(self, i: int) -> LayerWeights:
        names = LayerWeights.__dataclass_fields__
        return LayerWeights(**{name: self._dequantised(f"blk.{i}.{name}.weight") for name in names})

    def _dequantised(self, name: str) -> F32:
        tensor = self._tensors[name]
        values: F32 = self._gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return values

    def embed(self, windows: Sequence[Sequence[int]]) -> F32:
        """Hidden states `[n_windows, n_tokens, n_embd]` before the first layer, for windows of one length."""
        tensor = self._tensors["token_embd.weight"]
        ids = np.asarray(windows)
        rows = tensor.data[ids.reshape(-1)]
        values: F32 = self._gguf.quants.dequantize(rows, tensor.tensor_type)
        return values.reshape(*ids.shape, self.n_embd)

    def attend(self, w: LayerWeights, hidden: F32) -> F32:
        """`hidden` after the layer's attention block, the residual added."""
        n_windows, n_tokens, _ = hidden.shape
        x = self._norm(hidden, w.attn_norm)
        q = self._heads(x @ w.attn_q.T, self._n_head)
        k = self._heads(x @ w.attn_k.T, self._n_head_kv)
        v = self._heads(x @ w.attn_v.T, self._n_head_kv)
        q, k = self._rotate(q), self._rotate(k)
        n_group = self._n_head // self._n_head_kv
        k, v = np.repeat(k, n_group, axis=1), np.repeat(v, n_group, axis=1)
        scores = q @ k.transpose(0, 1, 3, 2) * np.float32(self._head_dim**-0.5)
        scores += np.triu(np.full((n_tokens, n_tokens), -np.inf, dtype=np.float32), 1)
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed = (scores @ v).transpose(0, 2, 1, 3).reshape(n_windows, n_tokens, -1)
        return np.asarray(hidden + mixed @ w.attn_output.T, dtype=np.float32)

    def ffn_input(self, w: LayerWeights, hidden: F32) -> F32:
        """What the feed-forward block, or a router in its place, is given."""
        return self._norm(hidden, w.ffn_norm)

    def feed_forward(self, w: LayerWeights, x: F32) -> F32:
        """The feed-forward block's output, to be added to the hidden state."""
        gate = x @ w.ffn_gate.T
        gate /= 1 + np.exp(-gate)
        gate *= x @ w.ffn_up.T
        return np.asarray(gate @ w.ffn_down.T, dtype=np.float32)

    def _norm(self, x: F32, weight: F32) -> F32:
        scale = 1 / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(self._eps))
        return np.asarray(x * scale * weight, dtype=np.float32)

    def _heads(self, x: F32, n_head: int) -> F32:
        heads: F32 = x.reshape(*x.shape[:2], n_head, self._head_dim).transpose(0, 2, 1, 3)
        return heads

    def _rotate(self, x: F32) -> F32:
        # Architecture llama rotates neighbouring pairs (ggml's rope mode "normal").
        n_tokens = x.shape[2]
        frequencies = self._rope_base ** (-np.arange(0, self._head_dim, 2) / self._head_dim)
        angles = np.outer(np.arange(n_tokens), frequencies).astype(np.float32)
        cos, sin = np.cos(angles), np.sin(angles)
        rotated = np.empty_like(x)
        rotated[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
        rotated[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
        return rotated
