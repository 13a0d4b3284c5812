"""What limits the speed, in one plain sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["PATH_NAMES", "critical_path", "describe_limit"]

# Parts of a token's time that follow each other, as the reports call them.
PATH_NAMES: Mapping[str, str] = {
    "dense": "attention and dense layers",
    "router": "routers",
    "plan": "planning",
    "launch": "starting the GPU's work",
    "cpu_experts": "experts on the CPU",
    "gpu_experts": "waiting for experts on the GPU",
    "copies": "waiting for copies",
    "merge": "merging",
}
_OVERHEAD = ("router", "plan", "launch", "merge")


def critical_path(times: Mapping[str, float], *, computes_inside_launch: bool) -> dict[str, float]:
    """Parts of the time that add up to it: what runs beside something longer is not in here.

    Args:
        times: sums of a phase in us, as `analysis` makes them.
        computes_inside_launch: accelerators are second CPU backends, whose launch returns when all is computed.
    """
    waits_for_gpu = times["wait_us"] - times["copy_wait_us"]
    inside = times["launch_us"] if computes_inside_launch else 0.0
    return {
        "dense": times["dense_us"],
        "router": times["router_us"],
        "plan": times["plan_us"],
        "launch": times["launch_us"] - inside,
        "cpu_experts": times["cpu_us"],
        "gpu_experts": waits_for_gpu + inside,
        "copies": times["copy_wait_us"],
        "merge": times["merge_us"],
    }


def describe_limit(
    phase: str, path: Mapping[str, float], result: Mapping[str, Any], dense_on: str, devices: Sequence[str]
) -> dict[str, Any]:
    """`what` (CPU, GPU, link, dense or overhead), its `share` of the time, a `sentence`, and what would `help`."""
    total = sum(path.values()) or 1.0
    groups = {
        "CPU": path["cpu_experts"],
        "GPU": path["gpu_experts"],
        "link": path["copies"],
        "dense": path["dense"],
        "overhead": sum(path[name] for name in _OVERHEAD),
    }
    what = max(groups, key=lambda name: groups[name])
    share = groups[what] / total
    doing = {"decode": "Generation", "prefill": "Reading the prompt"}[phase]
    each = f"{share:.0%} of {'each token' if phase == 'decode' else 'the time'}"
    if phase == "decode":
        each += f"'s {result['ms_per_token']:.1f} ms"
    rate = result["experts"]["cpu_bytes_per_s"] / 1e9
    accelerator = devices[0] if devices else "GPU"
    reading = f", which read expert weights at {rate:.1f} GB/s" if phase == "decode" and rate > 0 else ""
    sentence = {
        "CPU": f"{doing} is limited by the CPU: {each} goes into its experts{reading}.",
        "GPU": f"{doing} is limited by the accelerator: {each} is spent on experts that {accelerator} computes.",
        "link": f"{doing} is limited by the link: {each} is spent waiting for experts on their way to {accelerator}.",
        "dense": f"{doing} is limited by attention and dense layers, which llama.cpp computes on the {dense_on}: "
        f"{each} goes into them.",
        "overhead": f"{doing} is limited by the work around the experts (routers, planning, merging): {each}.",
    }[what]
    return {"what": what, "share": share, "sentence": sentence, "help": _help(what, phase, devices, dense_on)}


def _help(what: str, phase: str, devices: Sequence[str], dense_on: str) -> str:
    if what == "CPU" and not devices:
        helps = "faster memory or a smaller quantisation" if phase == "decode" else "more or faster cores"
        return f"What would help: {helps}, or a GPU that takes the dense layers and the experts asked for most."
    return {
        "CPU": "What would help: more GPU memory for experts (--expert-cache), faster main memory.",
        "GPU": "What would help: a faster GPU, or fewer experts on it (a smaller --expert-cache).",
        "link": "What would help: a faster link, a larger expert cache, or --admission and --prefetch that copy less.",
        "dense": "What would help: "
        + ("a GPU for the dense layers (-ngl)." if dense_on == "CPU" else "a faster GPU, or a shorter context."),
        "overhead": "Usual for small models: their experts take less time than what surrounds them.",
    }[what]
