"""How experts are shared between CPU and accelerators: what the user may choose, as the plug-in's settings."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import UsageError
from hybrimoe.private_files import make_private_folder

if TYPE_CHECKING:
    from hybrimoe.gguf_model import GgufModel

GIB = 1 << 30


# What a fixed placement leaves nothing to do: field, and the flag that sets it.
UNUSED_WHEN_REPRODUCIBLE = {
    "cache_policy": "--cache-policy",
    "schedule": "--schedule",
    "prefetch": "--prefetch",
    "admission": "--admission",
    "guard": "--guard",
    "live_costs": "live_costs",
    "calibration": "--calibration",
    "costs": "costs",
    "state_dir": "--keep-residency",
}


def not_with_reproducible(reproducible: str, other: str) -> UsageError:
    """The error for an option that has no effect with `--reproducible`; both as the user knows them."""
    return UsageError(
        f"{reproducible} and {other} exclude each other: a fixed placement leaves {other.split()[0]} nothing to decide",
        "leave one of them out (docs/reproducibility.md)",
    )


@dataclass(frozen=True)
class CacheSize:
    """How much of the accelerators' memory experts may take: one of the fields, or none for what is free."""

    n_slots: int | None = None
    n_bytes: int | None = None
    fraction: float | None = None

    @classmethod
    def parse(cls, text: str) -> CacheSize:
        """Reads `auto`, slots per layer (`32`), a share of the experts (`0.25`, `25%`) or a size (`6GiB`).

        Raises ValueError.
        """
        from hybrimoe.config import parse_size

        word = text.strip().lower()
        if word == "auto":
            return cls()
        if re.fullmatch(r"\d+", word):
            return cls(n_slots=int(word))
        if re.fullmatch(r"\d*\.\d+|\d+\.\d*|\d+(\.\d+)?\s*%", word):
            share = float(word.rstrip("% ")) / (100 if word.endswith("%") else 1)
            if share > 1:
                raise ValueError(f"'{text}' is more than all experts")
            return cls(fraction=share)
        try:
            return cls(n_bytes=parse_size(text))
        except ValueError:
            raise ValueError(
                f"'{text}' is neither auto, nor slots per layer, nor a share such as 25%, nor a size such as 6GiB"
            ) from None

    @property
    def is_off(self) -> bool:
        return self.n_slots == 0 or self.n_bytes == 0 or self.fraction == 0

    def setting(self) -> Any:
        """The value of the plug-in's key `expert_cache`."""
        if self.n_slots is not None:
            return self.n_slots
        if self.n_bytes is not None:
            return {"bytes": self.n_bytes}
        return {"fraction": self.fraction} if self.fraction is not None else "auto"


