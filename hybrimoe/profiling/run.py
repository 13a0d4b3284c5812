"""Runs texts through an engine that records, and gathers what the analysis needs beside the recording."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe.corpus import Text
from hybrimoe.errors import UsageError, from_os_error
from hybrimoe.files import read_bytes

if TYPE_CHECKING:
    from hybrimoe.decoding import Decoder
    from hybrimoe.engine import Engine

__all__ = ["COUNTS", "Facts", "TextRun", "read_texts", "run_texts"]

# Residency is looked at between steps, every so many tokens: often enough to see it move, seldom enough not to disturb.
_TOKENS_PER_SAMPLE = 8
COUNTS = (
    "n_experts_cpu",
    "n_experts_gpu",
    "n_hits",
    "n_misses",
    "n_late",
    "n_evictions",
    "n_copies",
    "n_prefetched",
    "h2d_bytes",
)
_STATS = ("n_prefetch_used", "prefetch_useful_bytes", "prefetch_late_bytes", "prefetch_wasted_bytes", "n_failed")


@dataclass
class TextRun:
    """One text: its tokens fed as a prompt, then as steps of one token. Nanoseconds are of the decode calls."""

    domain: str
    n_prompt: int
    prompt_ns: int
    decode_ns: list[int] = field(default_factory=list)


@dataclass
class Facts:
    """What is known of a run beside its recording.

    `counts[phase]` maps a layer (llama.cpp's index) to sums over the phase, 'prefill' or 'decode'. `residency` holds
    samples (decode token, per MoE layer the accelerator of each expert or -1). `stats` are differences over the run.
    """

    runs: list[TextRun] = field(default_factory=list)
    counts: dict[str, dict[int, dict[str, float]]] = field(default_factory=lambda: {"prefill": {}, "decode": {}})
    residency: list[tuple[int, list[list[int]]]] = field(default_factory=list)
    stats: dict[str, float] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    predictions: list[dict[str, float]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    verified: str = ""
    interrupted: bool = False


def read_texts(prompt_file: Path | None) -> list[Text]:
    """The built-in texts, or the one of a file. Raises UsageError and HybrimoeError."""
    if prompt_file is None:
        from hybrimoe.corpus import texts

        return texts()
    try:
        data = read_bytes(prompt_file)
    except IsADirectoryError:
        raise UsageError(f"--prompt-file: '{prompt_file}' is a folder", "give a text file") from None
    except OSError as error:
        raise from_os_error(error, f"read '{prompt_file}'", "give a text file with --prompt-file") from error
    text = data.decode("utf-8", "replace")
    if not text.strip():
        raise UsageError(f"--prompt-file: '{prompt_file}' holds no text", "give a text file")
    return [Text(prompt_file.name, text)]


def run_texts(
    engine: Engine,
    texts: Sequence[Text],
    n_prompt: int,
    n_decode: int,
    progress: Callable[[float], None],
) -> Facts:
    """Feeds each text: `n_prompt` tokens as a prompt, `n_decode` more one by one. A shorter text begins again.

    The tokens are the text's own, not sampled ones, so that two runs do the same work. Ctrl-C ends the run; what was
    done until then is kept.

    Raises:
        UsageError: the context is too small.
    """
    from hybrimoe.decoding import Decoder

    n_tokens = n_prompt + n_decode
    if n_tokens > engine.n_ctx():
        raise UsageError(
            f"{n_prompt} + {n_decode} tokens do not fit into a context of {engine.n_ctx()}",
            "use fewer with -p and -n, or a larger context with -c",
        )
    decoder = Decoder(engine)
    facts = Facts()
    before = _stats(engine)
    engine.reset_counters()
    try:
        for number, text in enumerate(texts):
            own = decoder.tokenize(text.text[: 64 * n_tokens])
            if not own:
                continue
            tokens = decoder.with_beginning((own * (n_tokens // len(own) + 1))[:n_tokens])
            run = TextRun(text.domain, n_prompt, 0)
            for share in _run_one(engine, decoder, run, tokens, facts):
                progress((number + share) / len(texts))
    except KeyboardInterrupt:
        facts.interrupted = True
    facts.stats = {name: value - before[name] for name, value in _stats(engine).items()}
    facts.state = engine.expert_state()
    facts.predictions = _predictions(engine)
    facts.events = [line for _, line in engine.expert_events()]
    facts.verified = engine.verify().message()
    return facts


def _run_one(engine: Engine, decoder: Decoder, run: TextRun, tokens: Sequence[int], facts: Facts) -> Iterator[float]:
    """Runs one text; yields the share that is done."""
    decoder.clear()
    if engine.recorder is not None:
        engine.recorder.begin_prompt()
    start = _counts(engine)
    n_before = sum(len(r.decode_ns) for r in facts.runs)
    run.prompt_ns = decoder.prompt(tokens[: run.n_prompt])
    facts.runs.append(run)
    after_prompt = _counts(engine)
    _add(facts.counts["prefill"], start, after_prompt)
    try:
        for i, ns in enumerate(decoder.one_by_one(tokens[run.n_prompt :])):
            run.decode_ns.append(ns)
            if i % _TOKENS_PER_SAMPLE == 0:
                _sample(engine, n_before + i, facts)
            yield (run.n_prompt + i + 1) / len(tokens)
    finally:
        _add(facts.counts["decode"], after_prompt, _counts(engine))


def _counts(engine: Engine) -> dict[int, dict[str, float]]:
    return {c.layer: {name: getattr(c, name) for name in COUNTS} for c in engine.counters()}


Counts = Mapping[int, Mapping[str, float]]


def _add(sums: dict[int, dict[str, float]], before: Counts, after: Counts) -> None:
    for layer, values in after.items():
        earlier = before.get(layer, {})
        entry = sums.setdefault(layer, dict.fromkeys(COUNTS, 0.0))
        for name, value in values.items():
            entry[name] += value - earlier.get(name, 0.0)


def _sample(engine: Engine, token: int, facts: Facts) -> None:
    plugin = engine.plugin
    if plugin is None:
        return
    on = plugin.residency(engine.plugin_instance)
    where = [on.get(layer, []) for layer in engine.info.moe_layer_indices]
    if any(device >= 0 for layer in where for device in layer):
        facts.residency.append((token, where))


def _stats(engine: Engine) -> dict[str, float]:
    stats = engine.expert_state().get("stats", {})
    return {name: float(stats.get(name, 0)) for name in _STATS}


def _predictions(engine: Engine) -> list[dict[str, float]]:
    from hybrimoe.predictions import predictions

    return [asdict(p) for p in predictions(engine)]
