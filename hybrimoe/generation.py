"""One answer: how tokens are drawn, the text as it arrives, and how long it took."""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import UsageError
from hybrimoe.interrupt import abort_on_interrupt

if TYPE_CHECKING:
    from hybrimoe.engine import Engine

# llama.h: LLAMA_DEFAULT_SEED, which means a new random seed for every answer.
RANDOM_SEED = 0xFFFFFFFF


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Defaults are llama.cpp's (`common_params_sampling` in common/common.h)."""

    temp: float = 0.80
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = RANDOM_SEED

    def to_llama(self) -> dict[str, Any]:
        """Arguments of `llama_cpp.Llama.generate`."""
        return {
            # llama.cpp draws greedily for every temperature of 0 and below.
            "temp": max(self.temp, 0.0),
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "typical_p": self.typical_p,
            "repeat_penalty": self.repeat_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }


@dataclass(frozen=True)
class Timings:
    """`n_prompt` counts tokens computed for the prompt; `n_cached` those still in the KV cache from before."""

    n_prompt: int = 0
    n_cached: int = 0
    n_generated: int = 0
    prompt_s: float = 0.0
    generation_s: float = 0.0

    @property
    def prompt_per_s(self) -> float | None:
        return self.n_prompt / self.prompt_s if self.n_prompt and self.prompt_s > 0 else None

    @property
    def generation_per_s(self) -> float | None:
        """Tokens a second after the first, which belongs to the prompt; None when there was no second one."""
        return (self.n_generated - 1) / self.generation_s if self.n_generated > 1 and self.generation_s > 0 else None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "prompt_per_s": self.prompt_per_s, "generation_per_s": self.generation_per_s}

    def footer(self) -> str:
        """`[ Prompt 512.3 t/s | Generation 24.1 t/s ]`; a speed that was not measured is '-'."""

        def speed(value: float | None) -> str:
            return "-" if value is None else f"{value:.1f} t/s"

        return f"[ Prompt {speed(self.prompt_per_s)} | Generation {speed(self.generation_per_s)} ]"


@dataclass
class Answer:
    """An answer while it is generated: iterate once to get its pieces; afterwards the other fields are complete.

    Pieces never split a character: bytes of an unfinished UTF-8 sequence wait for the next token. `finish_reason` is
    'stop' (end of turn), 'length' (`n_predict` reached), 'context' (no room left) or 'interrupted'. When iteration is
    left early (KeyboardInterrupt included) the reason is 'interrupted' and `text` holds what had arrived.
    """

    engine: Engine
    prompt: Sequence[int]
    sampling: Sampling
    n_predict: int = -1
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "interrupted"
    timings: Timings = field(default_factory=Timings)

    def __post_init__(self) -> None:
        n_ctx = self.engine.n_ctx()
        if not self.prompt:
            raise UsageError("the prompt is empty")
        if len(self.prompt) >= n_ctx:
            raise UsageError(
                f"the prompt has {len(self.prompt)} tokens, the context holds {n_ctx}",
                "shorten the prompt, or give a larger context with -c",
            )

    def __iter__(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        with abort_on_interrupt(self.engine.abort_flag):
            for data in self._pieces():
                if piece := decoder.decode(data):
                    self.text += piece
                    yield piece
        if piece := decoder.decode(b"", final=True):
            self.text += piece
            yield piece

    def _pieces(self) -> Iterator[bytes]:
        engine = self.engine
        limit = engine.n_ctx() - len(self.prompt)
        if 0 <= self.n_predict < limit:
            limit, limit_reason = self.n_predict, "length"
        else:
            limit_reason = "context"
        start = first = time.perf_counter()
        n_before, n_prompt = engine.n_evaluated, 0
        try:
            if limit == 0:
                self.finish_reason = limit_reason
                return
            for token in engine.tokens(self.prompt, self.sampling):
                now = time.perf_counter()
                if not self.tokens:
                    first, n_prompt = now, engine.n_evaluated - n_before
                self.tokens.append(token)
                n_cached = len(self.prompt) - n_prompt
                self.timings = Timings(n_prompt, n_cached, len(self.tokens), first - start, now - first)
                if engine.is_end(token):
                    self.finish_reason = "stop"
                    return
                if engine.abort_flag.is_set():
                    raise KeyboardInterrupt
                yield engine.token_bytes(token)
                if len(self.tokens) >= limit:
                    self.finish_reason = limit_reason
                    return
        finally:
            # A first step that was interrupted has not reached every layer.
            if self.tokens:
                engine.after_answer()
