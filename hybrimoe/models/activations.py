"""Runs a model through plain llama.cpp and reads intermediate values and probabilities, for measuring models."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrimoe.errors import HybrimoeError, ModelError

__all__ = ["ModelRun"]


class ModelRun:
    """A model loaded for reading, on the CPU and without the plug-in. A context manager.

    `capture` is the name of a per-layer value in llama.cpp's graph such as `ffn_norm` or `ffn_moe_logits`; its rows
    (f32, one a token) are collected by layer in `captured`, one flat array a run. Raises `ModelError` when llama.cpp
    cannot load the file.
    """

    def __init__(self, path: Path, *, n_window: int = 512, n_threads: int = 2, capture: str | None = None) -> None:
        import llama_cpp
        from llama_cpp import _ggml

        self._lib = llama_cpp
        self._ggml = _ggml.libggml
        self._ggml.ggml_get_name.restype = ctypes.c_char_p
        self._ggml.ggml_nelements.restype = ctypes.c_int64
        self._ggml.ggml_nbytes.restype = ctypes.c_size_t
        self._pattern = re.compile(rf"{capture}-(\d+)".encode()) if capture else None
        self.captured: dict[int, list[npt.NDArray[np.float32]]] = {}
        self._context: Any = None
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        # A second, repacked copy of the weights only pays off over longer runs.
        params.use_extra_bufts = False
        self._model: Any = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise ModelError(f"llama.cpp cannot load '{path}'", "build or download the file again")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.n_vocab = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = context.n_batch = context.n_ubatch = n_window
        context.n_threads = context.n_threads_batch = n_threads
        if capture:
            # Kept alive here: the context holds a bare function pointer.
            self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._on_tensor)
            context.cb_eval = self._callback
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        if not self._context:
            self.close()
            raise HybrimoeError(f"llama.cpp cannot run '{path}'", "free some memory and try again")

    def __enter__(self) -> ModelRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    def run(self, window: Sequence[int]) -> npt.NDArray[np.float32]:
        """Runs one sequence from its start; returns the logits `[n_tokens, n_vocab]`, valid until the next run."""
        lib = self._lib
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        batch = lib.llama_batch_init(len(window), 0, 1)
        try:
            batch.n_tokens = len(window)
            for i, token in enumerate(window):
                batch.token[i] = token
                batch.pos[i] = i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                # The last layer runs for output tokens only.
                batch.logits[i] = True
            status = lib.llama_decode(self._context, batch)
        finally:
            lib.llama_batch_free(batch)
        if status != 0:
            raise HybrimoeError(
                f"llama.cpp failed to run the model (status {status})", "free some memory and try again"
            )
        return np.ctypeslib.as_array(lib.llama_get_logits(self._context), (len(window), self.n_vocab))

    def log_probs(self, window: Sequence[int]) -> npt.NDArray[np.float64]:
        """Natural logarithm of the probability given to each token of the window but the first."""
        logits = self.run(window)
        top = logits.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64)) + top[:, 0]
        rows = np.arange(len(window) - 1)
        return np.asarray(logits[rows, list(window[1:])] - log_sum[:-1], dtype=np.float64)

    def _on_tensor(self, tensor: int, ask: bool, _: object) -> bool:
        assert self._pattern is not None
        pointer = ctypes.c_void_p(tensor)
        match = self._pattern.fullmatch(self._ggml.ggml_get_name(pointer) or b"")
        if ask:
            return match is not None
        if match:
            n_values = int(self._ggml.ggml_nelements(pointer))
            if self._ggml.ggml_nbytes(pointer) != 4 * n_values:
                raise HybrimoeError(f"'{match[0].decode()}' is no plain f32 value", "capture another value")
            values = np.empty(n_values, dtype=np.float32)
            self._ggml.ggml_backend_tensor_get(
                pointer, ctypes.c_void_p(values.ctypes.data), ctypes.c_size_t(0), ctypes.c_size_t(values.nbytes)
            )
            self.captured.setdefault(int(match[1]), []).append(values)
        return True
