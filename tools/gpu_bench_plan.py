"""What `tools/bench_gpu.py` measures: rows, stages, their memory, and how it searches for the best opponent."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrimoe.gguf_model import GgufModel

# An improvement below this is noise to the searches.
SEARCH_GAIN = 1.01
# Issue 5's goals: (tests that start so, scenarios) -> least ratio to the best stock row at equal GPU memory.
GOALS: Mapping[tuple[str, str], float] = {
    ("decode", "normal"): 1.5,
    ("prefill", "normal"): 1.0,
    ("decode", "worst"): 0.97,
    ("prefill", "worst"): 0.97,
}


@dataclass(frozen=True)
class Row:
    """One way of running a model.

    `kind`: `stock` (no plug-in in the process), `ours`, or `baseline` (another llama.cpp's llama-bench). `n_cpu_moe`:
    layers from the first whose experts stay on the CPU; None: all of them (-cmoe). `host` False is `--no-host`, `mmap`
    False `--load-mode none`. `settings` go to the plug-in; `cache_mib` and `cpu_share` to the baseline.
    """

    name: str
    kind: str
    n_cpu_moe: int | None = None
    host: bool = True
    mmap: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    cache_mib: int = 0
    cpu_share: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


STOCK_VARIANTS = (
    Row("stock -cmoe", "stock"),
    Row("stock -cmoe --no-host", "stock", host=False),
    Row("stock -cmoe --load-mode none", "stock", mmap=False),
)


def stock_on_gpu(variant: Row, n_cpu_moe: int) -> Row:
    """The same way of loading, with the experts of the layers from `n_cpu_moe` on in GPU memory."""
    name = variant.name.replace("-cmoe", f"-ncmoe {n_cpu_moe}")
    return Row(name, "stock", n_cpu_moe=n_cpu_moe, host=variant.host, mmap=variant.mmap)


@dataclass(frozen=True)
class OursOptions:
    """What all rows of ours share in one stage."""

    devices: tuple[str, ...]
    cache_bytes: int
    route_trace: str = ""
    throttle_bytes_per_s: float = 0.0
    max_batch_tokens: int = 512

    def row(self, name: str = "ours", **settings: Any) -> Row:
        given: dict[str, Any] = {
            "devices": list(self.devices),
            "expert_cache": {"bytes": self.cache_bytes},
            "max_batch_tokens": self.max_batch_tokens,
            "log_to_stderr": False,
        }
        if self.route_trace:
            given["route_trace"] = self.route_trace
        if self.throttle_bytes_per_s:
            given["throttle_link_bytes_per_s"] = self.throttle_bytes_per_s
        return Row(name, "ours", settings={**given, **settings})


# --- memory -----------------------------------------------------------------------------------------------------------


def expert_bytes_on_gpu(model: GgufModel, n_cpu_moe: int | None) -> int:
    """Bytes of experts in GPU memory with `-ncmoe n_cpu_moe`; 0 with -cmoe (None)."""
    if n_cpu_moe is None:
        return 0
    return sum(layer.expert_bytes for layer in model.moe_layers if layer.index >= n_cpu_moe)


def least_n_cpu_moe(model: GgufModel, cache_bytes: int) -> int:
    """The smallest N whose experts on the GPU take no more than `cache_bytes`; all layers at most."""
    return next(
        (n for n in range(model.n_layers) if expert_bytes_on_gpu(model, n) <= cache_bytes),
        model.n_layers,
    )


def row_bytes(model: GgufModel, row: Row, cache_bytes: int, n_ctx: int) -> int:
    """An estimate of the GPU memory of a row: dense weights, KV, experts, and half a GiB of compute buffers."""
    experts = cache_bytes if row.kind != "stock" else expert_bytes_on_gpu(model, row.n_cpu_moe)
    return model.dense_bytes + model.kv.bytes_for(n_ctx, 2.0, 2.0) + experts + (512 << 20)


# --- searches ---------------------------------------------------------------------------------------------------------


def search_least(
    low: int, high: int, speed: Callable[[int], float | None], max_runs: int = 8
) -> tuple[int, dict[int, float]]:
    """The n in [low, high] of the highest speed, for a speed with one peak that is expected near `low`.

    `speed` returns None where n does not run (out of memory). Steps double while they gain, then close in. Returns the
    best n and every speed measured. Raises ValueError when nothing runs within `max_runs` runs.
    """
    known: dict[int, float | None] = {}

    def at(n: int) -> float:
        if n not in known:
            if len(known) >= max_runs:
                return -math.inf
            known[n] = speed(n)
        value = known[n]
        return -math.inf if value is None else value

    n, step = low, 1
    while at(n) == -math.inf and n < high and len(known) < max_runs:
        n = min(high, n + step)
        step *= 2
    best, step = n, 1
    while best + step <= high and at(best + step) > at(best) * SEARCH_GAIN:
        best, step = best + step, 2 * step
    while step > 1:
        step //= 2
        for candidate in (best - step, best + step):
            if low <= candidate <= high and at(candidate) > at(best) * SEARCH_GAIN:
                best = candidate
    at(high)
    measured = {n: value for n, value in known.items() if value is not None}
    if not measured:
        raise ValueError("nothing ran")
    return max(measured, key=lambda n: measured[n]), measured


def best_of(speeds: Mapping[str, float]) -> str:
    """The key of the highest value, the first of equals. Raises ValueError for none."""
    if not speeds:
        raise ValueError("nothing was measured")
    return max(speeds, key=lambda key: speeds[key])


# --- the limit that the devices set -----------------------------------------------------------------------------------


def least_step_us(n_experts: float, n_hits: float, cpu_us: float, gpu_us: float, copy_us: float) -> float:
    """The shortest time in which CPU, GPU and link, each busy without a gap, compute one layer's experts.

    `n_experts` are to be computed, of which `n_hits` are in GPU memory; times are per expert, infinite where unknown.
    Experts are divisible here, so that no plan can beat it.
    """
    if n_experts <= 0:
        return 0.0

    def makespan(on_cpu: float) -> float:
        on_gpu = n_experts - on_cpu
        copied = max(0.0, on_gpu - n_hits)
        return max(
            on_cpu * cpu_us if on_cpu else 0.0, on_gpu * gpu_us if on_gpu else 0.0, copied * copy_us if copied else 0.0
        )

    # The CPU's term rises with its share and the others fall: bisect for where they cross.
    low, high = 0.0, float(n_experts)
    for _ in range(60):
        middle = (low + high) / 2
        on_gpu = n_experts - middle
        others = max(on_gpu * gpu_us, max(0.0, on_gpu - n_hits) * copy_us if on_gpu > n_hits else 0.0)
        if middle * cpu_us < others:
            low = middle
        else:
            high = middle
    return min(makespan(low), makespan(high), makespan(float(n_experts)), makespan(0.0))


# --- stages -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One unit of work that is resumed as a whole or by its rounds.

    `what`: `variants` (which way of loading is stock's best), `opponents` (-ncmoe and the baseline's share, searched),
    `compare` (stock, baseline, ours, ours without the guard), `policies`. `scenario`: normal, throttled or uniform.
    """

    what: str
    model: str
    fraction: float = 0.0
    scenario: str = "normal"

    @property
    def key(self) -> str:
        parts = [self.what, self.model.rpartition("/")[2].removesuffix(".gguf")]
        if self.what != "variants":
            parts.append(f"{self.fraction:.0%}")
        if self.scenario != "normal":
            parts.append(self.scenario)
        return " ".join(parts)

    @property
    def is_worst_case(self) -> bool:
        # Mixtral's experts are large and few, and it is used without a trace: routing without locality.
        return self.scenario != "normal" or self.model == "mixtral"


def make_stages(
    models: Sequence[str],
    fractions: Sequence[float],
    kinds: Sequence[str],
    *,
    policy_fractions: Sequence[float],
    worst_fraction: float,
) -> list[Stage]:
    """All stages, what matters most first: a run cut short has the first model's figures, then its worst cases."""
    stages: list[Stage] = []

    def prepare(model: str, fraction: float) -> None:
        for stage in (Stage("variants", model), Stage("opponents", model, fraction)):
            if stage not in stages:
                stages.append(stage)

    def compare(model: str, fraction: float, scenario: str = "normal") -> None:
        prepare(model, fraction)
        stages.append(Stage("compare", model, fraction, scenario))

    for number, model in enumerate(models):
        if "compare" in kinds:
            for fraction in fractions:
                compare(model, fraction)
        if number == 0:
            for scenario in ("throttled", "uniform"):
                if scenario in kinds:
                    compare(model, worst_fraction, scenario)
            if "policies" in kinds:
                for fraction in policy_fractions:
                    prepare(model, fraction)
                    stages.append(Stage("policies", model, fraction))
    return stages


class TimeBudget:
    """Whether there is time for one more round; `clock` returns seconds."""

    def __init__(self, max_s: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._start = clock()
        self._max_s = max_s

    @property
    def used_s(self) -> float:
        return self._clock() - self._start

    def allows(self, expected_s: float) -> bool:
        return self.used_s + expected_s <= self._max_s
