"""The calibration: what a probe found out about this machine, kept in a file and turned into the cost model's input.

The file is keyed by machine, devices, drivers and build, and carries samples, fit, residuals and date. What does not
match, or was changed by hand, is measured again, never believed; what fits badly is refused with its reason. It is
written whole (temporary file, then rename), so that a probe killed at any point leaves the old one.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import HybrimoeError, from_os_error
from hybrimoe.files import check_replaceable, read_text
from hybrimoe.json_text import parse_json
from hybrimoe.native.probe import FfnShape
from hybrimoe.private_files import make_private_folder, private_opener

if TYPE_CHECKING:
    from hybrimoe.gguf_model import GgufModel, MoeLayer

__all__ = ["Calibration", "CalibrationError", "default_path", "load", "load_matching", "load_or_probe", "probe"]

FORMAT = 1
_MOST = 1e18  # of any figure
QUICK_SECONDS, FULL_SECONDS = 5.0, 30.0
# Types that the CPU kernels know (native/kernels/moe_kernels.h), by ggml's numbers.
_KERNEL_TYPES = (0, 1, 2, 3, 8, 12, 13, 14, 20, 23, 30, 39)
_F16, _Q4_0, _Q4_K = 1, 2, 12
_SWIGLU, _SWIGLU_OAI = 2, 3
# Probes of one machine differ by some per cent: a smaller advantage is none.
_CLEARLY = 0.95
# Probed where no model is given: Qwen3-30B-A3B's expert, the most common small one.
_USUAL_SHAPE = FfnShape(2048, 768, _Q4_K, _Q4_K)


class CalibrationError(HybrimoeError):
    """There is no usable calibration; the message says why."""


@dataclass(frozen=True)
class Calibration:
    """One probe's outcome. `data` is the file's content."""

    data: Mapping[str, Any]
    path: Path | None = None

    @property
    def fit(self) -> Mapping[str, Any]:
        return dict(self.data["fit"])

    @property
    def reasons(self) -> list[str]:
        """Why devices were left out."""
        return list(self.fit["reasons"])

    @property
    def devices(self) -> list[Mapping[str, Any]]:
        """Accelerators with a good fit, each with its index in ggml's registry as `device`."""
        return [d for d in self.fit["devices"] if d is not None]

    @property
    def n_threads(self) -> int:
        """The thread count that CPU costs are given for by default: the last that was probed."""
        return int(self.data["n_threads"][-1])

    def describe(self) -> str:
        """When and how it was measured."""
        return f"probed {self.data['date']}"

    def covers(self, shapes: Sequence[FfnShape], n_threads: int | None = None) -> bool:
        """Whether every shape was measured, with this number of threads."""
        known = [_shape_of(c["shape"]) for c in self.fit["cpu"] if str(n_threads or self.n_threads) in c["by_threads"]]
        return all(shape in known for shape in shapes)

    def cost_section(
        self, model: GgufModel, n_threads: int | None = None, devices: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """What `Costs.from_calibration` reads, for a model's MoE layers and the devices with a good fit.

        `devices` are indices in ggml's registry; None: all. Shapes that were not measured take the nearest one's costs,
        scaled by their bytes and multiplications. Raises CalibrationError for a device without a good fit.
        """
        chosen = self.devices if devices is None else [self._device(index) for index in devices]
        layers = [layer for layer in model.moe_layers if not layer.predicts_ahead]
        kinds = [(shape_of(layer), layer.bytes_per_expert) for layer in layers]
        classes = list(dict.fromkeys(kinds))
        ceilings = [d["dram_bytes_per_us"] for d in chosen]
        cpu = [self._cpu(shape, n_bytes, n_threads) for shape, n_bytes in classes]
        return {
            "layer_class": [classes.index(kind) for kind in kinds],
            "classes": [
                {
                    "expert_bytes": float(n_bytes),
                    "cpu": {"points": cpu[i]["points"]},
                    "cpu_first_us": cpu[i]["first_us"],
                    "gpu": [{"points": _nearest(d["experts"], shape, n_bytes)["points"]} for d in chosen],
                }
                for i, (shape, n_bytes) in enumerate(classes)
            ],
            "cpu_step_us": min((c["step_us"] for c in cpu), default=0.0),
            "dram_bytes_per_us": max(ceilings) if ceilings else None,
            "devices": [self._link(d) for d in chosen],
        }

    def _device(self, index: int) -> Mapping[str, Any]:
        for device in self.devices:
            if device["device"] == index:
                return device
        why = "; ".join(self.reasons) or "it was not there then"
        raise CalibrationError(f"the calibration has no costs of device {index}: {why}", "hybrimoe probe")

    def best_threads(self, model: GgufModel) -> tuple[int, int]:
        """(for decode, for prefill): of the thread counts that were probed, those with which experts are fastest.

        The default count, the last that was probed, unless another one is clearly better: more can be slower.
        """
        layers = [layer for layer in model.moe_layers if not layer.predicts_ahead]

        def us(n: int, n_tokens: int) -> float:
            total = 0.0
            for layer in layers:
                costs = self._cpu(shape_of(layer), layer.bytes_per_expert, n)
                point = costs["points"][0 if n_tokens == 1 else -1][1]
                total += costs["step_us"] + costs["first_us"] + layer.n_experts_used * point
            return total

        def best(n_tokens: int) -> int:
            usual = us(self.n_threads, n_tokens)
            least, n = min((us(n, n_tokens), n) for n in self.data["n_threads"])
            return int(n) if least < _CLEARLY * usual else self.n_threads

        return best(1), best(2)

    def _cpu(self, shape: FfnShape, n_bytes: float, n_threads: int | None) -> dict[str, Any]:
        n = str(n_threads or self.n_threads)
        entries = [
            {"shape": c["shape"], **(c["by_threads"].get(n) or c["by_threads"][str(self.n_threads)])}
            for c in self.fit["cpu"]
        ]
        return _nearest(entries, shape, n_bytes)

    @staticmethod
    def _link(device: Mapping[str, Any]) -> dict[str, Any]:
        link = device["copies"]["h2d_pinned"] or device["copies"]["h2d_pageable"]
        step = min(e["step_us"] for e in device["experts"])
        return {
            "latency_us": link["latency_us"],
            "bytes_per_us": link["bytes_per_us"],
            "step_us": step,
            "ggml_device": device["device"],
        }

    def _best(self) -> Mapping[str, Any]:
        """The curve of whoever holds the dense weights: the first card, else the CPU."""
        if self.devices:
            return dict(self.devices[0]["experts"][0])
        one = self.fit["cpu"][0]
        return {"shape": one["shape"], **one["by_threads"][str(self.n_threads)]}

    def dense_bytes_per_us(self) -> float:
        """What matrix-vector products read where the dense weights are.

        On the CPU the probe's own products through ggml: llama.cpp's repacked copy is about as fast for most types
        (faster for Q4_0), and some types have none. A card reads at the rate of its expert batches.
        """
        from hybrimoe.probing.measure import expert_bytes

        best = self._best()
        if "dense_bytes_per_us" in best:
            return float(best["dense_bytes_per_us"])
        return expert_bytes(_shape_of(best["shape"])) / float(best["points"][0][1])

    def dense_macs_per_us(self) -> float:
        """Multiplications of large batches where the dense weights are."""
        best = self._best()
        n_tokens, us = best["points"][-1]
        return float(3 * best["shape"]["n_embd"] * best["shape"]["n_ff"] * n_tokens / us)

    def node_us(self) -> float:
        """What one small node of a decode graph takes on the CPU; 0 where a card computes them."""
        return 0.0 if self.devices else float(self._best()["node_us"])

    def step_us(self) -> float:
        """Fixed cost of a batch of experts."""
        return float(self._best()["step_us"])

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all. Raises HybrimoeError."""
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            make_private_folder(path.parent)
            check_replaceable(path)
            try:
                with open(part, "w", encoding="utf-8", opener=private_opener) as file:
                    json.dump({**self.data, "checksum": _checksum(self.data)}, file, indent=1)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            raise from_os_error(error, f"write '{path}'") from error


def default_path() -> Path:
    """`calibration.json` in the user's data folder, beside the models; HYBRIMOE_CALIBRATION names another file."""
    import platformdirs

    given = os.environ.get("HYBRIMOE_CALIBRATION")
    return Path(given) if given else Path(platformdirs.user_data_dir("hybrimoe", appauthor=False)) / "calibration.json"


def _checksum(data: Mapping[str, Any]) -> str:
    content = {k: v for k, v in data.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load(path: Path) -> Calibration:
    """Reads a calibration. Raises CalibrationError when it is missing, corrupt, edited, or of another format."""
    hint = "hybrimoe probe"
    try:
        data = parse_json(read_text(path))
    except FileNotFoundError:
        raise CalibrationError(f"there is no calibration '{path}'", hint) from None
    except (OSError, ValueError) as error:
        raise CalibrationError(f"the calibration '{path}' cannot be read: {error}", hint) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CalibrationError(f"the calibration '{path}' is of another format", hint)
    if data.get("checksum") != _checksum(data):
        raise CalibrationError(f"the calibration '{path}' was changed by hand or is damaged", hint)
    found = Calibration(data, path)
    try:
        _check(found)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, ZeroDivisionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise CalibrationError(f"the calibration '{path}' is malformed ({what})", hint) from error
    return found


def _check(found: Calibration) -> None:
    """Raises what reading a part raises that is not as `probe` makes it: its checksum says nothing about that."""
    if not isinstance(found.data.get("key", {}), dict):
        raise TypeError("the key is no object")
    if not all(isinstance(reason, str) for reason in found.reasons) or not isinstance(found.data["date"], str):
        raise TypeError("a text is none")
    counts = found.data["n_threads"]
    if not isinstance(counts, list) or not counts or not all(type(n) is int and n > 0 for n in counts):
        raise TypeError("the numbers of threads are none")
    threads = [str(n) for n in counts]
    for one in found.fit["cpu"]:
        _check_shape(one["shape"])
        for n in threads:
            _check_curve(one["by_threads"][n])
            _positive(one["by_threads"][n].get("dense_bytes_per_us", 1))
            _positive(one["by_threads"][n]["node_us"], zero=True)
    if not found.fit["cpu"]:
        raise ValueError("nothing of the CPU")
    for device in found.devices:
        int(device["device"])
        _positive(device["dram_bytes_per_us"])
        for one in device["experts"]:
            _check_shape(one["shape"])
            _check_curve(one)
        link = found._link(device)
        _positive(link["latency_us"], zero=True)
        _positive(link["bytes_per_us"])
    for rate in found.fit.get("read_bytes_per_us", {}).values():
        _positive(rate)
    if found.fit.get("disk_bytes_per_us") is not None:
        _positive(found.fit["disk_bytes_per_us"])


def _check_shape(data: Mapping[str, Any]) -> None:
    from hybrimoe.probing.measure import expert_bytes

    shape = _shape_of(data)
    if not all(type(value) is int for value in asdict(shape).values()) or min(shape.n_embd, shape.n_ff) < 1:
        raise TypeError("a shape is none")
    _positive(expert_bytes(shape))


def _check_curve(data: Mapping[str, Any]) -> None:
    _positive(data["step_us"], zero=True)
    _positive(data["first_us"], zero=True)
    if not data["points"]:
        raise ValueError("a curve without points")
    for n_tokens, us in data["points"]:
        _positive(n_tokens)
        _positive(us)


def _positive(value: Any, *, zero: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r:.40} is no number")
    if not 0 <= value <= _MOST or (value == 0 and not zero):
        raise ValueError(f"{value!r:.40} is out of range")


def machine_key() -> dict[str, Any]:
    """What a calibration holds for: this machine, its devices with their drivers, and this build."""
    from hybrimoe import nvml
    from hybrimoe.llama_log import llama_log
    from hybrimoe.machine import host
    from hybrimoe.native.plugin import load_plugin

    llama_log()
    plugin = load_plugin()
    cpu = host.cpu()
    return {
        "cpu": cpu.name,
        "n_cores": cpu.n_cores,
        "vector_level": cpu.level,
        "memory_gib": round(host.memory().total_bytes / 2**30),
        "devices": [name for _, name in accelerators()],
        "drivers": sorted({card["driver"] for card in nvml.cards()}),
        "plugin": plugin.version,
        "ggml": plugin.ggml_version,
        "kernels": os.environ.get("HYBRIMOE_CPU", "auto"),
    }


def accelerators() -> list[tuple[int, str]]:
    """(index in ggml's registry, description) of the GPUs that this llama.cpp can use, HYBRIMOE_BACKENDS' too.

    Raises PluginError for a module that cannot be loaded.
    """
    from hybrimoe.native.backend_modules import backend_module_paths, load_backend_modules
    from hybrimoe.native.plugin import ggml_library

    load_backend_modules(backend_module_paths())
    ggml = ggml_library()
    found = []
    for index in range(ggml.ggml_backend_dev_count()):
        device = ggml.ggml_backend_dev_get(index)
        if ggml.ggml_backend_dev_type(device) in (1, 2):  # GGML_BACKEND_DEVICE_TYPE_GPU, _IGPU
            found.append((index, ggml.ggml_backend_dev_description(device).decode("utf-8", "replace")))
    return found


def shape_of(layer: MoeLayer) -> FfnShape:
    """The shape to probe for a layer's experts; types without kernels of our own are stood for by a common one."""
    from hybrimoe.gguf_header import GGML_TYPES

    numbers = {t.name: n for n, t in GGML_TYPES.items()}
    gate = up = down = None
    for tensor in layer.expert_tensors:
        if not tensor.name.endswith(".weight"):
            continue
        if "ffn_down_" in tensor.name:
            down = tensor
        elif "ffn_up_" in tensor.name:
            up = tensor
        else:
            gate = tensor
    first = gate or up
    assert first is not None and down is not None
    n_embd, n_ff = down.shape[1], down.shape[0]

    def kind(name: str, n_in: int) -> int:
        number = numbers[name]
        if number in _KERNEL_TYPES:
            return number
        return _Q4_K if n_in % 256 == 0 else _Q4_0 if n_in % 32 == 0 else _F16

    biased = any(t.name.endswith(".bias") for t in layer.expert_tensors)
    op = _SWIGLU_OAI if biased and "MXFP4" in layer.expert_types else _SWIGLU
    return FfnShape(n_embd, n_ff, kind(first.type_name, n_embd), kind(down.type_name, n_ff), op)


def model_shapes(model: GgufModel | None) -> tuple[FfnShape, ...]:
    """Different shapes of a model's experts; the usual one without a model."""
    if model is None:
        return (_USUAL_SHAPE,)
    return tuple(dict.fromkeys(shape_of(layer) for layer in model.moe_layers if not layer.predicts_ahead))


def _shape_of(data: Mapping[str, Any]) -> FfnShape:
    return FfnShape(**data)


def _nearest(entries: Sequence[Mapping[str, Any]], shape: FfnShape, n_bytes: float) -> dict[str, Any]:
    """The costs of `shape`, or of the entry nearest to it in bytes, scaled."""
    import math

    from hybrimoe.probing.measure import expert_bytes

    def distance(entry: Mapping[str, Any]) -> tuple[int, float]:
        other = _shape_of(entry["shape"])
        return (
            (other != shape) + (other.gate_type != shape.gate_type),
            abs(math.log(expert_bytes(other) / n_bytes)),
        )

    best = min(entries, key=distance)
    other = _shape_of(best["shape"])
    of_bytes = n_bytes / expert_bytes(other)
    of_macs = shape.n_embd * shape.n_ff / (other.n_embd * other.n_ff)
    one = best["points"][0][1]
    points = [[n, one * of_bytes + (us - one) * of_macs] for n, us in best["points"]]
    return {**best, "points": points}


def probe(
    shapes: Sequence[FfnShape],
    *,
    seconds: float = QUICK_SECONDS,
    n_threads: int | None = None,
    devices: Sequence[int] | None = None,
    disk_path: Path | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Calibration:
    """Measures this machine. `devices` None: all GPUs. Raises CalibrationError when the fit is bad, HybrimoeError."""
    from hybrimoe import nvml
    from hybrimoe.machine import host
    from hybrimoe.probing.fit import BadFitError, fit_all
    from hybrimoe.probing.measure import Request, run_in_child, thread_counts

    n_default = n_threads or host.n_physical_cores()
    threads = thread_counts(n_default, max(n_default, host.n_logical_cpus()), quick=seconds < FULL_SECONDS / 2)
    key = machine_key()
    chosen = tuple(devices) if devices is not None else tuple(index for index, _ in accelerators())
    request = Request(tuple(shapes), threads, chosen, seconds, str(disk_path or ""))
    samples = run_in_child(request, progress or (lambda _step, _share: None))
    try:
        fit = fit_all(samples)
    except BadFitError as error:
        raise CalibrationError(
            f"the probe was disturbed: {error}", "close other programs, then: hybrimoe probe"
        ) from None
    now = datetime.datetime.now(datetime.timezone.utc)
    return Calibration(
        json.loads(
            json.dumps(
                {
                    "format": FORMAT,
                    "key": key,
                    "date": now.strftime("%Y-%m-%d %H:%M UTC"),
                    "seconds": seconds,
                    "n_threads": list(threads),
                    "shapes": [asdict(s) for s in shapes],
                    "cards": nvml.cards(),
                    "numa_nodes": host.n_numa_nodes(),
                    "fit": fit,
                    "samples": samples,
                }
            )
        )
    )


def load_matching(path: Path, model: GgufModel | None, n_threads: int | None = None) -> Calibration:
    """The calibration in a file, if it is of this machine and build and holds the model's experts.

    Raises CalibrationError.
    """
    found = load(path)
    reason = _mismatch(found, model_shapes(model), n_threads)
    if reason:
        raise CalibrationError(reason, "hybrimoe probe")
    return found


def load_or_probe(
    model: GgufModel | None = None,
    *,
    path: Path | None = None,
    n_threads: int | None = None,
    devices: Sequence[int] | None = None,
    seconds: float = QUICK_SECONDS,
    progress: Callable[[float], None] | None = None,
) -> tuple[Calibration, str]:
    """The calibration for this machine and model, from the file, or from a probe whose result is kept.

    Returns it with the reason for probing, '' when the file served. `calibration.cost_section(model)` is the input of
    `Costs.from_calibration`; its `devices` may be fewer than the cards, `reasons` says why. Raises HybrimoeError
    (CalibrationError for a bad fit): misses are then to be computed on the CPU only. A file that cannot be written
    is told in the reason.
    """
    path = path or default_path()
    shapes = model_shapes(model)
    try:
        return load_matching(path, model, n_threads), ""
    except CalibrationError as error:
        reason = error.message
    made = probe(
        shapes,
        seconds=seconds,
        n_threads=n_threads,
        devices=devices,
        disk_path=model.path if model is not None else None,
        progress=None if progress is None else lambda _step, share: progress(share),
    )
    reason = f"{reason}: this machine was probed"
    try:
        made.save(path)
    except HybrimoeError as error:
        reason += f", but the result cannot be kept ({error.message})"
    return made, reason


def _mismatch(found: Calibration, shapes: Sequence[FfnShape], n_threads: int | None) -> str:
    """Why a calibration does not hold here; '' when it does."""
    key = machine_key()
    theirs = found.data.get("key", {})
    differ = [name for name in key if theirs.get(name) != key[name]]
    if differ:
        return f"the calibration is of another machine or build ({', '.join(differ)} differ)"
    try:
        return "" if found.covers(shapes, n_threads) else "the calibration does not hold this model's experts"
    except (KeyError, TypeError, IndexError):
        return "the calibration is malformed"
