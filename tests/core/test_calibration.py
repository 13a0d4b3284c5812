"""Fits on synthetic machines: known parameters plus noise and outliers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hybrimoe.native.core import CoreUsageError
from hybrimoe.native.core_calibration import fit_costs


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
