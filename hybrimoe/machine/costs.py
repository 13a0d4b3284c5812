"""The cost table: what a model's experts cost on a machine, as the policy core, a trace and a file hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import UsageError

if TYPE_CHECKING:
    from hybrimoe.native.core import Costs

__all__ = ["CostTable", "Curve", "Device", "ExpertClass"]

Curve = tuple[tuple[float, float], ...]  # (tokens, microseconds), straight lines between


@dataclass(frozen=True)
class ExpertClass:
    """One expert of a kind of layers: bytes, and its time by tokens on the CPU and on each device. `cpu_first_us`: what
    a layer's first CPU expert takes more."""

    expert_bytes: float
    cpu: Curve
    cpu_first_us: float
    gpu: tuple[Curve, ...]


@dataclass(frozen=True)
class Device:
    """A card's link and the fixed cost of a batch on it."""

    latency_us: float
    bytes_per_us: float
    step_us: float
    ggml_device: int | None = None


@dataclass(frozen=True)
class CostTable:
    """`layer_class[i]` is the class of MoE layer i; `dram_bytes_per_us` None: no ceiling on CPU reads and copies."""

    layer_class: tuple[int, ...]
    classes: tuple[ExpertClass, ...]
    cpu_step_us: float
    dram_bytes_per_us: float | None
    devices: tuple[Device, ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CostTable:
        """Reads a cost section. Raises UsageError for what is none."""
        hint = "run: hybrimoe probe"
        try:
            return cls._of(data)
        except KeyError as error:
            raise UsageError(f"the calibration lacks {error}", hint) from error
        except (TypeError, ValueError, AttributeError, OverflowError, IndexError) as error:
            raise UsageError(f"the calibration is malformed: {error}", hint) from error

    @classmethod
    def _of(cls, data: Mapping[str, Any]) -> CostTable:
        return cls(
            tuple(int(n) for n in data["layer_class"]),
            tuple(
                ExpertClass(
                    float(one["expert_bytes"]),
                    _curve(one["cpu"]),
                    float(one["cpu_first_us"]),
                    tuple(_curve(gpu) for gpu in one["gpu"]),
                )
                for one in data["classes"]
            ),
            float(data["cpu_step_us"]),
            None if data["dram_bytes_per_us"] is None else float(data["dram_bytes_per_us"]),
            tuple(
                Device(float(d["latency_us"]), float(d["bytes_per_us"]), float(d["step_us"]), d.get("ggml_device"))
                for d in data["devices"]
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """The cost section, as `Costs.from_calibration` and the plug-in read it."""
        return {
            "layer_class": list(self.layer_class),
            "classes": [
                {
                    "expert_bytes": one.expert_bytes,
                    "cpu": {"points": [list(point) for point in one.cpu]},
                    "cpu_first_us": one.cpu_first_us,
                    "gpu": [{"points": [list(point) for point in gpu]} for gpu in one.gpu],
                }
                for one in self.classes
            ],
            "cpu_step_us": self.cpu_step_us,
            "dram_bytes_per_us": self.dram_bytes_per_us,
            "devices": [
                {"latency_us": d.latency_us, "bytes_per_us": d.bytes_per_us, "step_us": d.step_us}
                | ({} if d.ggml_device is None else {"ggml_device": d.ggml_device})
                for d in self.devices
            ],
        }

    def costs(self) -> Costs:
        """The policy core's cost model. Raises CoreUsageError for values out of range."""
        from hybrimoe.native.core import Costs

        return Costs.from_calibration(self.to_json())

    def with_ceiling(self, bytes_per_us: float) -> CostTable:
        return replace(self, dram_bytes_per_us=bytes_per_us)

    def read_rates(self) -> tuple[float, float, float]:
        """(CPU, all devices, all links): bytes per microsecond that experts of the first class are read with, one token
        each; 0 where there is no such part."""
        one = self.classes[0]
        return (
            one.expert_bytes / one.cpu[0][1],
            sum(one.expert_bytes / curve[0][1] for curve in one.gpu),
            sum(device.bytes_per_us for device in self.devices),
        )

    def one_token_us(self, layer: int, device: int | None = None) -> float:
        """Time of one expert with one token, on the CPU (None) or on a device, without fixed costs."""
        one = self.classes[self.layer_class[layer]]
        return (one.cpu if device is None else one.gpu[device])[0][1]


def _curve(data: Mapping[str, Any]) -> Curve:
    if "points" in data:
        return tuple((float(n), float(us)) for n, us in data["points"])
    fixed, per_token = float(data["fixed_us"]), float(data["per_token_us"])
    return ((1.0, fixed + per_token), (2.0, fixed + 2 * per_token))


def layer_classes(kinds: Sequence[Any]) -> tuple[list[Any], tuple[int, ...]]:
    """(each kind once, the number of each layer's kind)."""
    unique = list(dict.fromkeys(kinds))
    return unique, tuple(unique.index(kind) for kind in kinds)
