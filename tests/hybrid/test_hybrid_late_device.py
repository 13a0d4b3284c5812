"""Accelerators with memory of their own whose work comes late (native/tests/device): the logits stay plain llama.cpp's.

A CPU that stands in for an accelerator is done when a call returns and reads any memory. This one is not and does not:
a wait, a transfer or a place in the queue that is missing shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hybrid_checks import PREFILL, check_used, events, settings_of, total
from sides import Reply, Side, compare
from test_hybrid_tiny import KINDS, slot_counts


@pytest.fixture(scope="module", params=["lazy", "random"])
def late(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    environment = {"HYBRIMOE_TEST_DEVICES": "2", "HYBRIMOE_TEST_DEVICE_MODE": request.param}
    side = Side("plugin", tmp_path_factory.mktemp("late"), environment=environment)
    yield side
    side.close()


@pytest.fixture
def check(plain: Side, late: Side, device_module: Path) -> Callable[..., Reply]:
    """`check(path, settings, **options)`: the reply, after its logits were found to be plain llama.cpp's."""

    def run(
        path: Path, settings: dict[str, Any], scenario: str = "logits", n_gpu_layers: int = 99, **options: Any
    ) -> Reply:
        if scenario == "logits":
            options = {"prefill": PREFILL, "decode": 4, **options}
        settings = settings_of(**{"devices": ["TEST0"], **settings})
        got = late.ask(
            scenario, path, settings=settings, backends=[str(device_module)], n_gpu_layers=n_gpu_layers, **options
        )
        difference = compare(plain.ask(scenario, path, **options), got)
        assert difference.is_equal, difference
        return got

    return run


@pytest.mark.parametrize("slots", ["one", "half", "all"])
@pytest.mark.parametrize(("arch", "kind", "expert_type"), KINDS)
def test_slots(
    check: Callable[..., Reply],
    tiny_model: Callable[..., Path],
    arch: str,
    kind: str,
    expert_type: str | None,
    slots: str,
) -> None:
    """With all other work there too, then with it on the CPU."""
    path = tiny_model(arch, kind, expert_type)
    for n_gpu_layers in (99, 0):
        got = check(path, {"expert_cache": slot_counts(path)[slots]}, n_gpu_layers=n_gpu_layers)
        check_used(got, evictions=slots != "all")


@pytest.mark.parametrize("n_slots", [2, 5])
def test_two_devices(check: Callable[..., Reply], tiny_model: Callable[..., Path], n_slots: int) -> None:
    settings = {"devices": ["TEST0", "TEST1"], "expert_cache": n_slots, "prefetch": "path"}
    got = check(tiny_model("gpt-oss", "Q8_0", "MXFP4"), settings, decode=12)
    check_used(got)
    assert {0, 1} <= {device for experts in got.facts["residency"].values() for device in experts}


@pytest.mark.parametrize("scenario", ["shapes", "sequences"])
def test_ways_to_use_a_context(check: Callable[..., Reply], tiny_model: Callable[..., Path], scenario: str) -> None:
    options: dict[str, Any] = {"seeds": [1, 2, 3]} if scenario == "shapes" else {}
    got = check(tiny_model("qwen3moe", "Q4_K"), {"expert_cache": 5, "prefetch": "impact"}, scenario, **options)
    check_used(got)


@pytest.mark.parametrize(
    "faults",
    [
        {"delay_copy_us": 500},
        {"fail_copy_every": 3},
        {"fail_alloc_from": 3},
        {"fail_alloc_from": 4, "fail_alloc_until": 4},
    ],
    ids=str,
)
def test_faults(check: Callable[..., Reply], tiny_model: Callable[..., Path], faults: dict[str, int]) -> None:
    got = check(tiny_model("mixtral", "Q4_0"), {"expert_cache": 3, "faults": faults}, decode=12)
    if "fail_alloc_from" in faults:
        assert events(got, "memory")
    else:
        check_used(got)


def test_a_size_in_bytes_holds_the_padding(check: Callable[..., Reply], tiny_model: Callable[..., Path]) -> None:
    """Rows of 256 are padded to 512 at the end of each tensor, as for CUDA."""
    path = tiny_model("qwen3moe", "Q4_0")
    whole = check(path, {"expert_cache": 16}).facts["state"]["devices"][0]["cache_bytes"]
    for budget in (whole, whole - 1, int(5.5 * whole / 16)):
        got = check(path, {"expert_cache": {"bytes": budget}})
        (device,) = got.facts["state"]["devices"]
        assert device["cache_bytes"] <= budget
        assert sum(device["n_slots"]) == {whole: 32, whole - 1: 31}.get(budget, 10)


def test_calls_of_a_layer(tiny_model: Callable[..., Path], device_module: Path, tmp_path: Path) -> None:
    """What the block front end asks of the device for one token when all experts are there: two graphs and waits."""
    side = Side("plugin", tmp_path)
    got = side.ask(
        "device_calls",
        tiny_model("qwen3moe", "Q4_0"),
        settings=settings_of(devices=["TEST0"], expert_cache=16),
        backends=[str(device_module)],
        n_gpu_layers=99,
        module=str(device_module),
        steps=[1],
        repeat=6,
    )
    side.close()
    step = {"graphs": 1, "waits": 1, "gets_pinned": 1, "blocking_sets_pinned": 6}
    layer = {"graphs": 2, "waits": 2, "sets_pinned": 1, "gets_pinned": 1, "copies": 1}
    layer |= {"gets_pageable": 1, "blocking_sets_pageable": 1}  # x comes down and y goes up
    for call in got.facts["calls"][2:]:  # after the step that learns the layers and the one that fills the slots
        spent = {key: n for key, n in call.items() if n and "bytes" not in key and key not in ("nodes", "idle_syncs")}
        assert spent == {key: step.get(key, 0) + len(got.layers) * layer.get(key, 0) for key in step | layer}
    assert total(got, "n_misses") == 0


@pytest.mark.parametrize("front", ["block", "graph"])
def test_a_graph_that_is_built_again_asks_nothing(
    tiny_model: Callable[..., Path], device_module: Path, tmp_path: Path, front: str
) -> None:
    """Where the device stands before the CPU in ggml's list, looking for the CPU asks it for its type: on some cards a
    millisecond in the driver. llama.cpp builds the graph again whenever the number of tokens changes."""
    side = Side("plugin", tmp_path)
    got = side.ask(
        "device_calls",
        tiny_model("qwen3moe", "Q4_0"),
        settings=settings_of(devices=["TEST0"], expert_cache=16),
        backends=[str(device_module)],
        device_first=True,
        n_gpu_layers=99,
        front=front,
        module=str(device_module),
        steps=[1, 4, 40, 1],
        repeat=2,
    )
    side.close()
    asked = [sum(n for key, n in call.items() if "queries" in key) for call in got.facts["calls"]]
    assert asked[0] + asked[1] <= 6, "setting up the context, the slots"
    assert not any(asked[2:])
