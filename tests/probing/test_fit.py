"""Fits of whole probes on synthetic machines."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hybrimoe.probing.fit import BadFitError, fit_all

Samples = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("outliers", [0.0, 0.1])
def test_parameters_are_found(samples: Samples, outliers: float, seed: int) -> None:
    fit = fit_all(samples(outliers=outliers, seed=seed, device=True))
    cpu = fit["cpu"][0]["by_threads"]["2"]
    points = dict(map(tuple, cpu["points"]))
    assert points[1.0] == pytest.approx(120.0, rel=0.05)
    assert points[64.0] == pytest.approx(120.0 + 63 * 6.0, rel=0.05)
    assert cpu["step_us"] == pytest.approx(8.0, rel=0.05)
    assert cpu["first_us"] == pytest.approx(30.0, rel=0.25)  # small beside the rest: what it adds to is within 5 %
    assert cpu["step_us"] + cpu["first_us"] + points[1.0] == pytest.approx(158.0, rel=0.05)
    assert cpu["node_us"] == pytest.approx(2.0, rel=0.05)
    assert cpu["dense_bytes_per_us"] == pytest.approx(11e3, rel=0.05)
    (device,) = fit["devices"]
    link = device["copies"]["h2d_pinned"]
    assert link["latency_us"] == pytest.approx(9.0, rel=0.05)
    assert link["bytes_per_us"] == pytest.approx(24800.0, rel=0.05)
    assert device["copies"]["h2d_pageable"]["bytes_per_us"] == pytest.approx(9000.0, rel=0.05)
    assert device["sync_us"] == pytest.approx(12.0, rel=0.05)
    assert device["dram_bytes_per_us"] == 38e3
    experts = device["experts"][0]
    assert dict(map(tuple, experts["points"]))[1.0] == pytest.approx(30.0, rel=0.05)
    assert experts["step_us"] == pytest.approx(40.0, rel=0.1)
    assert fit["disk_bytes_per_us"] == pytest.approx(2000.0)


def test_a_curve_never_falls(samples: Samples) -> None:
    data = samples(sigma=0.2)
    points = fit_all(data)["cpu"][0]["by_threads"]["2"]["points"]
    assert [us for _, us in points] == sorted(us for _, us in points)


def test_noise_is_refused_with_its_reason(samples: Samples) -> None:
    data = samples(sigma=0.9)
    with pytest.raises(BadFitError, match=r"experts on 2 CPU threads (differ|vary)"):
        fit_all(data)


def test_times_that_do_not_grow_are_refused(samples: Samples) -> None:
    data = samples(outliers=0.0)
    for one in data["cpu"][0]["samples"]:
        one["us"] = [100.0 / max(1, one["n_active"])] * 20
    with pytest.raises(BadFitError, match="experts on 2 CPU threads"):
        fit_all(data)


def test_a_bad_card_costs_the_card_only(samples: Samples) -> None:
    data = samples(device=True)
    other = copy.deepcopy(data["devices"][0])
    random = np.random.default_rng(1)
    for one in other["copies"]:
        one["us"] = [float(v) for v in random.uniform(1, 1e5, 60)]
    data["devices"].append(other)
    data["devices"].append(None)
    data["failures"] = ["device 5: it vanished"]
    fit = fit_all(data)
    assert fit["devices"][0] is not None
    assert fit["devices"][1:] == [None, None]
    assert fit["reasons"][0] == "device 5: it vanished" and "copies" in fit["reasons"][1]
