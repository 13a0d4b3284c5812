"""One line of results: llama-bench's fields in its order and types, then ours."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybrimoe.bench.cases import Setup, Test
from hybrimoe.expert_options import CacheSize

__all__ = ["COMMIT_PREFIX", "FIELDS", "KEY_FIELDS", "LLAMA_BENCH_FIELDS", "OUR_FIELDS", "Row", "make_row"]

# (field, type) of llama-bench's `test::get_fields` and `test::get_field_type` in the pinned release: s(tring), b(ool),
# i(nteger), f(loat).
LLAMA_BENCH_FIELDS: Mapping[str, str] = {
    "build_commit": "s",
    "build_number": "i",
    "cpu_info": "s",
    "gpu_info": "s",
    "backends": "s",
    "model_filename": "s",
    "model_type": "s",
    "model_size": "i",
    "model_n_params": "i",
    "n_batch": "i",
    "n_ubatch": "i",
    "n_threads": "i",
    "cpu_mask": "s",
    "cpu_strict": "b",
    "poll": "i",
    "type_k": "s",
    "type_v": "s",
    "n_gpu_layers": "i",
    "n_cpu_moe": "i",
    "split_mode": "s",
    "main_gpu": "i",
    "no_kv_offload": "b",
    "flash_attn": "i",
    "devices": "s",
    "tensor_split": "s",
    "tensor_buft_overrides": "s",
    "load_mode": "s",
    "lazy_mode": "s",
    "embeddings": "b",
    "no_op_offload": "i",
    "no_host": "b",
    "repack": "b",
    "fit_target": "i",
    "fit_min_ctx": "i",
    "n_prompt": "i",
    "n_gen": "i",
    "n_depth": "i",
    "test_time": "s",
    "avg_ns": "i",
    "stddev_ns": "i",
    "avg_ts": "f",
    "stddev_ts": "f",
}
# Empty (null) where a row has no such thing: rows of plain llama.cpp have no policies, runs without slots no hits.
OUR_FIELDS: Mapping[str, str] = {
    "sched_policy": "s",
    "cache_policy": "s",
    "prefetch_policy": "s",
    "n_slots": "i",  # per MoE layer, the mean over the layers
    "cache_bytes": "i",
    "hit_rate": "f",
    "h2d_bytes": "i",
    "n_expert_cpu": "i",
    "n_expert_gpu": "i",
    "prefetch_used": "i",
    "prompt_source": "s",
    "ttft_ms": "f",
}
FIELDS: Mapping[str, str] = {**LLAMA_BENCH_FIELDS, **OUR_FIELDS}
# What must be equal for two rows to be compared (`LLAMA_BENCH_KEY_PROPERTIES` of scripts/compare-llama-bench.py).
KEY_FIELDS = (
    "cpu_info", "gpu_info", "backends", "n_gpu_layers", "n_cpu_moe", "tensor_buft_overrides", "model_filename",
    "model_type", "n_batch", "n_ubatch", "embeddings", "cpu_mask", "cpu_strict", "poll", "n_threads", "type_k",
    "type_v", "load_mode", "no_kv_offload", "split_mode", "main_gpu", "tensor_split", "flash_attn", "n_prompt", "n_gen",
    "n_depth", "fit_target", "fit_min_ctx",
)  # fmt: skip
COMMIT_PREFIX = "hybrimoe-"
FLASH_ATTN_NUMBERS = {"auto": -1, "off": 0, "on": 1}


@dataclass
class Row:
    """Results of one test run one way. `is_ours`: with the plug-in; else plain llama.cpp."""

    is_ours: bool
    test: Test
    setup: Setup
    facts: Mapping[str, Any]
    samples: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def is_cache_unused(self) -> bool:
        """An expert cache was asked for, and no step asked it for an expert: the row measured the CPU."""
        counts = [s["experts"] for s in self.samples] if self.is_ours else []
        return bool(counts) and self._wants_cache and not any(c["n_hits"] + c["n_misses"] for c in counts)

    @property
    def why_unused(self) -> str:
        """What is known about a cache that was asked for and not used; may be empty."""
        return str(self.samples[-1]["experts"]["why_unused"]) if self.is_cache_unused else ""

    @property
    def _wants_cache(self) -> bool:
        """Whether the flags ask for slots. `auto` asks only where there is an accelerator."""
        s = self.setup
        if CacheSize.parse(s.expert_cache).is_off or not 0 <= s.n_cpu_moe < self.facts["n_layers"]:
            return False
        if s.device is None:
            return s.expert_cache.strip().lower() != "auto" or bool(self.facts["gpu_info"])
        return any(name not in ("", "none") for name in s.device.split("/"))

    def values(self) -> dict[str, Any]:
        """The machine fields, typed; what does not apply is None."""
        return make_row(self)

    @property
    def samples_ns(self) -> list[int]:
        return [int(s["ns"]) for s in self.samples]

    @property
    def samples_ts(self) -> list[float]:
        return [1e9 * self.test.n_tokens / ns for ns in self.samples_ns]


def make_row(row: Row) -> dict[str, Any]:
    """Fields of llama-bench and ours for one row; `facts` are the worker's about machine, model and build."""
    s, t, facts = row.setup, row.test, row.facts
    ns, ts = row.samples_ns, row.samples_ts
    values: dict[str, Any] = dict.fromkeys(FIELDS)
    for name in ("build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_type", "model_size"):
        values[name] = facts[name]
    values |= {
        "model_filename": s.model,
        "model_n_params": facts["model_n_params"],
        "n_batch": s.n_batch,
        "n_ubatch": s.n_ubatch,
        "n_threads": s.n_threads,
        "type_k": s.type_k,
        "type_v": s.type_v,
        "n_gpu_layers": s.n_gpu_layers,
        "n_cpu_moe": facts["n_layers"] if s.n_cpu_moe < 0 else s.n_cpu_moe,
        "flash_attn": FLASH_ATTN_NUMBERS[s.flash_attn],
        "devices": s.device or "auto",
        "tensor_buft_overrides": s.overrides or "none",
        "load_mode": s.load_mode,
        "repack": s.repack,
        "n_prompt": t.n_prompt,
        "n_gen": t.n_gen,
        "n_depth": t.n_depth,
        "test_time": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "avg_ns": int(statistics.fmean(ns)),
        "stddev_ns": int(statistics.stdev(ns)) if len(ns) > 1 else 0,
        "avg_ts": statistics.fmean(ts),
        "stddev_ts": statistics.stdev(ts) if len(ts) > 1 else 0.0,
        **_LLAMA_BENCH_DEFAULTS,
        "prompt_source": facts["prompt_source"],
        "ttft_ms": statistics.fmean(s["ttft_ns"] for s in row.samples) / 1e6,
        "sched_policy": facts["placement"],
    }
    if row.is_ours:
        values |= _expert_values(row)
    return values


