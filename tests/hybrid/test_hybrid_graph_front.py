"""A device that takes llama.cpp's whole graph (native/backend/graph_front): the logits stay plain llama.cpp's.

Inside is the test device, whose memory no host code can read and whose work comes late, or a CPU. What the CPU computes
of a block is summed apart from what the device does, so bits are the same only where the device computes it all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hybrid_checks import FORCED, PREFILL, check_used, settings_of, total
from sides import Difference, Reply, Side, compare
from test_hybrid_tiny import KINDS, slot_counts
from test_parity_architectures import ARCHITECTURES, model_file
from widen_arch_models import widen

# The sum's order differs, by 1e-8. Weights that are not F32 are multiplied with activations rounded to 8 bits, of which
# a few fall to the other side then.
MOST_NMSE = 1e-6

# Costs by which a few experts of a token go each way.
MIXED = {"cpu_us": 10, "gpu_us": 3, "copy_us": 50}


@pytest.fixture(scope="module", params=["TEST0", "CPU"])
def graph_side(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Side, str]]:
    side = Side("plugin", tmp_path_factory.mktemp("graph"), environment={"HYBRIMOE_TEST_DEVICE_MODE": "lazy"})
    yield side, request.param
    side.close()


Ask = Callable[..., tuple[Reply, Difference]]


@pytest.fixture
def ask(plain: Side, graph_side: tuple[Side, str], device_module: Path) -> Ask:
    """`ask(path, settings, scenario, **options)`: the reply, and how it differs from plain llama.cpp's on the CPU."""
    side, device = graph_side

    def run(path: Path, settings: dict[str, Any], scenario: str = "logits", **options: Any) -> tuple[Reply, Difference]:
        if scenario == "logits":
            options = {"prefill": PREFILL, "decode": 6, **options}
        settings = settings_of(**{"devices": [device], **settings})
        more = {"backends": [str(device_module)], "n_gpu_layers": 99, "front": "graph"}
        got = side.ask(scenario, path, settings=settings, **more, **options)
        return got, compare(plain.ask(scenario, path, **options), got)

    return run


@pytest.mark.parametrize("slots", ["one", "half", "all"])
@pytest.mark.parametrize(("arch", "kind", "expert_type"), KINDS)
def test_slots(
    ask: Ask, tiny_model: Callable[..., Path], arch: str, kind: str, expert_type: str | None, slots: str
) -> None:
    path = tiny_model(arch, kind, expert_type)
    n_slots = slot_counts(path)[slots]
    got, difference = ask(path, {"expert_cache": n_slots, "costs": FORCED})
    assert difference.nmse <= MOST_NMSE, difference
    check_used(got, evictions=slots != "all")
    if slots == "all":
        assert total(got, "n_misses") == 0
    got, difference = ask(path, {"expert_cache": n_slots, "costs": MIXED})
    assert difference.nmse <= MOST_NMSE, difference
    assert total(got, "n_experts_gpu") > 0
    assert slots == "all" or total(got, "n_experts_cpu") > 0


@pytest.mark.slow
@pytest.mark.parametrize(("top_k", "kind"), [(1, "Q8_0"), (2, None), (3, "Q4_0")])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_architectures(
    ask: Ask, architecture_models: Path, tmp_path: Path, arch: str, top_k: int, kind: str | None
) -> None:
    """As llama.cpp writes them, where every token asks for both experts, and widened, so that experts are evicted."""
    source = model_file(architecture_models, arch)
    path = widen(source, tmp_path / f"{arch}.gguf", n_experts=8, top_k=top_k, type_name=kind)
    for model, n_slots, costs in (
        (source, 1, FORCED),
        (path, 1, MIXED),
        (path, 4, FORCED),
        (path, 4, MIXED),
        (path, 8, MIXED),
    ):
        got, difference = ask(model, {"expert_cache": n_slots, "costs": costs}, prefill=[3, 7, 20])
        # deepseek4 makes ten times more of the activations that fall to the other side; with F32 weights it does not.
        assert difference.nmse <= (1e-4 if arch == "deepseek4" and kind else MOST_NMSE), (n_slots, difference)
        assert total(got, "n_blocks") > 0 and total(got, "n_blocks_delegated") == 0


