"""A machine whose costs change while it runs: what the engine's decisions come to, and what they could have come to.

Runtime, estimator, trials and guard are the engine's own objects. They decide by what they believe; a virtual machine
executes at the true costs and reports timings as the engine measures them. Times are simulated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import UsageError, from_os_error
from hybrimoe.files import read_text
from hybrimoe.json_text import parse_json
from hybrimoe.native.core import Costs
from hybrimoe.native.core_runtime import GuardLevel, MachinePhase, Runtime

if TYPE_CHECKING:
    import numpy.typing as npt

    from hybrimoe.machine.costs import CostTable, Curve
    from hybrimoe.native.core_replay import Trace
    from hybrimoe.trace.format import ModelIdentity

__all__ = [
    "MOST_TOKENS",
    "WINDOW",
    "ClosedLoop",
    "Disturbance",
    "Factors",
    "MachineChanges",
    "Phase",
    "Window",
    "read_changes",
    "run_closed_loop",
]

WINDOW = 32  # tokens
MOST_TOKENS = 1 << 20  # of a run: some minutes
_TOKENS_AFTER_CHANGES = 512
_MOST_CARDS = 8  # of the core
# CPU reads and copies together, over what the CPU reads alone, where a profile has no ceiling: dual-channel desktops
# reach 44-45 GB/s together and 37-38 alone, servers more.
_CEILING_OVER_CPU = 1.3


@dataclass(frozen=True)
class Factors:
    """Of times: 2 is twice as slow as the profile says."""

    cpu: float = 1.0
    gpu: float = 1.0
    link: float = 1.0
    dram: float = 1.0


@dataclass(frozen=True)
class Disturbance:
    """What timings suffer beside the costs."""

    noise: float = 0.04  # standard deviation of the logarithm of every time
    outlier_share: float = 0.0
    outlier_factor: float = 30.0
    waits_every_layers: int = 0  # an accelerator's batch waits in each so-manyth layer; 0: never
    waits_us: float = 0.0


@dataclass(frozen=True)
class Phase:
    """What is true from one token on."""

    from_token: int
    factors: Factors = field(default_factory=Factors)
    disturbance: Disturbance = field(default_factory=Disturbance)


@dataclass(frozen=True)
class MachineChanges:
    """The file of `--machine-changes`; docs/simulate.md describes it."""

    profile: str | Mapping[str, Any]
    phases: tuple[Phase, ...]
    believed: Factors = field(default_factory=Factors)
    seed: int = 1
    live: bool = True
    guard: bool = True

    @property
    def default_n_tokens(self) -> int:
        """Long enough to see what comes of the last change."""
        return self.phases[-1].from_token + _TOKENS_AFTER_CHANGES


@dataclass(frozen=True)
class Window:
    """32 tokens. Microseconds are of the MoE layers of one token."""

    first_token: int
    us_per_token: float
    oracle_us_per_token: float
    plain_us_per_token: float
    to_oracle: float  # over the same policies told the true costs
    to_plain: float  # over the better plain placement: all experts on the CPU, or the first whole layers on the card
    trying: float  # share of the time that went into trials and into slots filled anew
    guard: str  # the lowest level in the window
    n_trials: int
    experts_gpu: int
    copies: int
    believed: Factors  # at the window's end, over the true costs


@dataclass(frozen=True)
class ClosedLoop:
    """What came of it."""

    model: str
    policy: str
    n_slots: int
    n_tokens: int
    windows: tuple[Window, ...]

    @property
    def worst_to_oracle_last_third(self) -> float:
        """Of the windows of the last third."""
        return max(w.to_oracle for w in self.windows[-max(1, len(self.windows) // 3) :])

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        worst = self.worst_to_oracle_last_third
        return {**asdict(self), "worst_to_oracle_last_third": worst, "simulated": True}


def read_changes(path: Path) -> MachineChanges:
    """Reads the file of `--machine-changes`.

    Raises:
        UsageError: it is not valid; the message names the key.
        HybrimoeError: it cannot be read.
    """
    try:
        data = parse_json(read_text(path))
    except OSError as error:
        raise from_os_error(error, f"read '{path}'") from error
    except ValueError as error:
        raise UsageError(f"'{path}' is not valid JSON: {error}", "docs/simulate.md describes the file") from error
    try:
        return _changes(data)
    except _Fault as fault:
        raise UsageError(f"'{path}': {fault}", "docs/simulate.md describes the file") from None


class _Fault(Exception):
    pass


def _changes(data: Any) -> MachineChanges:
    top = _object(data, "the file", ("profile", "believed", "phases", "seed", "live", "guard", *_DISTURBANCE))
    if not isinstance(top.get("profile"), str | dict):
        raise _Fault("'profile' must be the name of a machine, or a cost section")
    usual = _disturbance(top, Disturbance(), "")
    given = top.get("phases")
    if not isinstance(given, list) or not given:
        raise _Fault("'phases' must be a list with at least one phase")
    phases: list[Phase] = []
    for number, one in enumerate(given):
        name = f"phases[{number}]"
        phase = _object(one, name, ("from_token", *_FACTORS, *_DISTURBANCE))
        first = phase.get("from_token")
        if not isinstance(first, int) or isinstance(first, bool) or not 0 <= first < MOST_TOKENS:
            raise _Fault(f"'{name}.from_token' must be a token's number, below {MOST_TOKENS}")
        if first != 0 and not phases:
            raise _Fault("the first phase must begin with token 0")
        if phases and first <= phases[-1].from_token:
            raise _Fault(f"'{name}.from_token' is not after the phase before it")
        phases.append(Phase(first, _factors(phase, name), _disturbance(phase, usual, f"{name}.")))
    believed = _object(top.get("believed", {}), "believed", _FACTORS)
    seed = top.get("seed", 1)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 1 << 64:
        raise _Fault("'seed' must be a number of at most 64 bits")
    switches = {name: top.get(name, True) for name in ("live", "guard")}
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise _Fault(f"'{name}' must be true or false")
    return MachineChanges(top["profile"], tuple(phases), _factors(believed, "believed"), seed, **switches)


_FACTORS = ("cpu", "gpu", "link", "dram")
_DISTURBANCE = ("noise", "outliers", "waits")


def _object(value: Any, name: str, keys: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Fault(f"{name} must be an object")
    for key in value:
        if key not in keys:
            raise _Fault(f"there is no '{key}' in {name}; known are {', '.join(keys)}")
    return value


def _number(value: Any, name: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise _Fault(f"'{name}' must be a number in {low:g}..{high:g}")
    return float(value)


def _factors(given: Mapping[str, Any], name: str) -> Factors:
    return Factors(**{k: _number(given[k], f"{name}.{k}", 1e-3, 1e6) for k in _FACTORS if k in given})


def _disturbance(given: Mapping[str, Any], usual: Disturbance, prefix: str) -> Disturbance:
    out = usual
    if "noise" in given:
        out = replace(out, noise=_number(given["noise"], f"{prefix}noise", 0.0, 0.99))
    if "outliers" in given:
        one = _object(given["outliers"], f"{prefix}outliers", ("share", "factor"))
        share = _number(one.get("share", out.outlier_share), f"{prefix}outliers.share", 0.0, 0.99)
        factor = _number(one.get("factor", out.outlier_factor), f"{prefix}outliers.factor", 1e-3, 1e6)
        out = replace(out, outlier_share=share, outlier_factor=factor)
    if "waits" in given:
        one = _object(given["waits"], f"{prefix}waits", ("every_layers", "us"))
        every = one.get("every_layers", out.waits_every_layers)
        if not isinstance(every, int) or isinstance(every, bool) or not 0 <= every <= 1024:
            raise _Fault(f"'{prefix}waits.every_layers' must be a number of layers, at most 1024")
        us = _number(one.get("us", out.waits_us), f"{prefix}waits.us", 0.0, 1e9)
        out = replace(out, waits_every_layers=every, waits_us=us)
    return out


def _scaled_curve(curve: Curve, factor: float) -> Curve:
    return tuple((n, us * factor) for n, us in curve)


def _scaled(table: CostTable, f: Factors) -> Costs:
    """The costs of the same machine with other times."""
    assert table.dram_bytes_per_us is not None
    return replace(
        table,
        classes=tuple(
            replace(
                one,
                cpu=_scaled_curve(one.cpu, f.cpu),
                cpu_first_us=one.cpu_first_us * f.cpu,
                gpu=tuple(_scaled_curve(curve, f.gpu) for curve in one.gpu),
            )
            for one in table.classes
        ),
        cpu_step_us=table.cpu_step_us * f.cpu,
        dram_bytes_per_us=table.dram_bytes_per_us / f.dram,
        devices=tuple(
            replace(
                device,
                latency_us=device.latency_us * f.link,
                bytes_per_us=device.bytes_per_us / f.link,
                step_us=device.step_us * f.gpu,
            )
            for device in table.devices
        ),
    ).costs()


def _costs_of(changes: MachineChanges, model: ModelIdentity) -> tuple[CostTable, float]:
    """The machine's cost table for the model, with a ceiling, and the gap between two layers' experts."""
    from hybrimoe.machine.files import open_machine
    from hybrimoe.machine.machine import from_section

    hint = "docs/simulate.md describes the file"
    try:
        if isinstance(changes.profile, str):
            machine = open_machine(changes.profile)
        else:
            machine = from_section("costs", changes.profile)
    except OSError as error:  # a name that is no path at all
        raise from_os_error(error, "open the machine in 'profile'") from error
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UsageError(f"'profile' is not a cost section: {error}", hint) from error
    if len(machine.cards) > _MOST_CARDS:
        raise UsageError(f"'{machine.name}' has more than {_MOST_CARDS} cards", f"give it gpus={_MOST_CARDS} or fewer")
    try:
        table = machine.costs(model)
        if table.dram_bytes_per_us is None:
            table = table.with_ceiling(_CEILING_OVER_CPU * table.read_rates()[0])
        table.costs()
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UsageError(f"'profile' is not a cost section: {error}", hint) from error
    if not table.devices:
        raise UsageError(f"'{machine.name}' has no card: there is nothing to decide", "name a machine with one")
    return table, machine.gap_us(model) or 0.0


def run_closed_loop(
    trace: Trace,
    model: ModelIdentity,
    changes: MachineChanges,
    n_slots: int,
    *,
    n_tokens: int | None = None,
    policy: str = "lru",
    admission: str = "pays",
    schedule: str = "two-threshold",
    prefetch: str = "none",
) -> ClosedLoop:
    """Runs the changes twice, as the engine would and told the true costs, under the same noise.

    Args:
        n_slots: per layer, over all cards of the machine.
        n_tokens: the trace is repeated until there are so many; None: 512 after the last change.
    """
    n_tokens = n_tokens or changes.default_n_tokens
    table, gap_us = _costs_of(changes, model)
    n_devices = len(table.devices)
    # As the engine shares slots out: evenly, and no layer has more slots than experts.
    share = math.ceil(n_slots / n_devices)
    slots = [[max(0, min(share, n_slots - d * share))] * trace.n_layers for d in range(n_devices)]
    phases = [
        MachinePhase(
            p.from_token,
            _scaled(table, p.factors),
            p.disturbance.noise,
            p.disturbance.outlier_share,
            p.disturbance.outlier_factor,
            p.disturbance.waits_every_layers,
            p.disturbance.waits_us,
        )
        for p in changes.phases
    ]

    def run(costs: Costs, is_told: bool) -> npt.NDArray[Any]:
        runtime = Runtime(
            costs,
            trace.n_expert,
            trace.top_k,
            slots,
            eviction=policy,
            admission=admission,
            schedule=schedule,
            prefetch=prefetch,
            preload=True,
        )
        return runtime.closed_loop(
            trace,
            phases,
            n_tokens,
            gap_us=gap_us,
            seed=changes.seed,
            live=changes.live and not is_told,
            guard=changes.guard and not is_told,
            trials=changes.live and not is_told,
            is_told=is_told,
        )

    ours = run(_scaled(table, changes.believed), False)
    oracle = run(phases[0].costs, True)
    windows = [_window(ours[i : i + WINDOW], oracle[i : i + WINDOW], i) for i in range(0, n_tokens, WINDOW)]
    return ClosedLoop(model.name, policy, n_slots, n_tokens, tuple(windows))


def _window(ours: npt.NDArray[Any], oracle: npt.NDArray[Any], first: int) -> Window:
    us = float(ours["us"].sum())
    oracle_us = float(oracle["us"].sum())
    plain_us = min(float(ours["cpu_only_us"].sum()), float(ours["whole_layers_us"].sum()))
    return Window(
        first_token=first,
        us_per_token=us / len(ours),
        oracle_us_per_token=oracle_us / len(ours),
        plain_us_per_token=plain_us / len(ours),
        to_oracle=_ratio(us, oracle_us),
        to_plain=_ratio(us, plain_us),
        trying=float(ours["trying_us"].sum()) / us if us else 0.0,
        guard=GuardLevel(int(ours["level"].max())).label,
        n_trials=int(ours["n_trials"].sum()),
        experts_gpu=int(ours["n_gpu"].sum()),
        copies=int(ours["n_copies"].sum()),
        believed=Factors(*(float(ours[f"believed_{name}"][-1]) for name in _FACTORS)),
    )


def _ratio(us: float, of_us: float) -> float:
    """1 where no layer ran."""
    return us / of_us if of_us else 1.0
