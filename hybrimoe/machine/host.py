"""What this machine has: cores, memory within its limits, vector instructions, graphics cards."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_CPU_FOLDER = Path("/sys/devices/system/cpu")
_PERFORMANCE_CPUS = Path("/sys/devices/cpu_core/cpus")
_CGROUP = Path("/sys/fs/cgroup")


def physical_cpus() -> list[int]:
    """One processor of each physical core that this process may run on, performance cores only where there are any."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    performance = _performance_cpus()
    by_core: dict[str, int] = {}
    for cpu in sorted(allowed & performance or allowed):
        try:
            core = (_CPU_FOLDER / f"cpu{cpu}" / "topology" / "thread_siblings").read_text()
        except OSError:
            core = str(cpu)
        by_core.setdefault(core, cpu)
    return list(by_core.values())


def n_physical_cores() -> int:
    """Cores that llama.cpp would use by default, at most as many as this process may run on.

    As in llama.cpp (`common_cpu_get_num_math`): one thread per physical core, and on a hybrid Intel CPU only per
    performance core. Unlike llama.cpp it respects the CPU affinity, because threads without a core of their own stall
    the others.
    """
    allowed = _allowed_cpus()
    performance = _performance_cpus()
    siblings = set()
    for folder in _CPU_FOLDER.glob("cpu[0-9]*"):
        number = int(folder.name[3:])
        if performance and number not in performance:
            continue
        with contextlib.suppress(OSError):
            siblings.add((folder / "topology" / "thread_siblings").read_text())
    n_cores = len(siblings)
    if n_cores == 0:
        # llama.cpp's guess where the system does not tell.
        n_logical = os.cpu_count() or 4
        n_cores = n_logical if n_logical <= 4 else n_logical // 2
    return max(1, min(n_cores, allowed))


def n_logical_cpus() -> int:
    """Hardware threads this process may run on: what llama.cpp takes for a thread count of 0 or less."""
    return _allowed_cpus()


def _allowed_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _performance_cpus() -> set[int]:
    """Performance cores of a hybrid Intel CPU; empty on every other CPU."""
    try:
        text = _PERFORMANCE_CPUS.read_text().strip()
    except OSError:
        return set()
    cpus: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus


@dataclass(frozen=True)
class Memory:
    """Main memory in bytes. `limit_bytes` is a container's limit, None where there is none."""

    total_bytes: int
    available_bytes: int
    limit_bytes: int | None


def memory() -> Memory:
    """Memory of the machine, cut to what a control group allows this process."""
    import psutil

    system = psutil.virtual_memory()
    limit, left = _cgroup_memory()
    available = system.available if left is None else min(system.available, left)
    return Memory(int(system.total), int(available), limit)


def _cgroup_memory() -> tuple[int | None, int | None]:
    """(limit, bytes left) of the tightest control group of version 2 above this process, or of version 1."""
    limit: int | None = None
    left: int | None = None
    for folder in _cgroup_folders():
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            most, used = _read_int(folder / limit_name), _read_int(folder / used_name)
            # Version 1 writes "no limit" as a number near 2^63.
            if most is None or used is None or most >= 1 << 60:
                continue
            room = max(0, most - used + _reclaimable_bytes(folder))
            limit = most if limit is None else min(limit, most)
            left = room if left is None else min(left, room)
    return limit, left


def _cgroup_folders() -> list[Path]:
    folders = [_CGROUP, _CGROUP / "memory"]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            controllers, _, name = line.partition(":")[2].partition(":")
            root = _CGROUP if controllers == "" else _CGROUP / "memory"
            if controllers in ("", "memory"):
                parts = [p for p in name.split("/") if p not in ("", "..")]
                folders += [root.joinpath(*parts[:n]) for n in range(1, len(parts) + 1)]
    return folders