@pytest.mark.parametrize("scenario", ["shapes", "sequences", "warmup", "two_contexts"])
def test_ways_to_use_a_context(ask: Ask, tiny_model: Callable[..., Path], scenario: str) -> None:
    options: dict[str, Any] = {"seeds": [1, 2, 3]} if scenario == "shapes" else {}
    _, difference = ask(
        tiny_model("qwen3moe", "Q4_K"), {"expert_cache": 5, "costs": MIXED, "prefetch": "impact"}, scenario, **options
    )
    assert difference.nmse <= MOST_NMSE, difference


@pytest.mark.parametrize("watch", ["all", "third", "experts"])
def test_evaluation_callbacks_cut_the_graph(ask: Ask, tiny_model: Callable[..., Path], watch: str) -> None:
    """Values in the middle of a block are what they are in plain llama.cpp: pieces of it are computed as they come."""
    _, difference = ask(tiny_model("gpt-oss", "F32"), {"expert_cache": 5}, "callback", watch=watch)
    assert difference.nmse <= MOST_NMSE, difference


def test_one_cache_for_all_contexts(ask: Ask, tiny_model: Callable[..., Path]) -> None:
    got, difference = ask(tiny_model("qwen3moe", "F32"), {"expert_cache": 4}, "two_contexts")
    assert difference.nmse <= MOST_NMSE, difference
    assert got.facts["first"]["instance"] == got.facts["second"]["instance"]
    assert got.facts["again0"]["instance"] != got.facts["first"]["instance"], "no context was left"


@pytest.mark.parametrize("faults", [{"fail_copy_every": 3}, {"fail_step": 5}, {"fail_finish": 4}, {"fail_worker": 7}])
def test_what_fails_is_computed_on_the_cpu(ask: Ask, tiny_model: Callable[..., Path], faults: dict[str, int]) -> None:
    got, difference = ask(
        tiny_model("qwen3moe", "Q8_0"), {"expert_cache": 4, "faults": {**faults, "pause_us": 1000}}, decode=12
    )
    assert difference.nmse <= MOST_NMSE, difference
    assert total(got, "n_experts_cpu") > 0


@pytest.mark.parametrize("n_tokens", [1, 4])
@pytest.mark.parametrize("policy", ["lru", "mrs"])
def test_calls_of_a_layer(
    tiny_model: Callable[..., Path], device_module: Path, tmp_path: Path, policy: str, n_tokens: int
) -> None:
    """When all experts are there a layer costs a graph, a wait, and small pinned copies: ids, x and weights come down,
    scores where the policy wants them, and slot ids go up."""
    side = Side("plugin", tmp_path)
    got = side.ask(
        "device_calls",
        tiny_model("qwen3moe", "Q4_0"),
        settings=settings_of(devices=["TEST0"], expert_cache=16, cache_policy=policy),
        backends=[str(device_module)],
        n_gpu_layers=99,
        front="graph",
        module=str(device_module),
        steps=[n_tokens],
        repeat=6,
    )
    side.close()
    step = {"graphs": 1, "waits": 1, "gets_pinned": 1, "blocking_sets_pinned": 6}
    layer = {"graphs": 1, "waits": 1, "gets_pinned": 4 if policy == "mrs" else 3, "sets_pinned": 1}
    for call in got.facts["calls"][3:]:  # after the steps that learn the layers, fill the slots, first keep scores
        spent = {key: n for key, n in call.items() if n and "bytes" not in key and key not in ("nodes", "idle_syncs")}
        assert spent == {key: step.get(key, 0) + len(got.layers) * layer.get(key, 0) for key in step | layer}
    assert total(got, "n_misses") == 0


def test_live_costs_and_guard(ask: Ask, tiny_model: Callable[..., Path]) -> None:
    """With costs that are measured, and watched from time to time: on a device with events the worker sees the end."""
    settings = {"expert_cache": 8, "costs": None, "live_costs": True, "guard": True, "admission": "pays"}
    # From 256 tokens on the CPU's attention sums in an order that depends on the number of threads.
    got, difference = ask(tiny_model("qwen3moe", "F32"), settings, prefill=[3], decode=240)
    assert difference.nmse <= MOST_NMSE, difference
    assert got.facts["state"]["phase"] == "ready" and not got.facts["state"]["paused"]
    assert total(got, "n_experts_gpu") + total(got, "n_experts_cpu") > 0
