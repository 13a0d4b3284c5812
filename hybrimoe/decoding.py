"""Feeding given tokens to a loaded model, timing `llama_decode` and the wait for its result and nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import HybrimoeError

if TYPE_CHECKING:
    from hybrimoe.engine import Engine

__all__ = ["Decoder"]


class Decoder:
    """Runs tokens that are known beforehand, as benchmarks do. The engine's own idea of its context is not kept up."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._n_batch = engine.options.n_batch

    def clear(self) -> None:
        """Forgets all tokens."""
        import llama_cpp

        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._engine.ctx), False)

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a text, without one that marks its beginning."""
        return list(self._engine.tokenize(text.encode(), add_bos=False, special=False))

    def with_beginning(self, tokens: Sequence[int]) -> list[int]:
        """The tokens, the first one replaced by the one that marks a beginning where the model wants that."""
        bos = int(self._engine.token_bos())
        if tokens and bos >= 0 and bool(self._engine._model.add_bos_token()):
            return [bos, *tokens[1:]]
        return list(tokens)

    def prompt(self, tokens: Sequence[int]) -> int:
        """All tokens in batches of `n_batch`; one wait at the end, as llama-bench does. Returns nanoseconds."""
        import llama_cpp

        arrays = []
        for begin in range(0, len(tokens), self._n_batch):
            part = tokens[begin : begin + self._n_batch]
            arrays.append((llama_cpp.llama_token * len(part))(*part))
        return sum(self._decode(array, wait=i == len(arrays) - 1) for i, array in enumerate(arrays))

    def one_by_one(self, tokens: Sequence[int]) -> Iterator[int]:
        """Each token as a step of its own. Yields nanoseconds."""
        import llama_cpp

        arrays = [(llama_cpp.llama_token * 1)(token) for token in tokens]
        for array in arrays:
            yield self._decode(array, wait=True)

    def _decode(self, array: Any, *, wait: bool) -> int:
        import llama_cpp

        context = self._engine.ctx
        batch = llama_cpp.llama_batch_get_one(array, len(array))
        start = time.perf_counter_ns()
        status = llama_cpp.llama_decode(context, batch)
        if wait:
            llama_cpp.llama_synchronize(context)
        passed = time.perf_counter_ns() - start
        if self._engine.abort_flag.is_set():
            raise KeyboardInterrupt
        if status != 0:
            from hybrimoe.llama_log import llama_log

            reason = llama_log().reason()
            raise HybrimoeError(f"llama_decode returned {status}{': ' if reason else ''}{reason}", "run again with -v")
        return passed