# What llama-bench can vary and this program leaves at llama.cpp's defaults (`cmd_params_defaults`).
_LLAMA_BENCH_DEFAULTS: Mapping[str, Any] = {
    "cpu_mask": "0x0",
    "cpu_strict": False,
    "poll": 50,
    "split_mode": "layer",
    "main_gpu": 0,
    "no_kv_offload": False,
    "tensor_split": "0.00",
    "lazy_mode": "auto",
    "embeddings": False,
    "no_op_offload": 0,
    "no_host": False,
    "fit_target": 0,
    "fit_min_ctx": 0,
}


def _expert_values(row: Row) -> dict[str, Any]:
    """Counts are means over the repetitions, so that they belong to one run of the test."""

    def mean(name: str) -> float:
        return statistics.fmean(s["experts"][name] for s in row.samples)

    last: Mapping[str, Any] = row.samples[-1]["experts"]
    queries = mean("n_hits") + mean("n_misses")
    has_slots = last["cache_bytes"] > 0
    schedule = row.setup.schedule if has_slots else "cpu-only"
    if row.is_cache_unused:
        schedule = "cpu-only (cache not used)"
    return {
        "sched_policy": schedule,
        "cache_policy": row.setup.cache_policy if has_slots else "none",
        "prefetch_policy": row.setup.prefetch if has_slots else "none",
        "n_slots": last["n_slots"],
        "cache_bytes": last["cache_bytes"],
        "hit_rate": mean("n_hits") / queries if queries else None,
        "h2d_bytes": round(mean("h2d_bytes")),
        "n_expert_cpu": round(mean("n_experts_cpu")),
        "n_expert_gpu": round(mean("n_experts_gpu")),
        "prefetch_used": round(mean("prefetch_used")),
    }


def ratios(ours: Row, stock: Row) -> Sequence[float]:
    """Ours over plain llama.cpp in tokens per second, one for each repetition that both have."""
    return [a / b for a, b in zip(ours.samples_ts, stock.samples_ts, strict=False)]
