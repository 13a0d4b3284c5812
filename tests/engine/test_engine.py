"""Loading and answering through the plug-in."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from hybrimoe.engine import Engine, EngineOptions, Verification
from hybrimoe.errors import DoesNotFitError, HybrimoeError, ModelError, PluginError, UsageError
from hybrimoe.generation import Sampling
from hybrimoe.machine import host
from hybrimoe.placement import Placement

GREEDY = Sampling(temp=0)


def test_every_moe_layer_runs_in_the_plugin(open_engine: Any) -> None:
    engine = open_engine("qwen3moe")
    assert engine.verification == Verification(engine.info.moe_layer_indices, engine.info.moe_layer_indices, (), ()), (
        engine.verification
    )
    assert engine.verification.ok and engine.verification.message() == ""
    engine.verify(strict=True)


def test_counters_count_the_answer(open_engine: Any) -> None:
    engine = open_engine("mixtral")
    assert engine.counters() == [], "the warm-up must not count"
    prompt = engine.text_prompt("The quick brown fox jumps")
    answer = engine.answer(prompt, GREEDY, 4)
    "".join(answer)
    counters = {c.layer: c for c in engine.counters()}
    assert tuple(counters) == engine.info.moe_layer_indices
    # One step for the prompt, one for every token but the last, which is not evaluated.
    assert {c.n_steps for c in counters.values()} == {4}
    first = counters[engine.info.moe_layer_indices[0]]
    assert first.n_tokens == len(prompt) + 3
    totals = engine.stats()["totals"]
    assert totals["n_blocks"] == 4 * len(counters)
    assert (totals["n_blocks_delegated"], totals["n_experts_gpu"]) == (0, 0)
    engine.reset_counters()
    assert engine.counters() == []


def test_without_warmup_the_first_answer_verifies(open_engine: Any) -> None:
    engine = open_engine(warmup=False)
    assert engine.verification is None
    "".join(engine.answer(engine.text_prompt("a"), GREEDY, 1))
    assert engine.verification is not None and engine.verification.ok


def test_experts_that_a_user_moved_are_reported(open_engine: Any) -> None:
    """A rule of the user goes first; that its layer then runs elsewhere is said, not hidden."""
    engine = open_engine("mixtral", placement=Placement((r"blk\.0\.ffn_.*_exps=HybriMoE",)))
    assert engine.verification.ok
    # llama.cpp prefers our buffer type on the CPU, so only a made-up layer can be missing.
    engine.info = replace(
        engine.info, moe_layers=(*engine.info.moe_layers, replace(engine.info.moe_layers[0], index=9))
    )
    "".join(engine.answer(engine.text_prompt("a"), GREEDY, 1))
    report = engine.verify()
    assert report.missing == (9,)
    assert "layers 9" in report.message()
    with pytest.raises(PluginError, match="did not run in the plug-in"):
        engine.verify(strict=True)


def test_delegated_layers_have_their_own_message() -> None:
    report = Verification((0, 1, 2, 5), (0,), (1, 2, 5), ())
    assert not report.ok
    assert "3 of 4" in report.message() and "layers 1-2, 5" in report.message()


def test_streamed_pieces_make_the_text(open_engine: Any) -> None:
    engine = open_engine("mixtral")
    answer = engine.answer(engine.text_prompt("abc"), GREEDY, 24)
    pieces = list(answer)
    assert "".join(pieces) == answer.text
    assert answer.text.encode() == engine.detokenize(answer.tokens) or "\ufffd" in answer.text
    assert answer.finish_reason in ("length", "stop")
    assert answer.timings.n_generated == len(answer.tokens)


def test_characters_split_over_tokens_arrive_whole(open_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine()
    data = "né→🙂x".encode()
    parts = [data[i : i + 1] for i in range(len(data))]
    monkeypatch.setattr(engine, "tokens", lambda *_: iter(range(len(parts))))
    monkeypatch.setattr(engine, "token_bytes", lambda token: parts[token])
    monkeypatch.setattr(engine, "is_end", lambda _: False)
    answer = engine.answer([1], GREEDY, len(parts))
    assert list(answer) == ["n", "é", "→", "🙂", "x"]


def test_an_unfinished_character_at_the_end_is_replaced(open_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine()
    monkeypatch.setattr(engine, "tokens", lambda *_: iter(range(2)))
    monkeypatch.setattr(engine, "token_bytes", lambda token: [b"a", "🙂".encode()[:2]][token])
    monkeypatch.setattr(engine, "is_end", lambda _: False)
    assert list(engine.answer([1], GREEDY, 2)) == ["a", "\ufffd"]


def test_long_tokens_are_not_cut(open_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama_token_to_piece answers with the size needed when the buffer is too small."""
    engine = open_engine()
    text = b" " * 300

    def piece(_vocab: Any, _token: int, buffer: Any, size: int, _strip: int, _special: bool) -> int:
        if size < len(text):
            return -len(text)
        buffer[: len(text)] = text
        return len(text)

    monkeypatch.setattr(llama_cpp, "llama_token_to_piece", piece)
    assert engine.token_bytes(0) == text


