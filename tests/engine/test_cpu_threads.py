"""CPU threads: what the calibration found best, what was asked for, and where they run."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hybrimoe import calibration
from hybrimoe.calibration import Calibration, CalibrationError
from hybrimoe.cpu_threads import keep_to_range, pinned, with_best_threads
from hybrimoe.engine import Engine, EngineOptions
from hybrimoe.errors import UsageError
from hybrimoe.expert_options import ExpertOptions
from hybrimoe.gguf_model import GgufModel, inspect
from hybrimoe.machine import host
from hybrimoe.placement import Placement

TinyModel = Callable[..., Path]


@pytest.fixture
def model(tiny_model: TinyModel) -> GgufModel:
    return inspect(tiny_model("mixtral", "Q4_0"))


def calibrated(model: GgufModel, one_us: dict[int, float], many_us: dict[int, float]) -> Calibration:
    """A calibration with these times of an expert with one token and with 64, by thread count; the last is default."""
    from dataclasses import asdict

    shape = asdict(calibration.model_shapes(model)[0])
    by_threads = {
        str(n): {"step_us": 1.0, "first_us": 2.0, "points": [[1, us], [64, many_us[n]]]} for n, us in one_us.items()
    }
    fit = {"cpu": [{"shape": shape, "by_threads": by_threads}], "devices": [], "reasons": []}
    return Calibration({"n_threads": list(one_us), "fit": fit})


@pytest.mark.parametrize(
    ("one_us", "many_us", "expected"),
    [
        ({2: 100.0, 4: 60.0, 8: 90.0}, {2: 900.0, 4: 500.0, 8: 300.0}, (4, 8)),  # more can be slower
        ({2: 99.0, 8: 100.0}, {2: 300.0, 8: 301.0}, (8, 8)),  # no clear advantage: the default
        ({8: 100.0}, {8: 300.0}, (8, 8)),
    ],
)
def test_the_best_thread_counts(
    model: GgufModel, one_us: dict[int, float], many_us: dict[int, float], expected: tuple[int, int]
) -> None:
    assert calibrated(model, one_us, many_us).best_threads(model) == expected


def test_a_calibration_chooses_where_nothing_was_given(model: GgufModel, monkeypatch: pytest.MonkeyPatch) -> None:
    found = calibrated(model, {2: 50.0, 8: 100.0}, {2: 500.0, 8: 300.0})
    monkeypatch.setattr(calibration, "load_matching", lambda *_: found)
    monkeypatch.setattr(host, "n_logical_cpus", lambda: 16)
    assert with_best_threads(EngineOptions(), model).threads() == (2, 8)
    assert with_best_threads(EngineOptions(n_threads_batch=5), model).threads() == (2, 5)
    assert with_best_threads(EngineOptions(n_threads=3), model).threads() == (3, 3)
    fixed = EngineOptions(experts=ExpertOptions(reproducible=True))  # its bits must not follow a probe
    assert with_best_threads(fixed, model) == fixed
    # Measured when the process might use more processors than now.
    monkeypatch.setattr(host, "n_logical_cpus", lambda: 4)
    assert with_best_threads(EngineOptions(), model).threads() == (2, 4)

    def refuse(*_: object) -> Calibration:
        raise CalibrationError("of another machine", "")

    monkeypatch.setattr(calibration, "load_matching", refuse)
    assert with_best_threads(EngineOptions(), model) == EngineOptions()


def test_impossible_processors(model: GgufModel) -> None:
    with pytest.raises(UsageError, match="none of the processors 4000-4001 may be used"):
        keep_to_range("4000-4001")
    with pytest.raises(UsageError, match="4000 threads cannot each have one"):
        pinned(EngineOptions(n_threads=4000))


@pytest.mark.skipif(len(host.physical_cpus()) < 2, reason="one processor")
def test_expert_threads_stay_where_they_are_pinned(model: GgufModel) -> None:
    options = EngineOptions(n_ctx=256, n_threads=2, placement=Placement())
    options = pinned(replace(options, n_threads_batch=2))
    cpus = options.experts.pin_threads
    assert len(cpus) == 2 and len(set(cpus)) == 2
    with Engine(model.path, options) as engine:
        engine.eval(engine.text_prompt("one two three"))
        allowed = [os.sched_getaffinity(int(task.name)) for task in Path("/proc/self/task").iterdir()]
        assert {cpus[1]} in allowed
        # The caller's thread is free, and so is what it starts.
        assert len(os.sched_getaffinity(0)) > 1
