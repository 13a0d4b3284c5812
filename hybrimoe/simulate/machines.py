"""Hardware profiles of a simulation: machine presets and files, and calibrations that a probe wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrimoe import profiles
from hybrimoe.errors import UsageError, from_os_error
from hybrimoe.files import read_text
from hybrimoe.native.core import Costs
from hybrimoe.trace.format import ModelIdentity

__all__ = ["THIS_MACHINE", "Hardware", "Rates", "open_machine", "with_model"]

THIS_MACHINE = "this"


@dataclass(frozen=True)
class Rates:
    """Bytes per microsecond that expert products and copies reach for one token; 0 where there is no such part."""

    cpu: float
    gpu: float
    link: float
    dram: float  # infinite: no shared ceiling


@dataclass(frozen=True)
class Hardware:
    """A machine, or a calibration (then `machine` is None)."""

    name: str
    machine: profiles.Machine | None
    calibration: Mapping[str, Any] | None

    def section(self, model: ModelIdentity) -> Mapping[str, Any]:
        """The cost section for a model. Raises UsageError where it cannot be made."""
        if self.machine is not None:
            if not model.knows_bytes:
                raise UsageError(
                    f"a machine's times need an expert's bytes, and the trace of '{model.name}' does not know them",
                    "import it with --expert-bytes SIZE",
                )
            macs = model.expert_macs if model.expert_macs and min(model.expert_macs) > 0 else None
            return self.machine.calibration(model.expert_bytes, macs)
        assert self.calibration is not None
        n = len(self.calibration.get("layer_class", ()))
        if n != model.n_layers:
            raise UsageError(
                f"the calibration '{self.name}' is for {n} MoE layers, '{model.name}' has {model.n_layers}",
                "use a calibration of this model, or a machine: hybrimoe simulate --list-profiles",
            )
        return self.calibration

    def costs(self, model: ModelIdentity) -> tuple[Costs, float | None]:
        """Cost model, and time between two layers' experts (None: unknown)."""
        gap_us: float | None = None
        if self.machine is not None and model.dense_bytes:
            gap_us = self.machine.gap_us(model.dense_bytes, model.n_layers)
        elif self.calibration is not None and "gap_us" in self.calibration:
            gap_us = float(self.calibration["gap_us"])
        return Costs.from_calibration(self.section(model)), gap_us

    def rates(self, model: ModelIdentity) -> Rates:
        """What each part reads per microsecond when it computes one token's expert of the model's first class."""
        section = self.section(model)
        one = section["classes"][0]
        n_bytes = float(one["expert_bytes"])
        dram = section["dram_bytes_per_us"]
        return Rates(
            n_bytes / _one_token_us(one["cpu"]),
            sum(n_bytes / _one_token_us(curve) for curve in one["gpu"]),
            sum(float(d["bytes_per_us"]) for d in section["devices"]),
            float("inf") if dram is None else float(dram),
        )

    def budget_bytes(self, model: ModelIdentity) -> float | None:
        """What `--expert-cache auto` may take: the card's memory less dense weights and a tenth for all else."""
        if self.machine is None or self.machine.gpu is None or not model.dense_bytes:
            return None
        gpu = self.machine.gpu
        return max(0.0, 0.9 * gpu.count * gpu.vram_bytes - model.dense_bytes)


def _one_token_us(curve: Mapping[str, Any]) -> float:
    if "points" in curve:
        return float(curve["points"][0][1])
    return float(curve["fixed_us"]) + float(curve["per_token_us"])


def open_machine(text: str) -> Hardware:
    """A preset, a machine file, a cost section, or a probe's calibration (`this`: this machine's).

    A calibration holds curves per shape of expert, so it needs the model file: `calibration.json@model.gguf`.

    Raises:
        UsageError: it is none of these, or a calibration without a model.
        HybrimoeError: the calibration is missing, damaged, or was changed by hand.
    """
    name, _, model = text.partition("@")
    path = _calibration_path() if name == THIS_MACHINE else Path(name)
    if name == THIS_MACHINE or path.is_file():
        data = _read_json(path) if path.is_file() else {"fit": {}}
        if "fit" in data:
            return _of_probe(name, path, model)
        section = data.get("costs", data)
        if isinstance(section, dict) and "classes" in section:
            return Hardware(path.stem, None, section)
    machine = profiles.load(name)
    return Hardware(machine.name, machine, None)


def with_model(text: str, model: Path | None) -> str:
    """The machine's text with the model that a probe's calibration needs; others stay as they are."""
    path = Path(text)
    is_probe = text == THIS_MACHINE or (path.is_file() and "fit" in _read_json(path))
    return f"{text}@{model}" if is_probe and model is not None else text


def _calibration_path() -> Path:
    from hybrimoe.calibration import default_path

    return default_path()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(read_text(path))
    except OSError as error:
        raise from_os_error(error, f"read '{path}'") from error
    except ValueError as error:
        raise UsageError(f"'{path}' is no JSON: {error}", "a machine or calibration file is expected") from error
    return data if isinstance(data, dict) else {}


def _of_probe(name: str, path: Path, model: str) -> Hardware:
    from hybrimoe.calibration import load
    from hybrimoe.gguf_model import inspect

    calibration = load(path)
    if not model:
        raise UsageError(f"the calibration '{name}' needs the model whose experts it prices", "give it with -m MODEL")
    info = inspect(Path(model)).require_moe()
    section = calibration.cost_section(info)
    n_layers = len(section["layer_class"])
    gap_us = info.dense_bytes / n_layers / calibration.dense_bytes_per_us() + calibration.step_us()
    return Hardware(name, None, {**section, "gap_us": gap_us})
