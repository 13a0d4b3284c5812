"""The machine that a plan is made for: this one as probed, or another one from its file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrimoe.calibration import Calibration
    from hybrimoe.gguf_model import GgufModel
    from hybrimoe.profiles import Machine

# Of a machine that is not this one: what the system and other programs keep.
_SYSTEM_BYTES = 2 << 30


@dataclass(frozen=True)
class PlanMachine:
    """Memories in bytes, rates in bytes or multiplications per microsecond.

    `dense_bytes_per_us` and `dense_macs_per_us` are those of the device that holds the dense weights. `costs_of` gives
    the cost section of a calibration for a model, None when nothing is known about its speed; `measured` tells a probe
    from an estimate.
    """

    name: str
    source: str
    ram_bytes: int
    vram_bytes: tuple[int, ...]
    gpu_name: str
    dense_bytes_per_us: float
    dense_macs_per_us: float
    step_us: float
    costs_of: Callable[[GgufModel], Mapping[str, Any] | None]
    measured: bool = False
    node_us: float = 0.0  # of a small node of the decode graph, where it is not part of step_us

    @property
    def has_gpu(self) -> bool:
        return bool(self.vram_bytes)

    @classmethod
    def from_profile(cls, machine: Machine) -> PlanMachine:
        """Another machine, by its preset or file (`hybrimoe.profiles.load`)."""
        gpu = machine.gpu
        return cls(
            name=machine.name,
            source=machine.source,
            ram_bytes=max(0, int(machine.cpu.ram_bytes) - _SYSTEM_BYTES),
            vram_bytes=(int(gpu.vram_bytes),) * gpu.count if gpu else (),
            gpu_name=gpu.name if gpu else "",
            dense_bytes_per_us=(gpu.reached_bytes_per_s if gpu else machine.cpu.stream_bytes_per_s) / 1e6,
            dense_macs_per_us=(gpu.macs_per_s * gpu.compute_efficiency if gpu else machine.cpu.macs_per_s) / 1e6,
            step_us=gpu.step_us if gpu else machine.cpu.step_us,
            costs_of=lambda model: machine.calibration(expert_bytes(model), expert_macs(model)),
        )

    @classmethod
    def here(cls, calibration: Calibration | None = None) -> PlanMachine:
        """This machine; without a calibration no speed is predicted."""
        from hybrimoe.machine import host

        cards = local_cards()
        bare = cls(
            name="this machine",
            source="not probed",
            ram_bytes=host.memory().available_bytes,
            vram_bytes=tuple(n_bytes for _, n_bytes in cards),
            gpu_name=cards[0][0] if cards else "",
            dense_bytes_per_us=0.0,
            dense_macs_per_us=0.0,
            step_us=0.0,
            costs_of=lambda _: None,
        )
        if calibration is None:
            return bare
        return replace(
            bare,
            source=calibration.describe(),
            dense_bytes_per_us=calibration.dense_bytes_per_us(),
            dense_macs_per_us=calibration.dense_macs_per_us(),
            step_us=calibration.step_us(),
            node_us=calibration.node_us(),
            costs_of=calibration.cost_section,
            measured=True,
        )


def local_cards() -> list[tuple[str, int]]:
    """(description, free bytes) of the GPUs that this llama.cpp can use."""
    import ctypes

    from hybrimoe.native.plugin import ggml_library

    ggml = ggml_library()
    # void ggml_backend_dev_memory(ggml_backend_dev_t device, size_t * free, size_t * total)
    size_p = ctypes.POINTER(ctypes.c_size_t)
    ggml.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, size_p, size_p]
    ggml.ggml_backend_dev_memory.restype = None
    cards = []
    for index in range(ggml.ggml_backend_dev_count()):
        device = ggml.ggml_backend_dev_get(index)
        if ggml.ggml_backend_dev_type(device) == 1:  # GGML_BACKEND_DEVICE_TYPE_GPU
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            ggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
            cards.append((ggml.ggml_backend_dev_description(device).decode("utf-8", "replace"), int(free.value)))
    return cards


def moe_layers(model: GgufModel) -> list[Any]:
    """Layers whose experts run in ordinary decoding."""
    return [layer for layer in model.moe_layers if not layer.predicts_ahead]


def expert_bytes(model: GgufModel) -> list[float]:
    """[n_layers] bytes of one expert."""
    return [float(layer.bytes_per_expert) for layer in moe_layers(model)]


def expert_macs(model: GgufModel) -> list[float]:
    """[n_layers] multiplications of one expert per token."""
    return [
        float(sum(t.n_elements // layer.n_experts for t in layer.expert_tensors if t.name.endswith(".weight")))
        for layer in moe_layers(model)
    ]
