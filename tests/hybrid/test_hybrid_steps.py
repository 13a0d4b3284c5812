"""Odd but legal steps are ordinary ones, and a step that fails switches nothing off for good."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hybrid_checks import FORCED, ask_both, check_used, events, settings_of, total
from sides import Side, compare

from hybrimoe.cli.report import stats_text
from hybrimoe.engine import Engine, EngineOptions, Sampling
from hybrimoe.expert_options import CacheSize, ExpertOptions

# The pause outlasts the test on any machine.
FAILS = {"fail_step": 9, "pause_us": 60_000_000}
# 25 sequences each, 200 in all.
KINDS = [
    ("qwen3moe", "Q4_0", None),
    ("qwen3moe", "Q4_K", None),
    ("mixtral", "Q8_0", None),
    ("deepseek2-merged", "Q8_0", None),
    ("gpt-oss", "Q8_0", "MXFP4"),
    ("llama4", "Q4_0", None),
    ("top1", "Q4_0", None),
    ("nogate", "F32", None),
]


@pytest.mark.parametrize(("arch", "kind", "expert_type"), KINDS)
def test_random_shapes_of_batches(
    plain: Side, hybrid: Side, tiny_model: Callable[..., Path], arch: str, kind: str, expert_type: str | None
) -> None:
    """Layers without rows, batches that grow and shrink, other threads, restored states: equal to plain llama.cpp."""
    path = tiny_model(arch, kind, expert_type)
    options = {"seeds": list(range(25))}
    got = hybrid.ask("shapes", path, settings=settings_of(expert_cache=2), **options)
    difference = compare(plain.ask("shapes", path, **options), got)
    assert difference.is_equal, difference
    check_used(got)
    assert got.facts["state"]["paused"] == []


def test_a_failed_step_pauses_and_is_computed(plain: Side, hybrid: Side, tiny_model: Callable[..., Path]) -> None:
    got, difference = ask_both(
        plain, hybrid, tiny_model("qwen3moe", "Q4_0"), settings_of(expert_cache=3, faults=FAILS), decode=12
    )
    assert difference.is_equal, difference
    assert got.facts["state"]["phase"] == "ready"
    (pause,) = got.facts["state"]["paused"]
    assert (
        pause["kind"] == "failed-step"
        and pause["what"] == "sharing"
        and pause["reason"] == "a step that fails on purpose"
    )
    assert 0 < pause["retry_in_s"] <= 60
    assert len(events(got, "tried again")) == 1
    assert total(got, "n_hits") > 0


ON_PURPOSE = {
    "fail_finish": "a step that fails at its end on purpose",
    "fail_pass_end": "the end of a pass that fails on purpose",
    "fail_worker": "a worker that fails on purpose",
}


@pytest.mark.parametrize("devices", [["CPU"], ["CPU", "CPU"]], ids=["one", "two"])
@pytest.mark.parametrize("n", [1, 3, 10, 21])
@pytest.mark.parametrize("fault", ON_PURPOSE)
def test_exceptions_are_pauses(
    plain: Side, hybrid: Side, tiny_model: Callable[..., Path], fault: str, n: int, devices: list[str]
) -> None:
    """Where results are fetched, between two passes, on a worker's thread: the CPU computes it, and it goes on."""
    for pause_us, kernels in ((60_000_000, "ggml"), (1, "ggml"), (1, "auto")):
        faults = {fault: n, "pause_us": pause_us}
        settings = settings_of(expert_cache=3, devices=devices, faults=faults, cpu_kernels=kernels)
        got, difference = ask_both(plain, hybrid, tiny_model("qwen3moe", "Q4_0"), settings, decode=24)
        assert difference.is_equal if kernels == "ggml" else difference.nmse <= 2e-3, difference
        state = got.facts["state"]
        assert state["phase"] == "ready" and state["given_up"] is None
        assert events(got, ON_PURPOSE[fault]), got.facts["events"]
        if pause_us > 1:
            assert [pause["reason"] for pause in state["paused"]] == [ON_PURPOSE[fault]]
        else:
            assert state["paused"] == [] and events(got, "shared again")
            check_used(got)


def test_a_set_up_that_fails(plain: Side, hybrid: Side, tiny_model: Callable[..., Path]) -> None:
    settings = settings_of(expert_cache=3, faults={"fail_set_up": 1})
    got, difference = ask_both(plain, hybrid, tiny_model("qwen3moe", "Q4_0"), settings, decode=12)
    assert difference.is_equal, difference
    state = got.facts["state"]
    assert (state["phase"], state["paused"], state["devices"]) == ("cpu-only", [], [])
    assert state["given_up"] == "set-up failed: a set-up that fails on purpose"
    assert total(got, "n_experts_gpu") == 0


def test_stats_name_the_pause(tiny_model: Callable[..., Path]) -> None:
    experts = ExpertOptions(
        devices=("CPU",), cache=CacheSize(n_slots=3), guard=False, live_costs=False, extra={"faults": FAILS}
    )
    with Engine(tiny_model("qwen3moe", "Q4_0"), EngineOptions(n_ctx=256, n_threads=1, experts=experts)) as engine:
        "".join(engine.answer([5, 6, 7], Sampling(temp=0), 12))
        texts = [stats_text(engine)]
        engine.reset_counters()
        "".join(engine.answer([5, 6, 8], Sampling(temp=0), 12))
        texts.append(stats_text(engine))
        assert engine.plugin is not None
        engine.plugin.configure(faults={})  # settings are the process's: other engines in it must not fail, too
    for text in texts:  # of the turn in which the step failed, and of one wholly within the pause
        assert "\nsharing is paused: a step that fails on purpose; tried again in" in text


