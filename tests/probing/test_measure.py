"""Real measurements, as short as they can be: what comes back and what is refused; never how long it took."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest

from hybrimoe.errors import HybrimoeError, PluginError
from hybrimoe.machine import host
from hybrimoe.native.probe import CopyKind, CpuProbe, DeviceProbe, FfnShape, read_rate
from hybrimoe.probing import measure
from hybrimoe.probing.measure import Request, run_in_child

SHAPE = FfnShape(256, 256, 2, 2)


@pytest.fixture(scope="module", autouse=True)
def plugin() -> None:
    """The plug-in with its measurements; a skip where it is not built."""
    try:
        read_rate(1, 1 << 20, 0.001)
    except PluginError as error:
        pytest.skip(error.message)


def cpu_device() -> int:
    """ggml's CPU device, which serves as accelerator here."""
    from hybrimoe.native.plugin import ggml_library

    ggml = ggml_library()
    kinds = [ggml.ggml_backend_dev_type(ggml.ggml_backend_dev_get(i)) for i in range(ggml.ggml_backend_dev_count())]
    return kinds.index(0)


def are_times(us: list[float], n: int) -> bool:
    return len(us) == n and all(math.isfinite(t) and t > 0 for t in us)


def test_cpu_batches() -> None:
    with CpuProbe(SHAPE, 16) as probe:
        for n_active, n_tokens in ((0, 1), (1, 1), (8, 1), (4, 16)):
            assert are_times(probe.run(n_active, n_tokens, 1, 3), 3)
        assert are_times(probe.nodes(16, 1, 2), 2)
        assert are_times(probe.dense(4, 1, 3), 3)
        with pytest.raises(HybrimoeError, match="out of range"):
            probe.dense(17, 1, 1)
        for wrong in ((17, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1)):
            with pytest.raises(HybrimoeError, match="out of range"):
                probe.run(*wrong)


@pytest.mark.parametrize("number", [2, 3, 8, 12, 14, 39])
def test_every_usual_type_can_be_probed(number: int) -> None:
    op = 3 if number == 39 else 2
    with CpuProbe(FfnShape(256, 512, number, number, op), 8) as probe:
        assert are_times(probe.run(2, 1, 1, 1), 1)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (FfnShape(250, 256, 2, 2), "whole blocks"),
        (FfnShape(256, 256, 4, 4), "no kernels of our own|no type"),
        (FfnShape(0, 256, 2, 2), "out of range"),
    ],
)
def test_shapes_without_kernels_are_refused(shape: FfnShape, message: str) -> None:
    with pytest.raises(HybrimoeError, match=message):
        CpuProbe(shape, 8)


def test_any_device_serves_as_accelerator() -> None:
    with DeviceProbe(cpu_device(), SHAPE, 16) as probe:
        assert probe.has(CopyKind.H2D_PAGEABLE)
        assert are_times(probe.copy(CopyKind.H2D_PAGEABLE, 4096, 3), 3)
        assert are_times(probe.sync(3), 3)
        for n_active, n_tokens in ((1, 1), (8, 1), (4, 5)):
            assert are_times(probe.run(n_active, n_tokens, 2), 2)
        read, copied = probe.together(1, 4 << 20, 0.2)
        assert read > 0 and copied > 0
        with pytest.raises(HybrimoeError, match="out of range"):
            probe.copy(CopyKind.H2D_PAGEABLE, 1 << 30, 1)


def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HybrimoeError, match="ggml has no device 99"):
        DeviceProbe(99, SHAPE, 8)
    data = measure.measure(Request((SHAPE,), (1,), (99,), 0.2), lambda *_: None)
    assert data["devices"] == [None]
    assert data["failures"] == ["device 99: cannot measure: ggml has no device 99"]
    assert data["cpu"][0]["samples"]


def test_too_little_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "memory", lambda: host.Memory(8 << 30, 900 << 20, None))
    with pytest.raises(HybrimoeError, match=r"only 0.88 GiB of memory are free"):
        measure.measure(Request((SHAPE,), (1,)), lambda *_: None)


def test_the_whole_probe_in_its_child() -> None:
    steps: list[tuple[str, float]] = []
    request = Request((SHAPE,), (1, 2), (cpu_device(),), 0.5, sys.executable)
    data = run_in_child(request, lambda step, share: steps.append((step, share)))
    assert {s["n_tokens"] for s in data["cpu"][0]["samples"]} >= {1, 64}
    assert data["devices"][0]["copies"] and data["failures"] == []
    assert data["disk"]["n_bytes"] > 0
    assert [share for _, share in steps] == sorted(share for _, share in steps)


def test_a_child_that_dies_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, command: list[str], **arguments: Any) -> None:
            super().__init__([sys.executable, "-c", "import os; os.abort()"], **arguments)

    monkeypatch.setattr(subprocess, "Popen", Dead)
    with pytest.raises(HybrimoeError, match="the probe's process ended with"):
        run_in_child(Request((SHAPE,), (1,)), lambda *_: None)


def measures(process: psutil.Process) -> bool:
    """Whether it has its measuring process by now; others come and go before."""
    for child in process.children():
        with contextlib.suppress(psutil.Error):
            if "hybrimoe.probing.worker" in child.cmdline():
                return True
    return False


def test_a_killed_probe_leaves_nothing(tmp_path: Any) -> None:
    code = (
        "from hybrimoe.cli.main import main; import sys;"
        f"sys.exit(main(['probe', '--calibration', {str(tmp_path / 'c.json')!r}]))"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not measures(psutil.Process(child.pid)):
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=120) == 130  # generous: tests share the machine
    assert list(tmp_path.iterdir()) == []


def test_requests_survive_json() -> None:
    request = Request((SHAPE, FfnShape(512, 256, 12, 14)), (1, 2), (0,), 7.0, "x")
    assert Request.from_dict(json.loads(json.dumps(request.to_dict()))) == request
