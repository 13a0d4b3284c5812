"""Recording through llama.cpp's evaluation callback, on small random models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hybrimoe.engine import EngineOptions
from hybrimoe.generation import Sampling
from hybrimoe.gguf_model import inspect
from hybrimoe.trace.errors import TraceError
from hybrimoe.trace.format import TraceFile, read
from hybrimoe.trace.identity import check_same, identity_of
from hybrimoe.trace.record import RecordOptions, built_in_prompts, record


def recorded(path: Path, output: Path, *, n_predict: int = 5, n_ubatch: int = 512, n_ctx: int = 128) -> TraceFile:
    options = EngineOptions(n_ctx=n_ctx, n_threads=1, n_ubatch=n_ubatch, warmup=False, plugin=False)
    texts = ["one two three four five six seven", "eight nine"]
    recording = record(
        inspect(path), output, texts, options, sampling=Sampling(temp=0), n_predict=n_predict, conversation=False,
        options=RecordOptions("f32"),
    )  # fmt: skip
    assert not recording.writer.failure and not recording.interrupted
    return read(output)


def test_a_recording_is_consistent(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    path = tiny_model("mixtral")
    trace = recorded(path, tmp_path / "a.trace")
    m, model = trace.model, inspect(path)
    assert trace.complete and m == identity_of(model)
    assert m.n_layers == len(model.moe_layers) and min(m.expert_macs) > 0
    assert trace.n_prompts == 2
    assert trace.is_decode is not None and trace.weights is not None and trace.scores is not None
    # The token that is drawn last is never computed.
    assert trace.is_decode.sum() == 2 * 4
    ran = trace.experts[:, :, 0] >= 0
    assert ran[:, :-1].all()
    # The last layer sees the last prompt token alone, and every decoded one.
    np.testing.assert_array_equal(ran[:, -1].sum(), 2 + trace.is_decode.sum())
    scores = trace.scores[ran]
    np.testing.assert_allclose(scores.sum(axis=1), 1.0, atol=1e-3)
    best = np.sort(np.argsort(-scores, axis=1)[:, : m.top_k], axis=1)
    np.testing.assert_array_equal(np.sort(trace.experts[ran], axis=1), best)
    np.testing.assert_allclose(trace.weights[ran].sum(axis=1), 1.0, atol=1e-3)
    check_same(trace, model)


def test_small_batches_route_alike(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """A prompt computed in pieces has the same routing, except where the last layer computed fewer tokens."""
    path = tiny_model("mixtral")
    whole = recorded(path, tmp_path / "a.trace")
    pieces = recorded(path, tmp_path / "b.trace", n_ubatch=4)
    assert whole.n_tokens == pieces.n_tokens
    agree = (whole.experts[:, :-1] == pieces.experts[:, :-1]).mean()
    assert agree > 0.98  # sums of other batch sizes may flip a near tie


def test_lookahead_at_no_distance_is_the_routers_own_score(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """Predictions come from the next layers' gates: with equal gates in all layers they would equal its scores."""
    trace = recorded(tiny_model("qwen3moe"), tmp_path / "a.trace")
    assert trace.lookahead is not None
    n = trace.model.n_layers
    np.testing.assert_allclose(
        trace.lookahead[:, : n - 1, 0].sum(axis=2)[trace.experts[:, : n - 1, 0] >= 0], 1, atol=1e-3
    )
    assert (trace.lookahead[:, n - 1] == 0).all()


def test_the_trace_of_another_model_is_refused(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    trace = recorded(tiny_model("mixtral"), tmp_path / "a.trace")
    with pytest.raises(TraceError, match=r"another (model|file)"):
        check_same(trace, inspect(tiny_model("qwen3moe")))


def test_built_in_prompts_are_whole_questions() -> None:
    prompts = built_in_prompts()
    assert len(prompts) >= 12 and all(len(p) > 30 for p in prompts)
