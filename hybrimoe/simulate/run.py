"""Runs many replays in parallel processes; the order of the results is that of the points."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from hybrimoe.native.core import Kind, Policy
from hybrimoe.simulate.grid import Point, describe
from hybrimoe.simulate.replay import Loaded, Row, replay

__all__ = ["load", "run"]

# Layer steps in all, below which starting processes takes longer than the work.
_WORTH_PROCESSES = 3_000_000


@lru_cache(maxsize=2)
def load(path: Path, n_prompts: int | None, with_lookahead: bool) -> Loaded:
    """A trace as replays need it; the last ones are kept."""
    from hybrimoe.trace.format import read

    trace = read(path, want=("weights", "scores", "lookahead") if with_lookahead else ("weights", "scores"))
    return Loaded(trace if n_prompts is None else trace.head(n_prompts))


def _needs_lookahead(point: Point) -> bool:
    return (
        point.machine is not None
        and point.lookahead == "recorded"
        and describe(Kind.PREFETCH, Policy.parse(point.prefetch).name).needs_scores
    )


def _run_one(numbered: tuple[int, Point]) -> tuple[int, Row]:
    number, point = numbered
    return number, replay(point, load(point.trace, point.n_prompts, _needs_lookahead(point)))


def _ignore_interrupt() -> None:
    # Ctrl-C reaches the whole group; the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def run(points: Sequence[Point], n_jobs: int, progress: Callable[[float], None] = lambda share: None) -> list[Row]:
    """Rows of all points, in their order.

    Args:
        n_jobs: processes at once.
        progress: called with the share of the points that are done.

    Raises:
        HybrimoeError: the first one that a replay raised; the others are ended.
    """
    rows: list[Row | None] = [None] * len(points)
    n_done = 0

    def keep(number: int, row: Row) -> None:
        nonlocal n_done
        rows[number] = row
        n_done += 1
        progress(n_done / len(points))

    if min(n_jobs, len(points)) < 2 or _work(points) < _WORTH_PROCESSES:
        for numbered in enumerate(points):
            keep(*_run_one(numbered))
    else:
        import multiprocessing

        # Fresh processes: no state of this one, threads of llama.cpp among it, can reach the results.
        with multiprocessing.get_context("spawn").Pool(min(n_jobs, len(points)), _ignore_interrupt) as pool:
            for number, row in pool.imap_unordered(_run_one, enumerate(points)):
                keep(number, row)
    return [row for row in rows if row is not None]


def _work(points: Sequence[Point]) -> int:
    sizes = {p.trace: load(p.trace, p.n_prompts, False).trace.experts.shape[:2] for p in points}
    return sum(int(sizes[p.trace][0]) * int(sizes[p.trace][1]) * (20 if p.machine else 1) for p in points)
