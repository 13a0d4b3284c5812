"""What no policy can beat: the time that memory and link need at least."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hybrimoe.machine.files import open_machine

if TYPE_CHECKING:
    from hybrimoe.simulate.grid import Point
    from hybrimoe.simulate.replay import Loaded

__all__ = ["limit_us_per_token"]


def limit_us_per_token(point: Point, loaded: Loaded, gap_us: float) -> float:
    """Bandwidth limit of one decoded token in microseconds, for this cache size on this machine.

    Every demanded expert is read once by the CPU or an accelerator; what even the bypassing Belady does not find in the
    cache is read from main memory, by the CPU or by a copy. So at least
        max(D / (B_gpu + B_cpu), (1 - h) D / min(B_cpu + B_link, B_dram)) + gaps,
    D bytes of demanded experts per token, h the oracle's hit rate over the whole trace, token by token. Where prompts
    are computed in larger steps the oracle may do a little better in decode than that, so there this is an estimate.
    """
    assert point.machine is not None
    trace, core = loaded.trace, loaded.core
    table = open_machine(point.machine).costs(trace.model)
    cpu, gpu, link = table.read_rates()
    dram = math.inf if table.dram_bytes_per_us is None else table.dram_bytes_per_us
    best = loaded.oracle_hits("belady-bypass", point.n_slots if gpu else 0, point.cold)
    ran = (core.experts[:, :, 0] >= 0).sum(axis=0)
    demand = core.top_k * sum(int(n) * size for n, size in zip(ran, trace.model.expert_bytes, strict=True))
    per_token = demand / core.n_tokens
    compute_us = per_token / (gpu + cpu)
    memory_us = per_token * (1 - best / (core.top_k * int(ran.sum()))) / min(cpu + link, dram)
    return float(max(compute_us, memory_us) + gap_us * ran.sum() / core.n_tokens)
