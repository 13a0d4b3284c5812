"""A live recording of the engine, replayed: the same decisions to the last one (algorithms.md target 16).

The engine runs with a CPU as accelerator and given costs; what the clock said decides, and is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybrimoe.engine import Engine, EngineOptions
from hybrimoe.errors import UsageError
from hybrimoe.expert_options import CacheSize, ExpertOptions
from hybrimoe.generation import Sampling
from hybrimoe.native.core import CoreError
from hybrimoe.trace.errors import TraceError
from hybrimoe.trace.events import EventType, Note, StepKind
from hybrimoe.trace.format import TraceFile, read
from hybrimoe.trace.parity import replay_recorded

# By the estimate a copy pays at once; in truth one takes 1.5 ms, so that the guard gives up one thing after the other.
LOSES: dict[str, Any] = {
    "costs": {"cpu_us": 50, "gpu_us": 5, "copy_us": 10},
    "faults": {"delay_copy_us": 1500, "fail_copy_every": 7},
}
PROMPTS = ["Hello there, how are you?", "x", "Why is the sky blue, and not green or red?"]

Record = Callable[..., tuple[TraceFile, Engine]]


@pytest.fixture
def record(tiny_model: Callable[..., Path], tmp_path: Path) -> Record:
    """`record(prompts, n_predict, **ExpertOptions)`: the recording, and the engine (closed)."""

    def run(
        prompts: list[str] = PROMPTS, n_predict: int = 30, model: str = "qwen3moe", **given: Any
    ) -> tuple[TraceFile, Engine]:
        engine_options = {n: given.pop(n) for n in ("warmup", "n_ubatch") if n in given}
        extra = given.pop("extra", None)
        path = tmp_path / "live.trace"
        given.setdefault("devices", ("CPU",))
        given.setdefault("cache", CacheSize(n_slots=4))
        given.setdefault("live_costs", False)
        experts = ExpertOptions(extra=extra, **given)
        options = EngineOptions(n_ctx=512, n_threads=1, experts=experts, trace=path, **engine_options)
        with Engine(tiny_model(model, "Q4_0"), options) as engine:
            for text in prompts:
                "".join(engine.answer(engine.text_prompt(text), Sampling(temp=0), n_predict))
        return read(path), engine

    return run


def count(trace: TraceFile, kind: int) -> int:
    assert trace.events is not None
    return int((trace.events["type"] == kind).sum())


def check_parity(trace: TraceFile) -> Any:
    parity = replay_recorded(trace)
    assert parity.equal, parity.different
    assert trace.counters is not None
    compared = set(parity.replay) & set(trace.counters)
    assert compared == set(parity.replay), "every counter of the replay is compared"
    assert parity.replay["n_events"] == count(trace, EventType.LAYER) > 0
    assert parity.measured_ms_per_token is not None and parity.measured_ms_per_token > 0
    return parity.replay


def test_evictions_prefetch_failing_copies_and_the_guard(record: Record) -> None:
    trace, _ = record(extra=LOSES)
    stats = check_parity(trace)
    assert stats["cache"]["n_evictions"] > 0 and stats["n_failed"] > 0 and stats["n_late"] > 0
    assert stats["n_transfers"][3] > 0, "it did prefetch"
    assert count(trace, EventType.LIMITS) > 0 and count(trace, EventType.PROMPT) > 0
    assert count(trace, EventType.FAIL) == stats["n_failed"]
    assert count(trace, Note.TRANSFER) == sum(stats["n_transfers"])


def test_a_guard_that_lays_whole_layers_out_anew(record: Record) -> None:
    """At the guard's last level caches are resized and filled."""
    impossible = {**LOSES, "costs": {"cpu_us": 0.02, "gpu_us": 0.005, "copy_us": 0.01}}
    trace, _ = record(n_predict=60, cache=CacheSize(n_slots=8), extra=impossible)
    # There and, since nothing helps, back to the level that lost least.
    assert count(trace, EventType.RESIZE) in (2, 4)
    assert count(trace, EventType.LOAD) > 2 * 8, "more loads than at the start"
    check_parity(trace)


def test_memory_that_becomes_scarce(record: Record) -> None:
    """A cache that shrinks for lack of memory and grows again."""
    faults = {"free_bytes": 3 << 20, "scarce_from": 1, "scarce_until": 2, "scarce_bytes": 100_000}
    trace, engine = record(
        n_predict=70, cache=CacheSize(), guard=False, fit_margin_bytes=1 << 20,
        extra={"costs": {"cpu_us": 1000, "gpu_us": 1, "copy_us": 10}, "faults": faults, "max_batch_tokens": 16},
    )  # fmt: skip
    if not count(trace, EventType.LAYER):
        pytest.fail(f"nothing was planned: {engine.recorder and engine.recorder.failure}")
    assert count(trace, EventType.RESIZE) > 0
    check_parity(trace)


def test_costs_that_follow_the_work(record: Record) -> None:
    """Costs measured at the start, and what live timings make of them."""
    trace, _ = record(live_costs=True, guard=False, extra={"faults": {"delay_copy_us": 700}}, n_predict=60)
    assert count(trace, EventType.COSTS) == len(trace.costs) > 0
    check_parity(trace)


@pytest.mark.parametrize("policy", ["lru", "lfru", "ema", "arc"])
def test_policies_and_two_accelerators(record: Record, policy: str) -> None:
    trace, _ = record(
        PROMPTS[:2], 12, devices=("CPU", "CPU"), cache_policy=policy, prefetch="path", admission="second-use",
        schedule="hybrimoe", guard=False, extra={"costs": LOSES["costs"]},
    )  # fmt: skip
    assert trace.run is not None and trace.run["n_slots"] == [[2, 2], [2, 2]]
    check_parity(trace)