@dataclass(frozen=True)
class ExpertOptions:
    """Policies are the core's, as `name` or `name:param=value,...`; see `docs/policies.md`.

    `devices` None: every GPU; empty: none; names are ggml's, and `CPU` is a second CPU backend as a stand-in.
    `calibration` is a file of `hybrimoe probe`, `costs` is a calibration's cost section that was read already (see
    starting_costs.py); without both, costs are measured when the model starts. `state_dir` is where residency is kept
    from one run to the next; None: nowhere. `pin_threads` are processors for the CPU threads, of which the first stays
    free; empty: none is pinned. The first `n_cpu_layers` layers have no slots. `reproducible` keeps whole layers where
    set-up put them (docs/reproducibility.md) and leaves nothing to policies, guard, costs and kept residency. `extra`
    are further keys of `hybrimoe_configure`.
    """

    cache: CacheSize = CacheSize()
    devices: tuple[str, ...] | None = None
    cache_policy: str = "mrs"
    schedule: str = "two-threshold"
    prefetch: str = "impact"
    admission: str = "pays"
    guard: bool = True
    live_costs: bool = True
    fit_margin_bytes: int = GIB
    pin_experts: bool = False
    pin_threads: tuple[int, ...] = ()
    calibration: Path | None = None
    costs: Mapping[str, Any] | None = None
    state_dir: Path | None = None
    n_cpu_layers: int = 0
    reproducible: bool = False
    extra: Mapping[str, Any] | None = None

    def settings(self, model: GgufModel | None, n_batch: int, known_devices: Sequence[str] | None) -> dict[str, Any]:
        """All keys of `hybrimoe_configure`. `model` None: for whatever is loaded, with neither costs nor residency of
        one model. `known_devices` None: the names are another program's to judge.

        Raises UsageError for unknown devices, policies and parameters, and for what `reproducible` has no use for.
        """
        for name in self.devices or ():
            if known_devices is not None and name not in known_devices:
                known = ", ".join(known_devices)
                raise UsageError(f"--device: there is no device '{name}'", f"ggml has: {known}")
        self._check_policies()
        self._check_reproducible()
        return {
            "devices": "auto" if self.devices is None else list(self.devices),
            "expert_cache": self.cache.setting(),
            "fit_margin_bytes": self.fit_margin_bytes,
            "cache_policy": self.cache_policy,
            "schedule": self.schedule,
            "prefetch": self.prefetch,
            "admission": self.admission,
            "guard": self.guard,
            "live_costs": self.live_costs,
            "reproducible": self.reproducible,
            "costs": None if model is None else self._costs(model),
            "max_batch_tokens": n_batch,
            "state_path": "" if model is None or self.state_dir is None else str(self._state_path(model)),
            "log_to_stderr": False,
            "pin_experts": self.pin_experts,
            "n_cpu_layers": self.n_cpu_layers,
            **({"pin_threads": list(self.pin_threads)} if self.pin_threads else {}),
            **(self.extra or {}),
        }

    def _check_policies(self) -> None:
        for flag, text in (
            ("--cache-policy", self.cache_policy),
            ("--schedule", self.schedule),
            ("--prefetch", self.prefetch),
            ("--admission", self.admission),
        ):
            try:
                check_policy(flag, text)
            except ValueError as error:
                raise UsageError(f"{flag}: {error}", "docs/policies.md lists them") from None

    def _check_reproducible(self) -> None:
        if not self.reproducible:
            return
        for one in fields(self):
            if one.name in UNUSED_WHEN_REPRODUCIBLE and getattr(self, one.name) != one.default:
                flag = UNUSED_WHEN_REPRODUCIBLE[one.name]
                raise not_with_reproducible("--reproducible", flag)

    def _costs(self, model: GgufModel) -> dict[str, Any] | None:
        if self.costs is not None or self.calibration is None:
            return None if self.costs is None else dict(self.costs)
        from hybrimoe import calibration

        return calibration.load(self.calibration).cost_section(model)

    def _state_path(self, model: GgufModel) -> Path:
        if self.state_dir is None:
            raise ValueError("no folder for the state was given")
        make_private_folder(self.state_dir)
        status = model.path.stat()
        identity = f"{model.path.resolve()}\n{status.st_size}\n{status.st_mtime_ns}"
        return self.state_dir / f"experts-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"


def check_policy(flag: str, text: str) -> str:
    """`text` if it is a policy for `flag` that does not need the future. Raises ValueError."""
    from hybrimoe.native.core import Kind, Policy, policies

    kind = {"--cache-policy": Kind.EVICTION, "--schedule": Kind.SCHEDULER, "--prefetch": Kind.PREFETCH}
    given = Policy.parse(text)
    usable = {p.name: p for p in policies(kind.get(flag, Kind.ADMISSION)) if not p.oracle}
    if given.name not in usable:
        raise ValueError(f"there is no '{given.name}', known are {', '.join(usable)}")
    params = [p.name for p in usable[given.name].params]
    for name in given.params:
        if name not in params:
            raise ValueError(f"'{given.name}' has no parameter '{name}', it has {', '.join(params) or 'none'}")
    return text


def default_state_dir() -> Path:
    """Where residency is kept by default."""
    import platformdirs

    return Path(platformdirs.user_state_dir("hybrimoe", appauthor=False))