def test_the_context_ends_an_answer(open_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine(n_ctx=256)
    monkeypatch.setattr(engine, "is_end", lambda _: False)
    prompt = engine.text_prompt("word " * 40)
    answer = engine.answer(prompt, GREEDY)
    "".join(answer)
    assert answer.finish_reason == "context"
    assert len(prompt) + len(answer.tokens) == engine.n_ctx()
    with pytest.raises(UsageError, match="the context holds 256"):
        engine.answer(list(range(1, 257)))
    with pytest.raises(UsageError, match="empty"):
        engine.answer([])


def test_a_context_that_is_no_multiple_of_256_is_rounded_up(open_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine(n_ctx=100)
    monkeypatch.setattr(engine, "is_end", lambda _: False)
    assert engine.n_ctx() == 256
    answer = engine.answer(engine.text_prompt("a"), GREEDY, 150)
    "".join(answer)
    assert len(answer.tokens) == 150


def test_a_repeated_prompt_is_not_computed_again(open_engine: Any) -> None:
    engine = open_engine()
    prompt = engine.text_prompt("one two three four five")
    first = engine.answer(prompt, GREEDY, 8)
    "".join(first)
    second = engine.answer(prompt, GREEDY, 8)
    "".join(second)
    assert second.tokens == first.tokens
    assert (first.timings.n_cached, first.timings.n_prompt) == (0, len(prompt))
    assert (second.timings.n_cached, second.timings.n_prompt) == (len(prompt) - 1, 1)


def test_a_model_with_recurrent_layers_computes_its_prompt_again(open_engine: Any) -> None:
    """Its state cannot be cut back to a common prefix; the timings must say so, and the text must not change."""
    engine = open_engine("nemotron-h")
    prompt = engine.text_prompt("one two three four five")
    answers = [engine.answer(prompt, GREEDY, 8) for _ in range(2)]
    for answer in answers:
        "".join(answer)
    assert answers[0].tokens == answers[1].tokens
    assert answers[1].timings.n_prompt == len(prompt)


def test_seeds_repeat_and_differ(open_engine: Any) -> None:
    engine = open_engine()
    prompt = engine.text_prompt("hello")

    def draw(seed: int) -> list[int]:
        answer = engine.answer(prompt, Sampling(temp=5, top_k=0, min_p=0, top_p=1, seed=seed), 16)
        "".join(answer)
        return list(answer.tokens)

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(0xFFFFFFFF) != draw(0xFFFFFFFF), "the default seed is random in llama.cpp"


def test_penalties_see_the_prompt(open_engine: Any) -> None:
    """As in llama.cpp; llama-cpp-python's sampler starts without the prompt's tokens."""
    engine = open_engine()
    prompt = engine.text_prompt("hello there")
    free = engine.answer(prompt, GREEDY, 1)
    "".join(free)
    wanted = free.tokens[0]
    longer = [*prompt[:-1], wanted, prompt[-1]]
    without = engine.answer(longer, GREEDY, 1)
    "".join(without)
    penalised = engine.answer([*longer[:-1], without.tokens[0], longer[-1]], replace(GREEDY, presence_penalty=1e6), 1)
    "".join(penalised)
    assert penalised.tokens[0] not in {*longer, without.tokens[0]}


def test_an_aborted_step_leaves_the_engine_usable(open_engine: Any) -> None:
    engine = open_engine()
    prompt = engine.text_prompt("The quick brown fox jumps over the lazy dog")
    expected = engine.answer(prompt, GREEDY, 6)
    "".join(expected)
    engine.abort_flag.set()
    answer = engine.answer([*prompt, *prompt], GREEDY, 6)
    with pytest.raises(KeyboardInterrupt):
        "".join(answer)
    assert answer.finish_reason == "interrupted"
    assert not engine.abort_flag.is_set()
    again = engine.answer(prompt, GREEDY, 6)
    "".join(again)
    assert again.tokens == expected.tokens


def test_an_interrupted_first_step_proves_nothing(open_engine: Any) -> None:
    engine = open_engine(warmup=False)
    engine.abort_flag.set()
    with pytest.raises(KeyboardInterrupt):
        "".join(engine.answer(engine.text_prompt("hello"), GREEDY, 2))
    assert engine.verification is None
    "".join(engine.answer(engine.text_prompt("hello"), GREEDY, 2))
    assert engine.verification.ok


def test_an_answer_can_be_left_early(open_engine: Any) -> None:
    engine = open_engine()
    answer = engine.answer(engine.text_prompt("hello"), GREEDY, 20)
    pieces: Any = iter(answer)
    with contextlib.closing(pieces):
        next(pieces)
    assert answer.finish_reason == "interrupted" and len(answer.tokens) >= 1


def test_progress_reaches_the_end(open_engine: Any) -> None:
    shares: list[float] = []
    open_engine(progress=shares.append)
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1.0)


def test_loading_can_be_interrupted(open_engine: Any) -> None:
    def stop(_share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_engine(progress=stop)


def test_the_seam_is_gone_after_loading(open_engine: Any) -> None:
    api = llama_cpp.llama_cpp
    names = ("llama_model_load_from_file", "llama_init_from_model", "llama_batch_init", "llama_model_default_params")
    before = [getattr(api, name) for name in names]
    open_engine()
    with pytest.raises(HybrimoeError):
        open_engine(n_ctx=10**6)
    assert [getattr(api, name) for name in names] == before


def test_other_threads_do_not_see_the_seam(open_engine: Any, tiny_model: Callable[..., Path]) -> None:
    """A plain Llama that another thread makes while an engine loads gets plain parameters."""
    seen: list[Any] = []

    def plain(_share: float) -> None:
        if not seen:
            seen.append(None)
            thread = threading.Thread(target=load_plain)
            thread.start()
            thread.join()

    def load_plain() -> None:
        model = llama_cpp.Llama(str(tiny_model("mixtral")), n_ctx=64, verbose=False)
        seen[0] = model.model_params.tensor_buft_overrides
        model.close()

    open_engine(progress=plain)
    assert seen == [None]


def test_close_may_be_called_twice(open_engine: Any) -> None:
    engine = open_engine()
    engine.close()
    engine.close()


def test_a_context_above_the_models_is_refused(open_engine: Any) -> None:
    with pytest.raises(UsageError, match="larger than the") as caught:
        open_engine(n_ctx=10**6)
    assert "-c" in caught.value.hint


def test_a_context_that_does_not_fit_is_refused(open_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "memory", lambda: host.Memory(1 << 30, (256 << 20) + 1, None))
    with pytest.raises(DoesNotFitError, match="KV cache") as caught:
        open_engine(n_ctx=0)
    assert caught.value.exit_code == 4 and caught.value.hint


def test_a_file_that_llama_cpp_refuses_names_the_reason(
    plugin: Any, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The header is sound, so the inspection passes; llama.cpp then misses a hyperparameter it needs."""
    data = tiny_model("mixtral").read_bytes()
    key = b"llama.attention.layer_norm_rms_epsilon"
    assert key in data
    path = tmp_path / "odd.gguf"
    path.write_bytes(data.replace(key, key[:-1] + b"X"))
    with pytest.raises(ModelError, match="layer_norm_rms_epsilon"):
        Engine(path, EngineOptions(n_ctx=256))


@pytest.mark.parametrize("text", ["ffn=Nowhere", "ffn", "=CPU", "ffn=", "(=CPU"])
def test_bad_placement_rules_are_usage_errors(open_engine: Any, text: str) -> None:
    with pytest.raises(UsageError):
        open_engine(placement=Placement((text,)))


def test_placement_order_is_llama_cpps_with_ours_last() -> None:
    placement = Placement(("a=CPU,b=X",), cpu_moe=True, n_cpu_moe=2)
    rules = placement.rules({"CPU": 1, "X": 2}, None)
    assert [buffer_type for _, buffer_type in rules] == [1, 2, 1, 1, 1]
    assert rules[0][0] == "a" and rules[3][0].startswith(r"blk\.0\.ffn")
    # In the plug-in, experts "on the CPU" run in its CPU kernels.
    assert [buffer_type for _, buffer_type in placement.rules({"CPU": 1, "X": 2}, 3)] == [1, 2, 3]
    assert Placement().rules({"CPU": 1}, None) == []


def test_our_pattern_takes_routers_and_experts_only() -> None:
    import re

    from hybrimoe.placement import MOE_PATTERN

    ours = ["ffn_gate_inp.weight", "ffn_up_exps.weight", "ffn_gate_up_exps.weight", "ffn_down_exps.bias"]
    others = ["ffn_gate_inp_shexp.weight", "ffn_up_shexp.weight", "ffn_gate.weight", "attn_q.weight"]
    assert all(re.search(MOE_PATTERN, f"blk.0.{name}") for name in ours)
    assert not any(re.search(MOE_PATTERN, f"blk.0.{name}") for name in others)


def test_chat_prompt_starts_with_one_bos(open_engine: Any) -> None:
    engine = open_engine()
    prompt = engine.chat_prompt([{"role": "user", "content": "hi"}])
    assert prompt.count(engine.token_bos()) <= 1
    assert b"hi" in engine.detokenize(prompt, special=True)