def test_routing_of_the_answers(record: Record) -> None:
    """Tokens, prompts and phases; the warm-up moved decisions, but is no token."""
    trace, engine = record(extra=LOSES)
    n_answered = 30 * len(PROMPTS)
    lengths = [len(engine_tokens) for engine_tokens in np.split(trace.experts, trace.prompt_offsets[1:-1])]
    assert trace.n_prompts == len(PROMPTS) and sum(lengths) == trace.n_tokens
    assert trace.is_decode is not None and trace.scores is not None and trace.weights is not None
    assert engine.recorder is not None and engine.recorder.n_tokens == trace.n_tokens
    # The last token of an answer is not evaluated; the second prompt may be one token.
    assert n_answered - len(PROMPTS) <= trace.is_decode.sum() <= n_answered
    assert trace.events is not None
    steps = trace.events[trace.events["type"] == Note.STEP]
    assert (steps["a"] == StepKind.WARM_UP).sum() == 2
    # Chosen experts are those with the best scores; weights are theirs.
    decoded = np.flatnonzero(trace.is_decode)[0]
    for layer in range(trace.model.n_layers):
        best = np.argsort(-trace.scores[decoded, layer])[: trace.model.top_k]
        assert set(best) == set(trace.experts[decoded, layer])


def test_without_an_accelerator(record: Record) -> None:
    """Routing is recorded all the same, and a run with accelerators chooses the same experts."""
    trace, _ = record(devices=(), guard=False)
    assert trace.run is None and trace.counters is None and trace.complete
    assert count(trace, EventType.LAYER) == 0 and count(trace, Note.ROUTED) > 0
    assert trace.scores is not None and trace.n_prompts == len(PROMPTS)
    with pytest.raises(UsageError, match="no live recording"):
        replay_recorded(trace)


def test_without_warmup(record: Record) -> None:
    """The first prompt's step learns the layers: routed, not planned."""
    trace, _ = record(PROMPTS[:1], 8, warmup=False, guard=False, extra={"costs": LOSES["costs"]})
    assert count(trace, Note.ROUTED) == trace.model.n_layers
    assert (trace.experts[-1] >= 0).all() and (trace.experts[0, 0] >= 0).all()
    check_parity(trace)


def test_forged_events_do_not_fit(record: Record) -> None:
    trace, _ = record(PROMPTS[:1], 20, extra={"costs": LOSES["costs"]})
    check_parity(trace)
    assert trace.events is not None
    copies = trace.events["type"] == EventType.COMPLETE
    trace.events["id"][np.flatnonzero(copies)[0]] = 10_000
    with pytest.raises(CoreError, match="not in flight"):
        replay_recorded(trace)


def test_a_ring_that_is_too_small(record: Record) -> None:
    """Whole steps are dropped and counted; their routing is missing, and the replay says so."""
    import hybrimoe.engine as module

    given = module.ring_bytes
    module.ring_bytes = lambda model, n: 6000  # type: ignore[assignment]
    try:
        trace, engine = record(extra={"costs": LOSES["costs"]})
    finally:
        module.ring_bytes = given
    assert engine.recorder is not None and engine.recorder.n_dropped > 0
    assert trace.n_tokens == engine.recorder.n_tokens
    with pytest.raises(TraceError, match=r"lacks \d+ steps"):
        replay_recorded(trace)


def test_a_full_disk(tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recording ends with one message; the answer does not."""
    said: list[str] = []
    options = EngineOptions(n_ctx=256, n_threads=1, trace=Path("/dev/full"), experts=ExpertOptions(devices=()))
    with Engine(tiny_model("qwen3moe", "Q4_0"), options, on_trace_failure=said.append) as engine:
        answer = engine.answer(engine.text_prompt("Hello"), Sampling(temp=0), 8)
        "".join(answer)
        assert answer.tokens
    assert len(said) == 1 and "the disk is full" in said[0]
    assert engine.recorder is not None and engine.recorder.failure == said[0]


def test_files_that_exist_are_kept(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "old.trace"
    path.write_text("precious")
    with pytest.raises(UsageError, match="exists already"):
        Engine(tiny_model("qwen3moe", "Q4_0"), EngineOptions(n_ctx=256, trace=path))
    with pytest.raises(UsageError, match="is a folder"):
        Engine(tiny_model("qwen3moe", "Q4_0"), EngineOptions(n_ctx=256, trace=tmp_path))
    with pytest.raises(UsageError, match="records the plug-in"):
        Engine(tiny_model("qwen3moe", "Q4_0"), EngineOptions(n_ctx=256, trace=tmp_path / "new", plugin=False))
    assert path.read_text() == "precious" and not (tmp_path / "new").exists()


def test_recording_changes_nothing_that_is_computed(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    texts = []
    for trace in (None, tmp_path / "a.trace"):
        options = EngineOptions(n_ctx=256, n_threads=1, trace=trace, experts=ExpertOptions(devices=()))
        with Engine(tiny_model("mixtral", "Q4_0"), options) as engine:
            texts.append("".join(engine.answer(engine.text_prompt("Hello"), Sampling(temp=0), 16)))
            # Of this instance alone: the next one records nothing.
            assert engine.plugin is not None
    assert texts[0] == texts[1]
    with Engine(tiny_model("mixtral", "Q4_0"), EngineOptions(n_ctx=256, n_threads=1)) as engine:
        assert engine.plugin is not None
        assert engine.plugin.trace_ring(engine.plugin_instance).read() == []
        assert engine.recorder is None
