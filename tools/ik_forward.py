"""Forward passes through ik_llama.cpp, for comparison: the part of llama_forward's interface that bench_cpu.py uses.

Runs in the interpreter that has the package ik-llama-cpp-python. Its C interface resembles llama.cpp's, but its
structures differ, so it is reached through that package's own declarations.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any


class IkModel:
    """A model in memory. `repack` is ik_llama.cpp's `-rtr`: weights are rearranged while they are loaded."""

    def __init__(self, path: Path | str, *, plugin: bool, repack: bool) -> None:
        from ik_llama_cpp import _ctypes_api as ik

        assert not plugin
        self._ik = ik
        ik.llama_backend_init()
        params = ik.llama_model_default_params()
        params.n_gpu_layers = 0
        params.repack_tensors = repack
        params.use_mmap = not repack
        self.handle = ik.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise SystemExit(f"ik_llama.cpp cannot load {path}")
        self.vocabulary = ik.llama_model_get_vocab(self.handle)
        self.n_vocab = int(ik.llama_vocab_n_tokens(self.vocabulary))

    def tokenize(self, text: str) -> list[int]:
        data = text.encode()
        tokens = (self._ik.llama_token * (len(data) + 8))()
        n = self._ik.llama_tokenize(self.vocabulary, data, len(data), tokens, len(tokens), True, True)
        return list(tokens[:n])

    def __enter__(self) -> IkModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ik.llama_free_model(self.handle)


class IkContext:
    """A context of `model`, everything else as ik_llama.cpp's defaults have it."""

    def __init__(self, model: IkModel, *, n_ctx: int, n_batch: int, n_threads: int) -> None:
        self._ik = ik = model._ik
        params = ik.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = n_batch
        params.n_threads = params.n_threads_batch = n_threads
        self.handle = ik.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise SystemExit("ik_llama.cpp cannot make a context")
        self._batch = ik.llama_batch_init(n_batch, 0, 1)

    def compute(self, tokens: Sequence[int], position: int, *, last_only: bool) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), position + i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = not last_only or i == len(tokens) - 1
        status = self._ik.llama_decode(self.handle, batch)
        if status != 0:
            raise SystemExit(f"ik_llama.cpp's llama_decode returned {status}")

    def synchronize(self) -> None:
        self._ik.llama_get_logits_ith(self.handle, -1)  # waits for them

    def clear(self) -> None:
        self._ik.llama_kv_cache_clear(self.handle)

    def counters(self) -> list[Any]:
        return []

    def reset_counters(self) -> None:
        pass

    def __enter__(self) -> IkContext:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ik.llama_batch_free(self._batch)
        self._ik.llama_free(self.handle)
