"""Samples of synthetic machines, as a probe would take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

SHAPE = {"n_embd": 2048, "n_ff": 768, "gate_type": 12, "down_type": 12, "op": 2}
Samples = Callable[..., dict[str, Any]]


@pytest.fixture
def samples() -> Samples:
    """`samples(sigma=0.05, outliers=0.05, seed=0, device=False)`: step 8 us, first 30, expert 120 + 6 a further token;
    with `device` also a card: step 40, expert 30 + 0.5, link 9 us and 24.8 GB/s."""

    def make(sigma: float = 0.05, outliers: float = 0.05, seed: int = 0, device: bool = False) -> dict[str, Any]:
        random = np.random.default_rng(seed)

        def times(us: float, n: int = 60) -> list[float]:
            late = np.where(random.random(n) < outliers, random.uniform(3, 25, n), 1.0)
            return [float(v) for v in us * late * np.exp(random.normal(0, sigma, n))]

        def batches(step: float, first: float, one: float, more: float, **extra: Any) -> list[dict[str, Any]]:
            every = [(0, 1), (1, 1), (2, 1), (4, 1), (8, 1), (4, 4), (4, 16), (4, 64)]
            return [
                {
                    **extra,
                    "n_active": a,
                    "n_tokens": t,
                    "us": times(step + (first + a * (one + more * (t - 1)) if a else 0.0)),
                }
                for a, t in every
            ]

        data: dict[str, Any] = {
            "read": [{"n_threads": 2, "bytes_per_us": 30e3}],
            "cpu": [
                {
                    "shape": SHAPE,
                    "n_experts": 64,
                    "samples": batches(8.0, 30.0, 120.0, 6.0, n_threads=2),
                    "nodes": [{"n_threads": 2, "n_nodes": 256, "us": times(512.0)}],
                    "dense": [{"n_threads": 2, "n_bytes": 1 << 20, "us": times((1 << 20) / 11e3)}],
                }
            ],
            "devices": [],
            "disk": {"n_bytes": 1 << 28, "us": (1 << 28) / 2000.0},
            "failures": [],
        }
        if device:
            rates = {"h2d_pinned": (9.0, 24800.0), "h2d_pageable": (15.0, 9000.0), "d2h_pinned": (11.0, 22000.0)}
            copies = [
                {"kind": kind, "n_bytes": n, "us": times(latency + n / rate)}
                for kind, (latency, rate) in rates.items()
                for n in (1 << k for k in range(12, 27, 2))
            ]
            experts = {"shape": SHAPE, "samples": [b for b in batches(40.0, 0.0, 30.0, 0.5) if b["n_active"]]}
            data["devices"] = [
                {
                    "device": 3,
                    "copies": copies,
                    "sync_us": times(12.0),
                    "together": {"read_bytes_per_us": 20e3, "copy_bytes_per_us": 18e3},
                    "experts": [experts],
                }
            ]
        return data

    return make