def test_stats_name_what_was_given_up(tiny_model: Callable[..., Path]) -> None:
    experts = ExpertOptions(devices=("CPU",), cache=CacheSize(n_slots=3), extra={"faults": {"fail_set_up": 1}})
    with Engine(tiny_model("qwen3moe", "Q4_0"), EngineOptions(n_ctx=256, n_threads=1, experts=experts)) as engine:
        "".join(engine.answer([5, 6, 7], Sampling(temp=0), 4))
        text = stats_text(engine)
        assert engine.plugin is not None
        engine.plugin.configure(faults={})
    assert "\nthe expert cache was given up: set-up failed: a set-up that fails on purpose" in text


def test_warmup_teaches_nothing(plain: Side, hybrid: Side, tiny_model: Callable[..., Path]) -> None:
    """A warm-up step asks for every expert; once the layers are known it is not planned."""
    path = tiny_model("qwen3moe", "Q4_0")
    got = hybrid.ask("warmup", path, settings=settings_of(expert_cache=3), late=True)
    assert compare(plain.ask("warmup", path, late=True), got).is_equal
    check_used(got)
    before, after = got.facts["before_warmup"], got.facts["after_warmup"]
    assert before["state"]["stats"]["n_events"] == after["state"]["stats"]["n_events"] > 0
    assert before["residency"] == after["residency"]
    assert got.facts["state"]["stats"]["n_events"] > after["state"]["stats"]["n_events"]


@pytest.mark.parametrize("cache_policy", ["mrs", "lru"])
def test_a_warmup_as_the_first_pass(
    plain: Side, hybrid: Side, tiny_model: Callable[..., Path], cache_policy: str
) -> None:
    """The layers are learnt from the pass after it: the cache works, and later warm-ups are not planned."""
    path = tiny_model("qwen3moe", "Q4_0")
    got = hybrid.ask("warmup", path, settings=settings_of(expert_cache=3, cache_policy=cache_policy), n=3)
    assert compare(plain.ask("warmup", path, n=3), got).is_equal
    check_used(got)
    before, after = got.facts["before_warmup"], got.facts["after_warmup"]
    assert before["state"]["stats"]["n_events"] == after["state"]["stats"]["n_events"] > 0
    assert before["residency"] == after["residency"]
    assert got.facts["state"]["stats"]["n_events"] > after["state"]["stats"]["n_events"]


@pytest.mark.parametrize("arch", ["qwen3moe", "mixtral", "deepseek2-merged", "gpt-oss"])
@pytest.mark.parametrize(
    "watches",
    [
        ("all", "none", "all", "none"),
        ("none", "third", "outside", "none"),
        ("none", "experts", "none", "none"),
    ],
    ids="-".join,
)
def test_evaluation_callbacks(
    plain: Side, hybrid: Side, tiny_model: Callable[..., Path], arch: str, watches: tuple[str, ...]
) -> None:
    """Blocks that a callback cuts are computed by llama.cpp; whole ones are shared, before and after."""
    path = tiny_model(arch, "Q8_0")
    options = {"watches": list(watches)}
    got = hybrid.ask("callbacks", path, settings=settings_of(expert_cache=2), **options)
    difference = compare(plain.ask("callbacks", path, **options), got)
    assert difference.is_equal, difference
    assert got.facts["state"]["phase"] == "ready" and got.facts["state"]["paused"] == []
    for experts in ("n_experts_gpu", "n_hits"):
        sums = [sum(layer[experts] for layer in facts["layers"]) for facts in got.facts["after"]]
        grown = {i: b - a for i, (a, b) in enumerate(zip([0, *sums], sums, strict=False))}
        assert all(grown[i] > 0 for i, watch in enumerate(watches) if watch == "none"), (experts, grown)
        assert all(grown[i] == 0 for i, watch in enumerate(watches) if watch == "all"), (experts, grown)


@pytest.mark.parametrize("n_prompt", [40, 300])
def test_prompts_longer_than_a_micro_batch_keep_the_cache(tiny_model: Callable[..., Path], n_prompt: int) -> None:
    """Of such a prompt the last layer has rows in the last micro-batch only."""
    experts = ExpertOptions(
        devices=("CPU",),
        cache=CacheSize(n_slots=3),
        guard=False,
        live_costs=False,
        extra={"costs": FORCED, "faults": {}},
    )
    options = EngineOptions(n_ctx=1024, n_threads=1, n_batch=512, n_ubatch=16, experts=experts)
    with Engine(tiny_model("qwen3moe", "Q4_0"), options) as engine:
        before = 0
        for turn in range(3):
            prompt = [1 + (7 * i + turn) % 200 for i in range(n_prompt)]
            engine.reset_counters()
            "".join(engine.answer(prompt, Sampling(temp=0), 8))
            assert all(layer.n_experts_gpu > 0 for layer in engine.counters()), f"answer {turn}"
            stats = engine.expert_state()["stats"]
            assert stats["n_gpu"] > before
            before = stats["n_gpu"]
        assert stats["n_hits"] > 0
        assert engine.expert_state()["phase"] == "ready" and engine.expert_state()["paused"] == []
