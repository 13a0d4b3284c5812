"""The test device (native/tests/device) under plain llama.cpp: a GPU to it, with the CPU's answers, however late."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "parity"))

from sides import Reply, Side, WorkerFailedError, compare

WithDevice = Callable[..., Side]
Ask = Callable[..., Reply]
MakeModel = Callable[[str], Path]

MODES = ["eager", "lazy", "random"]
MODELS = ["qwen3moe", "gpt-oss", "nemotron-h", "dense"]
# llama.cpp's own calls in a step whose layers are all on the device, however many: six inputs, one graph, the logits.
STEP = {
    "graphs": 1,
    "waits": 1,
    "blocking_sets_pinned": 6,
    "gets_pinned": 1,
}


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    side = Side("plain", tmp_path_factory.mktemp("cpu"))
    yield side
    side.close()


@pytest.fixture(scope="module")
def with_device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WithDevice]:
    """`with_device(MODE="lazy", DEVICES="2")`: a process whose test device has these settings."""
    sides: dict[str, Side] = {}

    def make(**settings: str) -> Side:
        names = {name: "HYBRIMOE_TEST_" + ("" if name == "DEVICES" else "DEVICE_") + name for name in settings}
        environment = {names[name]: value for name, value in settings.items()}
        key = json.dumps(environment)
        if key not in sides:
            sides[key] = Side("plain", tmp_path_factory.mktemp("device"), environment=environment)
        return sides[key]

    yield make
    for side in sides.values():
        side.close()


@pytest.fixture
def model(tiny_model: Callable[..., Path], tiny_models_dir: Path) -> MakeModel:
    def make(name: str) -> Path:
        if name != "dense":
            return tiny_model(name, "Q4_0")
        from make_tiny_models import write_tiny_model
        from moe_shapes import ARCHITECTURES

        path = tiny_models_dir / "tiny-dense-Q4_0.gguf"
        shape = ARCHITECTURES["deepseek-lite"].tiny
        if not path.exists():
            write_tiny_model(path, "deepseek-lite", "Q4_0", shape=replace(shape, n_dense_lead=shape.n_layers))
        return path

    return make


@pytest.fixture
def ask(device_module: Path) -> Ask:
    def run(side: Side, path: Path, scenario: str = "logits", **options: Any) -> Reply:
        return side.ask(scenario, path, backends=[str(device_module)], **{"n_gpu_layers": 99, **options})

    return run


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_cpu_s(
    cpu: Side,
    with_device: WithDevice,
    ask: Ask,
    model: MakeModel,
    mode: str,
    name: str,
) -> None:
    options = {"prefill": [3, 7, 33], "threads": 1}
    reference = cpu.ask("logits", model(name), **options)
    difference = compare(reference, ask(with_device(MODE=mode), model(name), **options))
    assert difference.is_equal, difference


@pytest.mark.parametrize("mode", ["lazy", "random"])
@pytest.mark.parametrize(
    ("scenario", "options"),
    [
        ("shapes", {"seeds": [1, 2], "threads": 1}),
        ("sequences", {}),
        ("two_contexts", {}),
        ("callback", {"watch": "third"}),
    ],
)
def test_ways_to_use_a_context(
    cpu: Side,
    with_device: WithDevice,
    ask: Ask,
    model: MakeModel,
    mode: str,
    scenario: str,
    options: dict[str, Any],
) -> None:
    """Micro-batches, threads, saved states, sequences, callbacks in the middle of graphs."""
    path = model("qwen3moe")
    difference = compare(cpu.ask(scenario, path, **options), ask(with_device(MODE=mode), path, scenario, **options))
    assert difference.is_equal, difference


@pytest.mark.parametrize("mode", ["lazy", "random"])
@pytest.mark.parametrize("n_gpu_layers", [1, 99])
@pytest.mark.parametrize("mmap", [True, False])
def test_two_devices_and_the_cpu(
    cpu: Side,
    with_device: WithDevice,
    ask: Ask,
    model: MakeModel,
    mode: str,
    n_gpu_layers: int,
    mmap: bool,
) -> None:
    """Layers on both, with pipelines where llama.cpp wants them; weights that are read go up by queued transfers."""
    path = model("qwen3moe")
    options = {"prefill": [33, 3], "threads": 1}
    side = with_device(MODE=mode, DEVICES="2")
    got = ask(side, path, n_gpu_layers=n_gpu_layers, mmap=mmap, **options)
    assert compare(cpu.ask("logits", path, **options), got).is_equal


@pytest.mark.parametrize("mode", MODES)
def test_calls_of_a_step(
    with_device: WithDevice,
    ask: Ask,
    model: MakeModel,
    device_module: Path,
    mode: str,
) -> None:
    steps = [1, 4, 40]
    reply = ask(with_device(MODE=mode), model("qwen3moe"), "device_calls", module=str(device_module), steps=steps)
    setup, *calls = reply.facts["calls"]
    assert setup["allocations"] == 2 and setup["streams_made"] == 1
    n_nodes = setup["nodes"]
    for i, call in enumerate(calls, 1):
        assert call["graphs_changed"] == (1 if i % 4 == 0 else 0)  # with the first step of each size
        assert {key: call[key] for key in STEP} == STEP
        assert call["nodes"] == n_nodes
        assert not any(value for key, value in call.items() if "pageable" in key or "queries" in key or "failed" in key)
        assert call["allocations"] == call["frees"] == call["copies"] == 0
    n_logits = [call["gets_pinned_bytes"] for call in reply.facts["calls"]]
    assert n_logits == [n_logits[0] * n for n in steps for _ in range(4)]


def test_trace(with_device: WithDevice, ask: Ask, model: MakeModel, tmp_path: Path) -> None:
    trace = tmp_path / "calls.jsonl"
    ask(with_device(TRACE=str(trace)), model("qwen3moe"), prefill=[5], decode=1)
    calls = [json.loads(line) for line in trace.read_text().splitlines()]
    graphs = [call for call in calls if call["kind"] == "graph"]
    assert len(graphs) == 2 and all(call["stream"] == 1 and call["nodes"] > 20 for call in graphs)
    assert graphs[0]["last"] == "result_output"
    after = calls[calls.index(graphs[-1]) :]
    assert [(call["kind"], call.get("host"), call.get("waited")) for call in after[1:3]] == [
        ("get", "pinned", None),
        ("synchronize", None, True),
    ]


def test_memory_has_an_end(with_device: WithDevice, ask: Ask, model: MakeModel) -> None:
    with pytest.raises(WorkerFailedError, match="cannot load"):
        ask(with_device(MIB="1"), model("qwen3moe"), prefill=[3])


@pytest.mark.parametrize("which", ["1", "2-"])
def test_allocations_that_fail(with_device: WithDevice, ask: Ask, model: MakeModel, which: str) -> None:
    """llama.cpp's own: the weights, the context."""
    with pytest.raises(WorkerFailedError, match="cannot load" if which == "1" else "context"):
        ask(with_device(FAIL=which), model("qwen3moe"), prefill=[3])


def test_wrong_settings(with_device: WithDevice, ask: Ask, model: MakeModel) -> None:
    with pytest.raises(WorkerFailedError, match="HYBRIMOE_TEST_DEVICE_MODE does not know 'soon'"):
        ask(with_device(MODE="soon"), model("qwen3moe"), prefill=[3])
