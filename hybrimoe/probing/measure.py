"""What is measured, in which order and for how long. Samples only; what they mean is `fit`'s business.

Every measurement takes repeated runs for a share of the time budget; single runs are kept, so that the fit can judge
their spread. Thread counts, tokens and active experts vary within one shape, because cost depends on all of them.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hybrimoe.errors import HybrimoeError
from hybrimoe.native.probe import CopyKind, CpuProbe, DeviceProbe, FfnShape, read_rate

Samples = list[list[float]]

# More than any cache of a desktop's last level; a server's larger one still holds less than all of it.
_QUICK_BYTES, _FULL_BYTES = 384 << 20, 1 << 30
_LEAST_FREE_BYTES = 1 << 30
_QUICK_TOKENS = (1, 2, 4, 16, 64)
_FULL_TOKENS = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256)
_ACTIVE = (1, 2, 4, 8)
_BATCH_ACTIVE = 4
_NODES = 256
_ROUNDS = 4
_COPY_BYTES = tuple(1 << k for k in range(12, 27, 2))
_DISK_BYTES = 256 << 20


@dataclass(frozen=True)
class Request:
    """What to probe. `shapes` with their label; `devices` are indices in ggml's registry; `disk_path` a large file."""

    shapes: tuple[FfnShape, ...]
    n_threads: tuple[int, ...]
    devices: tuple[int, ...] = ()
    seconds: float = 5.0
    disk_path: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Request:
        shapes = tuple(FfnShape(**s) for s in data["shapes"])
        return cls(shapes, tuple(data["n_threads"]), tuple(data["devices"]), data["seconds"], data["disk_path"])

    @property
    def quick(self) -> bool:
        return self.seconds < 15


@dataclass
class _Progress:
    report: Callable[[str, float], None]
    total_s: float
    start: float = field(default_factory=time.monotonic)

    def at(self, what: str) -> None:
        self.report(what, min(0.99, (time.monotonic() - self.start) / self.total_s))


