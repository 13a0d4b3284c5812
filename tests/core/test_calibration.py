"""Fits and the live cost model on synthetic machines: known parameters plus noise, steps and outliers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hybrimoe.native.core import CPU, CoreError, CoreUsageError, Costs, Curve
from hybrimoe.native.core_calibration import CostKind, CostReader, Estimator, fit_costs


class Machine:
    """Times with a relative noise, some of them far too long."""

    def __init__(self, seed: int, sigma: float = 0.05, outlier_share: float = 0.0) -> None:
        self.random = np.random.default_rng(seed)
        self.sigma, self.outlier_share = sigma, outlier_share

    def time(self, us: float) -> float:
        factor = self.random.uniform(3, 25) if self.random.random() < self.outlier_share else 1.0
        return float(us * factor * math.exp(self.random.normal(0, self.sigma)))

    def sizes(self, n: int) -> list[float]:
        return [float(v) for v in np.exp2(self.random.uniform(14, 24, n))]


def costs_of(latency_us: float = 9.0, bytes_per_us: float = 24800.0) -> Costs:
    costs = Costs(4, 1)
    costs.set_bytes(2.7e6)
    costs.set_cpu(Curve(60.0, 9.0), 25.0)
    costs.set_gpu(0, Curve(20.0, 0.5))
    costs.set_link(0, latency_us, bytes_per_us)
    costs.set_step(CPU, 5.0)
    costs.set_step(0, 30.0)
    costs.set_dram(math.inf)
    return costs


@pytest.mark.parametrize("outlier_share", [0.0, 0.05, 0.15])
@pytest.mark.parametrize("seed", range(5))
def test_fit_finds_latency_and_bandwidth(seed: int, outlier_share: float) -> None:
    machine = Machine(seed, outlier_share=outlier_share)
    sizes = machine.sizes(300)
    fit = fit_costs([(1.0, s) for s in sizes], [machine.time(8.0 + s / 12000.0) for s in sizes])
    assert fit.params[0] == pytest.approx(8.0, rel=0.05)
    assert 1 / fit.params[1] == pytest.approx(12000.0, rel=0.05)
    assert fit.median_error < 0.07
    assert fit.n_outliers >= 0.7 * outlier_share * 300


def test_fit_tells_first_expert_weights_and_tokens_apart() -> None:
    machine = Machine(3, sigma=0.03, outlier_share=0.05)
    rows, times = [], []
    for _ in range(400):
        n_experts, n_tokens = int(machine.random.integers(1, 9)), int(machine.random.integers(1, 33))
        rows.append((1.0, float(n_experts), float(n_experts * n_tokens)))
        times.append(machine.time(40.0 + 60.0 * n_experts + 9.0 * n_experts * n_tokens))
    assert fit_costs(rows, times).params == pytest.approx((40.0, 60.0, 9.0), rel=0.05)


@pytest.mark.parametrize(
    ("rows", "times", "message"),
    [
        ([], [], "n_params = 0"),
        ([(1.0, 2.0)], [3.0], "1 samples cannot tell 2 parameters"),
        ([(1.0,), (1.0,)], [3.0, -1.0], "y = -1 must be finite and above 0"),
        ([(1.0,), (math.nan,)], [3.0, 1.0], "must be finite"),
        ([(0.0,), (1.0,)], [3.0, 1.0], "all zero"),
        ([(1.0,), (1.0, 2.0)], [3.0, 1.0], "do not belong together"),
    ],
)
def test_fit_refuses_what_is_no_data(rows: list[tuple[float, ...]], times: list[float], message: str) -> None:
    with pytest.raises(CoreUsageError, match=message):
        fit_costs(rows, times)


@pytest.mark.parametrize("factor", [0.25, 4.0])
@pytest.mark.parametrize("sizes", ["one", "many"])
@pytest.mark.parametrize("seed", range(8))
def test_a_bandwidth_step_settles_within_32_samples(factor: float, sizes: str, seed: int) -> None:
    machine = Machine(seed, outlier_share=0.05 if seed % 2 else 0.0)
    costs = costs_of()
    estimator = Estimator(costs)

    def copy(rate: float, now_us: float) -> None:
        n_bytes = 2.7e6 if sizes == "one" else machine.sizes(1)[0] * 4
        estimator.observe_copy(0, n_bytes, machine.time(9.0 + n_bytes / rate), now_us)

    for k in range(200):
        copy(24800.0, k * 1e3)
    assert list(estimator.drifts()) == []
    for k in range(32):
        copy(24800.0 * factor, (200 + k) * 1e3)
    assert estimator.moved
    estimator.apply(costs)
    latency_us, rate = CostReader(costs).link(0)
    assert latency_us + 2.7e6 / rate == pytest.approx(9.0 + 2.7e6 / (24800.0 * factor), rel=0.08)
    (drift,) = estimator.drifts()
    assert (drift.kind, drift.device, drift.parameter) == (CostKind.COPY, 0, "bandwidth")
    assert drift.new / drift.old == pytest.approx(factor, rel=0.15)
    assert abs(drift.since_us - 200e3) <= 15e3


def test_drift_reads_as_a_line() -> None:
    estimator = Estimator(costs_of())
    for k in range(60):
        estimator.observe_copy(0, 2.7e6, 9.0 + 2.7e6 / (24800.0 if k < 30 else 6100.0), k * 1e5)
    (drift,) = estimator.drifts()
    assert drift.text(now_us=15e6) == "link 24.8 -> 6.1 GB/s since 12 s"


def test_throttled_cpu_is_followed() -> None:
    """The CPU computes further tokens at half its speed, weights arrive as before."""
    machine = Machine(5, sigma=0.03)
    costs = costs_of()
    estimator = Estimator(costs)
    for k in range(600):
        loads = [int(n) for n in machine.random.integers(1, 40, machine.random.integers(1, 9))]
        slow = 18.0 if k >= 300 else 9.0
        us = 30.0 + sum(69.0 + slow * (n - 1) for n in loads)
        estimator.observe_cpu(k % 4, loads, machine.time(us), k * 1e3)
    estimator.apply(costs)
    reader = CostReader(costs)
    assert reader.expert_us(1) == pytest.approx(69.0, rel=0.1)
    assert reader.expert_us(33) == pytest.approx(69.0 + 32 * 18.0, rel=0.05)
    assert any(d.kind == CostKind.CPU and d.parameter == "tokens" for d in estimator.drifts())


def test_what_is_no_timing_is_counted_only() -> None:
    costs = costs_of()
    estimator = Estimator(costs)
    for us in (math.nan, math.inf, 0.0, -3.0):
        estimator.observe_copy(0, 1e6, us, 0.0)
    estimator.observe_copy(5, 1e6, 10.0, 0.0)
    estimator.observe_cpu(0, [], 10.0, 0.0)
    estimator.observe_gpu(0, 0, [0], 10.0, 0.0)
    assert estimator.n_rejected == 7
    assert not estimator.moved


def test_a_clock_that_jumps_back_changes_labels_only() -> None:
    costs = costs_of()
    estimator = Estimator(costs)
    for k in range(100):
        estimator.observe_copy(0, 2.7e6, 2.7e6 / 24800.0 + 9.0, 1e9 if k % 2 else -1e9)
    estimator.apply(costs)
    assert CostReader(costs).link(0)[1] == pytest.approx(24800.0, rel=0.01)


def test_an_incomplete_cost_model_is_refused() -> None:
    with pytest.raises(CoreError, match="unknown"):
        Estimator(Costs(2, 1))
    with pytest.raises(CoreUsageError, match="2 layers"):
        Estimator(costs_of()).apply(Costs(2, 1))
