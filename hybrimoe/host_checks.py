"""What of this machine's settings costs speed: huge pages, where models lie, clocks and heat, the card's link and
memory, limits on locked memory. Every finding names its mend."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrimoe.doctor import Finding

__all__ = ["host_findings"]

# File systems whose pages come over a network, or through a program of their own.
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "sshfs", "fuse.sshfs", "9p", "ceph", "glusterfs", "lustre", "afs")
_SLOW_CLOCK = 0.75
_LEAST_FREE_VRAM = 2 << 30
# Copies to a card run from a ring of pinned buffers of this size.
_STAGING_BYTES = 256 << 20
_HOT_MARGIN_C = 5.0


def host_findings(
    models_dir: Path, *, root: Path = Path("/"), cards: Sequence[Mapping[str, Any]] | None = None
) -> list[Finding]:
    """All findings. `root` is where /proc and /sys are; `cards` as of `nvml.cards` (None: ask it)."""
    if cards is None:
        from hybrimoe import nvml

        cards = nvml.cards()
    found: list[Finding] = []
    for check in (_huge_pages(root), _storage(models_dir, root), _clocks(root), _heat()):
        found += check
    for card in cards:
        found += _card(card)
    if cards:
        found += _pinned()
    return found


def _finding(level: str, topic: str, message: str, mend: str) -> Finding:
    from hybrimoe.doctor import Finding

    return Finding(level, topic, message, mend)


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").strip()
    return ""


def _huge_pages(root: Path) -> Iterator[Finding]:
    if "[never]" in _read(root / "sys/kernel/mm/transparent_hugepage/enabled"):
        text = "transparent huge pages are off: reading weights costs more page walks"
        mend = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
        yield _finding("note", "huge pages", text, mend)


def _storage(folder: Path, root: Path) -> Iterator[Finding]:
    mount = _mount_of(folder, _read(root / "proc/self/mounts"))
    if mount is None:
        return
    device, point, kind = mount
    if kind in _NETWORK:
        text = f"models in '{folder}' lie on a network file system ({kind}): memory-mapped experts are read through it"
        mend = "copy models to a local disk, or run with --load-mode none"
        yield _finding("warning", "storage", text, mend)
        return
    name = Path(device).name
    for candidate in (name, name.rstrip("0123456789"), name.rstrip("0123456789").removesuffix("p")):
        if _read(root / f"sys/block/{candidate}/queue/rotational") == "1" and candidate.startswith(("sd", "hd")):
            text = f"models in '{folder}' lie on a rotating disk ({point}): the first answers wait for it"
            yield _finding("note", "storage", text, "keep models on a solid-state disk")
            return


def _mount_of(folder: Path, mounts: str) -> tuple[str, str, str] | None:
    """(device, mount point, file system) of the longest mount point above `folder`."""
    best: tuple[str, str, str] | None = None
    target = str(folder.absolute())
    for line in mounts.splitlines():
        parts = line.split()
        if len(parts) < 3:
            continue
        point = parts[1].replace("\\040", " ")
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        if inside and (best is None or len(point) >= len(best[1])):
            best = (parts[0], point, parts[2])
    return best


def _clocks(root: Path) -> Iterator[Finding]:
    folder = root / "sys/devices/system/cpu/cpu0/cpufreq"
    limit, most = _read(folder / "scaling_max_freq"), _read(folder / "cpuinfo_max_freq")
    if limit.isdigit() and most.isdigit() and 0 < int(limit) < _SLOW_CLOCK * int(most):
        text = f"the CPU is held to {int(limit) / 1e6:.1f} of {int(most) / 1e6:.1f} GHz"
        yield _finding("warning", "clocks", text, f"sudo cpupower frequency-set -u {int(most)}")
    if _read(folder / "scaling_governor") == "powersave" and _read(folder / "scaling_driver") == "acpi-cpufreq":
        mend = "sudo cpupower frequency-set -g performance"
        yield _finding("warning", "clocks", "the CPU's governor is 'powersave': it stays at its lowest clock", mend)
    supplies = root / "sys/class/power_supply"
    for supply in sorted(supplies.glob("*")):
        if _read(supply / "type") == "Battery" and _read(supply / "status") == "Discharging":
            yield _finding("note", "clocks", "the machine runs on battery, at lower clocks", "connect the power supply")
            return


def _heat() -> Iterator[Finding]:
    import psutil

    read = getattr(psutil, "sensors_temperatures", None)
    sensors: Mapping[str, Any] = {}
    with contextlib.suppress(OSError, AttributeError):
        sensors = read() if read is not None else {}
    for name, values in sensors.items():
        for value in values:
            limit = value.high or value.critical
            if limit and value.current and value.current > limit - _HOT_MARGIN_C:
                text = f"{name} is at {value.current:.0f} C, its limit is {limit:.0f} C: clocks will fall"
                yield _finding("warning", "heat", text, "clean or improve the cooling, or lower the power limit")
                return


def _card(card: Mapping[str, Any]) -> Iterator[Finding]:
    name = card["name"] or "the card"
    free, total = card["memory_free_bytes"], card["memory_bytes"]
    if free is not None and total and free < max(_LEAST_FREE_VRAM, total // 4):
        text = f"{name} has only {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        yield _finding("warning", "card memory", text, "close programs that use the card (nvidia-smi lists them)")
    if card["thermal_slowdown"]:
        yield _finding("warning", "heat", f"{name} slows down: too hot, or short of power", "improve its cooling")
    limit, default = card["power_limit_w"], card["power_default_w"]
    if limit and default and limit < 0.9 * default:
        text = f"{name} is limited to {limit:.0f} of {default:.0f} W"
        yield _finding("note", "power", text, f"sudo nvidia-smi -pl {default:.0f}")
    width, most = card["pcie_width"], card["pcie_width_max"]
    if width and most and width < most:
        text = f"{name} runs with {width} of {most} PCIe lanes: copies take {most / width:.0f} times as long"
        yield _finding("warning", "link", text, "use the slot beside the processor, and look for shared lanes")


def _pinned() -> Iterator[Finding]:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY and soft < _STAGING_BYTES:
        text = f"this process may lock {soft >> 20} MiB of memory: some drivers pin copy buffers within that limit"
        yield _finding("note", "pinned memory", text, "ulimit -l unlimited (or /etc/security/limits.conf)")


def models_folder() -> Path:
    """Where the store's models are, or will be."""
    from hybrimoe.models import store

    folder = store.models_dir()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return Path(os.path.realpath(folder))