def measure(request: Request, report: Callable[[str, float], None]) -> dict[str, Any]:
    """All samples of one probe. Raises HybrimoeError when memory is too short to measure anything.

    A device that cannot be measured is named in `failures`; the rest is measured all the same.
    """
    from hybrimoe.machine import host

    free = host.memory().available_bytes
    if free < _LEAST_FREE_BYTES:
        raise HybrimoeError(
            f"only {free / 2**30:.2f} GiB of memory are free, too little to measure with", "close other programs"
        )
    room = min(_QUICK_BYTES if request.quick else _FULL_BYTES, free // 4)
    progress = _Progress(report, request.seconds)
    failures: list[str] = []
    # Shares of the time: experts on the CPU get most, they have the most to tell.
    n_parts = len(request.shapes) * (1 + len(request.devices))
    each = 0.75 * request.seconds / max(1, n_parts)
    progress.at("reading memory")
    data: dict[str, Any] = {"read": _read(request, room), "cpu": [], "devices": [], "disk": None}
    for shape in request.shapes:
        progress.at("experts on the CPU")
        data["cpu"].append({"shape": asdict(shape), **_cpu(shape, request, room, each)})
    for device in request.devices:
        progress.at("copies and experts on the card")
        try:
            data["devices"].append(_device(device, request, room, each))
        except HybrimoeError as error:
            failures.append(f"device {device}: {error.message}")
            data["devices"].append(None)
    if request.disk_path:
        progress.at("reading the disk")
        data["disk"] = _disk(Path(request.disk_path), 0.1 * request.seconds)
    data["failures"] = failures
    return data


def _read(request: Request, room: int) -> list[dict[str, float]]:
    seconds = 0.1 * request.seconds / len(request.n_threads) / 2
    return [{"n_threads": n, "bytes_per_us": read_rate(n, room, seconds)} for n in request.n_threads for _ in range(2)]


def _matrix_bytes(number: int, n_in: int, n_out: int) -> int:
    from hybrimoe.gguf_header import GGML_TYPES

    kind = GGML_TYPES[number]
    return n_in // kind.block_elems * kind.block_bytes * n_out


def gate_bytes(shape: FfnShape) -> int:
    """Bytes of one expert's gate matrix."""
    return _matrix_bytes(shape.gate_type, shape.n_embd, shape.n_ff)


def expert_bytes(shape: FfnShape) -> int:
    """Bytes of one expert of this shape."""
    return 2 * gate_bytes(shape) + _matrix_bytes(shape.down_type, shape.n_ff, shape.n_embd)


def _n_experts(shape: FfnShape, room: int) -> int:
    # More than eight at once must be there, or caches of the batch before would serve the next one.
    return int(min(256, max(2 * max(_ACTIVE), room // expert_bytes(shape))))


_Run = Callable[[int], list[float]]


def _timed(runs: Sequence[_Run], seconds: float) -> list[list[float]]:
    """Single runs of every job, all together for about `seconds`, at least four each.

    In rounds over all jobs: what disturbs the machine for a moment then touches a part of each, not all of one.
    """
    times: list[list[float]] = [[] for _ in runs]
    each = []
    for run in runs:
        run(1)  # warms up
        share = seconds / len(runs) / _ROUNDS
        each.append(int(max(1, min(50, share * 1e6 / max(run(1)[0], 1.0)))))
    for _ in range(_ROUNDS):
        for run, n, kept in zip(runs, each, times, strict=True):
            kept += run(n)
    return times


def _cpu(shape: FfnShape, request: Request, room: int, seconds: float) -> dict[str, Any]:
    n_experts = _n_experts(shape, room)
    tokens = _QUICK_TOKENS if request.quick else _FULL_TOKENS
    samples: list[dict[str, Any]] = []
    with CpuProbe(shape, n_experts) as probe:
        # The last thread count is the one that will be used: it gets half of the time and all batch sizes.
        for n_threads in request.n_threads:
            last = n_threads == request.n_threads[-1]
            batches = [(0, 1), *((a, 1) for a in _ACTIVE)]
            if last:
                batches += [(_BATCH_ACTIVE, t) for t in tokens if t > 1]
            share = seconds * (0.5 if last and len(request.n_threads) > 1 else 0.5 / max(1, len(request.n_threads) - 1))
            all_us = _timed([partial(probe.run, a, t, n_threads) for a, t in batches], share)
            for (n_active, n_tokens), us in zip(batches, all_us, strict=True):
                samples.append({"n_threads": n_threads, "n_active": n_active, "n_tokens": n_tokens, "us": us})
        nodes = [{"n_threads": n, "n_nodes": _NODES, "us": probe.nodes(_NODES, n, 20)} for n in request.n_threads]
        n_bytes = _BATCH_ACTIVE * gate_bytes(shape)
        dense = [
            {"n_threads": n, "n_bytes": n_bytes, "us": probe.dense(_BATCH_ACTIVE, n, 20)} for n in request.n_threads
        ]
    return {"n_experts": n_experts, "samples": samples, "nodes": nodes, "dense": dense}


def _device(device: int, request: Request, room: int, seconds: float) -> dict[str, Any]:
    tokens = _QUICK_TOKENS if request.quick else _FULL_TOKENS
    out: dict[str, Any] = {"device": device, "copies": [], "experts": []}
    for number, shape in enumerate(request.shapes):
        with DeviceProbe(device, shape, _n_experts(shape, room)) as probe:
            if number == 0:
                _copies(probe, out, _n_experts(shape, room) * expert_bytes(shape) // 4, 0.5 * seconds)
                out["sync_us"] = probe.sync(50)
                rates = probe.together(request.n_threads[-1], room, 0.1 * seconds)
                out["together"] = {"read_bytes_per_us": rates[0], "copy_bytes_per_us": rates[1]}
            batches = [*((a, 1) for a in _ACTIVE), *((_BATCH_ACTIVE, t) for t in tokens if t > 1)]
            all_us = _timed([partial(probe.run, a, t) for a, t in batches], 0.5 * seconds)
            samples = [{"n_active": a, "n_tokens": t, "us": us} for (a, t), us in zip(batches, all_us, strict=True)]
            out["experts"].append({"shape": asdict(shape), "samples": samples})
    return out


def _copies(probe: DeviceProbe, out: dict[str, Any], most_bytes: int, seconds: float) -> None:
    jobs = [(kind, n) for kind in CopyKind if probe.has(kind) for n in _COPY_BYTES if n <= most_bytes]
    all_us = _timed([partial(probe.copy, kind, n) for kind, n in jobs], seconds)
    for (kind, n_bytes), us in zip(jobs, all_us, strict=True):
        out["copies"].append({"kind": kind.name.lower(), "n_bytes": n_bytes, "us": us})


def _disk(path: Path, seconds: float) -> dict[str, Any] | None:
    """Sequential reads past the page cache, where the system lets us drop it."""
    chunk = 8 << 20
    n_bytes = 0
    try:
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            while n_bytes < _DISK_BYTES and time.perf_counter() - start < max(0.2, seconds):
                got = len(file.read(chunk))
                if not got:
                    break
                n_bytes += got
            passed = time.perf_counter() - start
    except OSError:
        return None
    return {"n_bytes": n_bytes, "us": passed * 1e6} if n_bytes and passed > 0 else None


def run_in_child(request: Request, report: Callable[[str, float], None]) -> dict[str, Any]:
    """`measure` in a process of its own: a driver that fails takes only that one with it.

    Raises HybrimoeError when the child fails; Ctrl-C ends it.
    """
    import json
    import subprocess
    import sys

    command = [sys.executable, "-m", "hybrimoe.probing.worker"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        try:
            assert child.stdin is not None and child.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(json.dumps(request.to_dict()))
                child.stdin.close()
            for line in child.stdout:
                try:
                    message = json.loads(line)
                except ValueError:
                    continue
                if "result" in message:
                    return dict(message["result"])
                if "error" in message:
                    raise HybrimoeError(message["error"], message.get("hint", ""))
                report(message["step"], message["share"])
        finally:
            child.kill()
    raise HybrimoeError(f"the probe's process ended with {child.returncode}", "hybrimoe doctor")


def thread_counts(n_default: int, n_logical: int, *, quick: bool) -> tuple[int, ...]:
    """Thread counts worth a look; the default one is last."""
    counts: Sequence[int] = (1, max(1, n_default // 2)) if quick else (1, 2, n_default // 2, n_default - 1, n_logical)
    return (*sorted({n for n in counts if 0 < n <= n_logical} - {n_default}), n_default)
