"""The engine as the server uses it: it knows which request it works for, and stops between two tokens when asked to."""

from __future__ import annotations

import codecs
import ctypes
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np

from hybrimoe.engine import Engine
from hybrimoe.errors import HybrimoeError, UsageError
from hybrimoe.llama_log import llama_log

if TYPE_CHECKING:
    from hybrimoe.server.worker import Job

# llama.cpp's parser and its stacks recurse: larger ones would exhaust the thread's stack.
_MAX_GRAMMAR_CHARS, _MAX_GRAMMAR_DEPTH = 64 << 10, 200

__all__ = ["JobCancelledError", "ServerEngine"]


class JobCancelledError(Exception):
    """Nobody waits for the answer any more."""


class ServerEngine(Engine):
    """`job` is what the engine works for; only its worker's thread sets it. `on_event` is told in that thread what the
    dispatch decides while it answers."""

    job: Job | None = None
    on_event: Callable[[str], None] = staticmethod(lambda line: None)

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        generated = super().generate(tokens, *args, **kwargs)
        return generated if self.job is None else self._for_job(generated, self.job, len(tokens))

    def _for_job(self, generated: Any, job: Job, n_prompt: int) -> Any:
        usage = job.usage
        usage.n_prompt = n_prompt
        n_before = self.n_evaluated
        counters_before = self._expert_sums()
        start = first = time.perf_counter()
        try:
            for token in generated:
                now = time.perf_counter()
                self._tell_events()
                if not usage.n_generated:
                    first = now
                    usage.n_evaluated = self.n_evaluated - n_before
                usage.prompt_s, usage.generation_s = first - start, now - first
                if job.cancelled:
                    raise JobCancelledError
                if not self.is_end(token):
                    usage.n_generated += 1
                if job.cut:
                    # The package ends an answer at such a token as at any other; the worker changes the reason.
                    yield self._end_token()
                    return
                yield token
        except RuntimeError as error:
            # The logits of an aborted step do not exist: the next answer must compute them again.
            self._requires_eval = True
            if job.cancelled:
                raise JobCancelledError from None
            if job.cut and self.abort_flag.is_set():
                yield self._end_token()
                return
            reason = llama_log().reason() or str(error)
            raise HybrimoeError(f"llama.cpp failed while computing: {reason}") from error
        finally:
            generated.close()
            after = self._expert_sums()
            usage.experts = {name: after[name] - counters_before.get(name, 0) for name in after}
            self.after_answer()
            self._tell_events()

    def _tell_events(self) -> None:
        for line in self.new_expert_events():
            self.on_event(line)

    def detokenize(self, tokens: Sequence[int], prev_tokens: Any = None, special: bool = False) -> bytes:
        """As the engine's, with U+FFFD for bytes that begin no character; an unfinished one at the end stays.

        The package holds a stream back until its text can be decoded, which one wrong byte would prevent for good.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(super().detokenize(tokens, prev_tokens, special))
        return text.encode() + bytes(decoder.getstate()[0])

    def after_answer(self) -> None:
        if self.counters():
            super().after_answer()

    def _end_token(self) -> int:
        for token in (self.token_eos(), *range(self.n_vocab())):
            if token >= 0 and self.is_end(token):
                return int(token)
        raise JobCancelledError  # a model that knows no end

    def _expert_sums(self) -> dict[str, int]:
        """`timings.experts` since the start."""
        sums = {"hits": 0, "misses": 0, "cpu": 0, "gpu": 0, "h2d_bytes": 0}
        for c in self.counters():
            sums["hits"] += c.n_hits
            sums["misses"] += c.n_misses
            sums["cpu"] += c.n_experts_cpu
            sums["gpu"] += c.n_experts_gpu
            sums["h2d_bytes"] += c.h2d_bytes
        return sums

    def sample(self, *args: Any, idx: int | None = None, grammar: Any = None, **kwargs: Any) -> int:
        """The next token. Raises UsageError where a grammar leaves none: llama.cpp would end the process then."""
        if grammar is None:
            return int(super().sample(*args, idx=idx, grammar=grammar, **kwargs))
        n = self.n_vocab()
        at = -1 if idx is None else idx - self.n_tokens
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.ctx, at), (n,))
        candidates = (llama_cpp.llama_token_data * n)()
        view = np.frombuffer(candidates, np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")]))
        view["id"], view["logit"] = np.arange(n), logits
        array = llama_cpp.llama_token_data_array(data=candidates, size=n, selected=-1, sorted=False)
        llama_cpp.llama_sampler_apply(self._sampler.sampler, ctypes.byref(array))
        chosen = array.data[array.selected] if array.selected >= 0 else None
        if chosen is None or not math.isfinite(chosen.logit):
            raise UsageError("the grammar allows none of the model's tokens")
        llama_cpp.llama_sampler_accept(self._sampler.sampler, chosen.id)
        return int(chosen.id)

    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if (grammar := kwargs.get("grammar")) is not None:
            _check_size(grammar._grammar)
            # llama-cpp-python would put the null pointer of a grammar that llama.cpp refuses into the chain.
            sampler = llama_cpp.llama_sampler_init_grammar(
                self._model.vocab, grammar._grammar.encode(), grammar._root.encode()
            )
            if not sampler:
                raise UsageError(f"the grammar cannot be used: {llama_log().reason() or 'llama.cpp refuses it'}")
            llama_cpp.llama_sampler_free(sampler)
        return super()._init_sampler(*args, **kwargs)


def _check_size(grammar: str) -> None:
    """Raises UsageError for grammars that are too large or too deeply nested."""
    depth = deepest = 0
    for c in grammar:
        depth += (c == "(") - (c == ")" and depth > 0)
        deepest = max(deepest, depth)
    if len(grammar) > _MAX_GRAMMAR_CHARS or deepest > _MAX_GRAMMAR_DEPTH:
        raise UsageError("the grammar is too large or nested too deeply")