def _reclaimable_bytes(folder: Path) -> int:
    """The page cache, which counts as used but gives way: a model that was mapped before is no lost memory.

    Pages that were read twice stand in the active list and give way as well.
    """
    found: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in (folder / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name.endswith("active_file"):
                found[name] = int(value)
    # Version 1 counts this group alone, and with `total_` its children too.
    prefix = "total_" if "total_inactive_file" in found else ""
    return found.get(f"{prefix}inactive_file", 0) + found.get(f"{prefix}active_file", 0)


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class Cpu:
    name: str
    n_cores: int
    n_threads: int
    instructions: tuple[str, ...]

    @property
    def level(self) -> str:
        """The best vector extension, as a word: 'AVX-512 VNNI', 'AVX-512', 'AVX2', 'AVX', 'SSE' or 'unknown'."""
        for flag, level in (
            ("avx512_vnni", "AVX-512 VNNI"),
            ("avx512f", "AVX-512"),
            ("avx_vnni", "AVX-VNNI"),
            ("avx2", "AVX2"),
            ("avx", "AVX"),
            ("sse4_2", "SSE 4.2"),
            ("asimd", "NEON"),
        ):
            if flag in self.instructions:
                return level
        return "unknown"


def cpu() -> Cpu:
    name = "unknown CPU"
    instructions: tuple[str, ...] = ()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and name == "unknown CPU":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                instructions = tuple(value.split())
                break
    return Cpu(name, n_physical_cores(), n_logical_cpus(), instructions)


@dataclass(frozen=True)
class Gpu:
    """A graphics card that the system knows, whether llama.cpp can use it or not. `kind`: 'cuda' or 'vulkan'."""

    name: str
    kind: str
    memory_bytes: int | None

    @property
    def build_command(self) -> str:
        """The command that builds llama-cpp-python for this card."""
        from importlib import metadata

        release = metadata.version("llama-cpp-python")
        return (
            f'CMAKE_ARGS="-DGGML_{self.kind.upper()}=on" pip install --force-reinstall --no-cache-dir --no-deps '
            f"--no-binary llama-cpp-python llama-cpp-python=={release}"
        )


_NVIDIA_DRIVER = Path("/proc/driver/nvidia/gpus")
# Less is a processor's own graphics, which gains nothing.
_DISCRETE_BYTES = 3 << 30


def notable_gpu() -> Gpu | None:
    """A card worth building llama-cpp-python for; quick enough for every start (no driver tool is run)."""
    for folder in sorted(_NVIDIA_DRIVER.glob("*")):
        with contextlib.suppress(OSError):
            for line in (folder / "information").read_text(errors="replace").splitlines():
                key, _, value = line.partition(":")
                if key.strip() == "Model":
                    return Gpu(value.strip(), "cuda", None)
    return next((gpu for gpu in _drm_gpus() if (gpu.memory_bytes or 0) >= _DISCRETE_BYTES), None)


def gpus() -> list[Gpu]:
    """Cards found through the driver's own tools and the system's device nodes; software renderers do not count."""
    return _nvidia_gpus() or _drm_gpus()


def _nvidia_gpus() -> list[Gpu]:
    tool = shutil.which("nvidia-smi")
    if not tool:
        return []
    command = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in done.stdout.splitlines():
        name, _, mebibytes = line.rpartition(",")
        if name:
            size = int(mebibytes) << 20 if mebibytes.strip().isdigit() else None
            found.append(Gpu(name.strip(), "cuda", size))
    return found


_PCI_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}


def _drm_gpus() -> list[Gpu]:
    found = []
    for device in sorted(Path("/sys/class/drm").glob("renderD*/device")):
        with contextlib.suppress(OSError):
            vendor = (device / "vendor").read_text().strip()
            if vendor in _PCI_VENDORS:
                size = _read_int(device / "mem_info_vram_total")
                found.append(Gpu(f"{_PCI_VENDORS[vendor]} graphics ({device.parent.name})", "vulkan", size))
    return found


def n_numa_nodes() -> int:
    """Memory nodes of the system; 1 where it does not tell."""
    return max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))))
