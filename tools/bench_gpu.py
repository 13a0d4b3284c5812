#!/usr/bin/env python3
"""Measures the hybrid CPU and GPU dispatch against plain llama.cpp at equal GPU memory. One command on a CUDA or Vulkan
machine; needs no network once the models are written and the device's backend is built (--build).

For each model and each share of its experts in GPU memory, interleaved within rounds: plain llama.cpp in processes
without the plug-in, with its experts on the CPU (the best of its default, --no-host and --load-mode none) and with as
many whole layers on the GPU as fit (the best -ncmoe, searched); another llama.cpp with an expert cache of its own
(--baseline-bin); ours, ours without the guard; then ours with each cache policy, and the worst cases: a slow link,
routing without locality, and Mixtral's few large experts. Decode and prefill.

Models are random with the layer shapes of known ones, so routing is replayed from a trace (--route-trace) in our rows;
plain llama.cpp has no residency to lose and runs its own routers. Everything is kept in one JSON file after each round:
the same command goes on where it was stopped, by --max-minutes or otherwise.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "native" / "cmake"))

from bench_cpu import N_PROMPT_BEFORE_DECODE, git_commit, sizes, wait_for_quiet, write_json
from fetch_ggml_headers import cache_root
from gpu_bench_plan import (
    STOCK_VARIANTS,
    OursOptions,
    Row,
    Stage,
    TimeBudget,
    best_of,
    least_n_cpu_moe,
    make_stages,
    row_bytes,
    search_least,
    stock_on_gpu,
)
from gpu_bench_report import LEGEND, summarise_stage, tables
from gpu_bench_worker import WorkerOptions

from hybrimoe.bench.process import WorkerFailedError, WorkerProcess
from hybrimoe.errors import HybrimoeError, PluginError, UsageError, as_script, render
from hybrimoe.gguf_model import GgufModel, inspect

TOOLS = Path(__file__).resolve().parent
STAGES = ("compare", "throttled", "uniform", "policies")
# Layers of the synthetic models: few enough to be written in seconds, enough for -ncmoe to come close to every share.
LAYERS = {"qwen3-30b-a3b": 8, "deepseek-v2-lite": 9, "gpt-oss-20b": 8, "mixtral": 4}
REAL_LAYERS = {"qwen3-30b-a3b": 48, "deepseek-v2-lite": 27, "gpt-oss-20b": 24, "mixtral": 32}
TRACES = {"qwen3-30b-a3b": "qwen3-30b-a3b", "deepseek-v2-lite": "deepseek-v2-lite", "gpt-oss-20b": "gpt-oss-120b"}
POLICY_KEYS = ("cache_policy", "schedule", "prefetch", "admission")
# The core's cache policies that need neither the future nor a profile, then the other schedules, then no prefetch.
POLICIES = "mrs,lru,lfu,lfru,ema,arc,schedule=hybrimoe,schedule=cpu-only,schedule=gpu-only,prefetch=none"
FORMAT = 1
N_UNIFORM_STEPS = 4096
UNIFORM = "routing: uniform, without locality"


@dataclass(frozen=True)
class Device:
    """A device of ggml; `kind` is its ggml_backend_dev_type."""

    name: str
    description: str
    kind: int
    free_bytes: int
    total_bytes: int

    @property
    def is_cpu(self) -> bool:
        return self.kind == 0


# --- the machine ------------------------------------------------------------------------------------------------------

_LIST_DEVICES = """
import json, sys
from hybrimoe.native.backend_modules import device_memory, device_names, load_backend_modules
from hybrimoe.native.plugin import ggml_library
from hybrimoe.errors import HybrimoeError
from hybrimoe.llama_log import llama_log
llama_log()
try:
    load_backend_modules(sys.argv[1:])
except HybrimoeError as error:
    print(json.dumps({"error": error.message, "hint": error.hint}))
    sys.exit()
ggml = ggml_library()
found = []
for index, name in enumerate(device_names(ggml)):
    device = ggml.ggml_backend_dev_get(index)
    description = ggml.ggml_backend_dev_description(device).decode("utf-8", "replace")
    found.append([name, description, ggml.ggml_backend_dev_type(device), *device_memory(name)])
print(json.dumps({"devices": found}))
"""


def list_devices(backends: Sequence[Path]) -> list[Device]:
    """Devices that a worker will see; asked in a process of its own. Raises PluginError for an unusable module."""
    command = [sys.executable, "-c", _LIST_DEVICES, *map(str, backends)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TOOLS.parent, timeout=300)
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        raise PluginError(
            "ggml's devices cannot be listed", (done.stderr.strip().splitlines() or ["hybrimoe doctor"])[-1]
        )
    found = json.loads(lines[-1])
    if "error" in found:
        raise PluginError(found["error"], found["hint"])
    return [Device(*values) for values in found["devices"]]


def pick_device(devices: Sequence[Device], wanted: str) -> Device:
    """`wanted` by name, or with "auto" the first GPU. Raises UsageError and PluginError."""
    if wanted == "auto":
        gpus = [device for device in devices if device.kind in (1, 2)]
        if not gpus:
            raise PluginError(
                "ggml has no GPU here",
                "use --build cuda or --build vulkan, or --device CPU to try the tool without one",
            )
        return gpus[0]
    for device in devices:
        if device.name == wanted:
            return device
    raise UsageError(f"there is no device '{wanted}'", f"known are: {', '.join(device.name for device in devices)}")


def built_module(kind: str) -> Path:
    """The path of ggml's backend as a module, built now where it is missing. Raises HybrimoeError."""
    command = [sys.executable, str(TOOLS / "build_ggml_backend.py"), kind]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise PluginError(f"ggml's {kind} backend could not be built", "see the message above")
    return Path(done.stdout.strip())


def gpu_facts() -> dict[str, Any]:
    """Driver and link of NVIDIA's first card; empty without NVML or a card."""
    try:
        import pynvml

        pynvml.nvmlInit()
        card = pynvml.nvmlDeviceGetHandleByIndex(0)
        return {
            "driver": str(pynvml.nvmlSystemGetDriverVersion()),
            "pcie_generation": int(pynvml.nvmlDeviceGetMaxPcieLinkGeneration(card)),
            "pcie_width": int(pynvml.nvmlDeviceGetMaxPcieLinkWidth(card)),
        }
    except Exception:  # NVML's own errors exist only where its package does
        return {}


def host_read_bytes_per_s(n_threads: int) -> float:
    """What `n_threads` threads read from main memory, by the plug-in's own probe. Raises PluginError without one."""
    from hybrimoe.llama_log import llama_log
    from hybrimoe.native.probe import read_rate

    llama_log()  # which keeps ggml silent
    return read_rate(n_threads, 1 << 30, 1.0) * 1e6


# --- models and routing -----------------------------------------------------------------------------------------------


def model_file(name: str, options: argparse.Namespace) -> Path:
    """The file of a preset, written where it is missing; or the given GGUF file itself."""
    from make_bench_model import PRESETS, write_bench_model

    if name not in PRESETS:
        return Path(name)
    n_layers = {"short": LAYERS, "real": REAL_LAYERS}[options.layers][name]
    path: Path = options.models_dir / f"bench-{name}-{n_layers}l.gguf"
    if not path.is_file():
        print(f"writing {path.name}", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bench_model(path, PRESETS[name], n_layers=n_layers)
    return path


def route_file(stage: Stage, model: GgufModel, options: argparse.Namespace) -> tuple[Path, str]:
    """The plug-in's route trace of a stage, and what to say about it."""
    import route_trace

    given: Path | None = options.route_trace.get(stage.model, options.route_trace.get(""))
    if given is None and options.traces_dir is not None and stage.model in TRACES:
        found = options.traces_dir / f"{TRACES[stage.model]}.npz"
        given = found if found.is_file() else None
    shape = {"n_layers": model.n_layers, "n_experts": model.n_experts, "top_k": model.n_experts_used}
    if given is None or stage.scenario == "uniform":
        name, note = "uniform", UNIFORM
        ids = route_trace.uniform(N_UNIFORM_STEPS, **shape)
    else:
        name, note = (
            given.stem,
            f"routing: {given.name}, fitted to {model.n_experts} experts, top-{model.n_experts_used}",
        )
        ids = route_trace.fit(route_trace.read_trace(given), moe_layers=model.moe_layer_indices, **shape)
    path: Path = options.models_dir / f"{model.path.stem}-{name}.route"
    path.parent.mkdir(parents=True, exist_ok=True)
    route_trace.write_raw(path, ids)
    return path, f"{note}, {len(ids)} steps"


# --- running rows -----------------------------------------------------------------------------------------------------


class Bench:
    """One run of the benchmark: what was found out about the machine, and the report that is kept after each round."""

    def __init__(self, options: argparse.Namespace, device: Device, report: dict[str, Any]) -> None:
        self.options = options
        self.device = device
        self.report = report
        self.budget = TimeBudget(options.max_minutes * 60, time.monotonic)
        self.tests = [("decode", options.decode), *(("prefill", n) for n in options.prefill)]
        self._models: dict[str, GgufModel] = {}

    def model(self, name: str) -> GgufModel:
        if name not in self._models:
            self._models[name] = inspect(model_file(name, self.options)).require_moe()
        return self._models[name]

    @property
    def n_ctx(self) -> int:
        longest = max([self.options.decode, self.options.warmup, *self.options.prefill])
        return int(longest + N_PROMPT_BEFORE_DECODE + self.options.ubatch)

    def _longest_round_s(self) -> float:
        return max((float(entry.get("round_s", 0.0)) for entry in self.report["stages"].values()), default=0.0)

    def keep(self) -> None:
        write_json(self.options.json, self.report)

    def start(self, row: Row, model: GgufModel) -> WorkerProcess:
        options = self.options
        worker = WorkerOptions(
            model=str(model.path),
            plugin=row.kind == "ours",
            n_threads=options.threads,
            n_ctx=self.n_ctx,
            n_ubatch=options.ubatch,
            n_gpu_layers=0 if self.device.is_cpu else 99,
            n_cpu_moe=row.n_cpu_moe,
            host=row.host,
            mmap=row.mmap,
            device=self.device.name,
            backends=tuple(str(path) for path in options.backend),
            settings=dict(row.settings),
            n_warmup=options.warmup if row.kind == "ours" else min(8, options.warmup),
        )
        command = [sys.executable, str(TOOLS / "gpu_bench_worker.py"), json.dumps(asdict(worker))]
        environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
        return WorkerProcess(row.name, command, environment, options.give_up)

    def run_baseline(self, row: Row, model: GgufModel, tests: Sequence[tuple[str, int]]) -> dict[str, Any]:
        """All tests in one run of the other llama.cpp's llama-bench. Raises WorkerFailedError."""
        command = baseline_command(self.options, row, model, tests)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=self.options.give_up)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise WorkerFailedError(row.name, str(error), shlex.join(command)) from error
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise WorkerFailedError(row.name, reason, shlex.join(command))
        return baseline_replies(done.stdout, tests)

    def run_row(
        self, row: Row, model: GgufModel, tests: Sequence[tuple[str, int]], worker: WorkerProcess | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """({test: reply}, what the process said when it was ready) of one row. Raises WorkerFailedError."""
        if row.kind == "baseline":
            return self.run_baseline(row, model, tests), {}
        opened = worker or self.start(row, model)
        try:
            return {f"{test} {n}": opened.ask(test=test, n=n) for test, n in tests}, opened.ready
        finally:
            if worker is None:
                opened.close()

    def fits_together(self, rows: Sequence[Row], model: GgufModel, cache_bytes: int) -> bool:
        """Whether all rows of a round can stay loaded: in GPU memory, and their copies of weights in the host's."""
        from hybrimoe.machine import host

        if self.options.keep_loaded != "auto":
            return bool(self.options.keep_loaded == "always")
        on_device = sum(row_bytes(model, row, cache_bytes, self.n_ctx) for row in rows)
        on_host = sum(0 if row.kind == "ours" else model.total_bytes for row in rows)
        free_host = host.memory().available_bytes
        if self.device.is_cpu:
            return on_device + on_host <= 0.8 * free_host
        return on_device <= 0.9 * self.device.free_bytes and on_host <= 0.8 * free_host

    def measure_rounds(self, stage: Stage, rows: Sequence[Row], cache_bytes: int, n_rounds: int) -> bool:
        """Measures until the stage has `n_rounds` rounds; False when the time ran out before. Keeps every round."""
        model = self.model(stage.model)
        entry = self.report["stages"][stage.key]
        entry["rows"] = {row.name: row.to_dict() for row in rows}
        together = self.fits_together(rows, model, cache_bytes)
        workers: dict[str, WorkerProcess] = {}
        try:
            while len(entry["rounds"]) < n_rounds:
                if not self.budget.allows(entry.get("round_s") or self._longest_round_s()):
                    return False
                start = time.monotonic()
                self._measure_round(stage, [r for r in rows if r.name not in entry["failures"]], workers, together)
                entry["round_s"] = round(time.monotonic() - start, 1)
                self.keep()
                if not entry["rounds"][-1]["rows"]:
                    raise HybrimoeError(f"no row of '{stage.key}' ran", "the messages above say why")
                print(f"{stage.key}: round {len(entry['rounds'])}/{n_rounds}", file=sys.stderr)
        finally:
            for worker in workers.values():
                worker.close()
        return True

    def _measure_round(
        self, stage: Stage, rows: Sequence[Row], workers: dict[str, WorkerProcess], together: bool
    ) -> None:
        """One round: every row once, in turns forwards and backwards. A row that fails is left out from then on."""
        entry, model = self.report["stages"][stage.key], self.model(stage.model)
        number = len(entry["rounds"])
        measured: dict[str, Any] = {}
        order = list(rows) if number % 2 == 0 else list(reversed(rows))
        if together:
            for row in [r for r in order if r.kind != "baseline" and r.name not in workers]:
                self._try(entry, row, lambda row=row: workers.__setitem__(row.name, self.start(row, model)))  # type: ignore[misc]
        quiet = wait_for_quiet(self.options)
        for row in order:
            if row.name in entry["failures"]:
                continue

            def run(row: Row = row) -> None:
                replies, ready = self.run_row(row, model, self._tests(stage), workers.get(row.name))
                measured[row.name] = replies
                entry["facts"].setdefault(row.name, ready)

            self._try(entry, row, run)
            if row.name in entry["failures"] and row.name in workers:
                workers.pop(row.name).close()
        entry["rounds"].append({"quiet": quiet, "rows": measured})

    def _try(self, entry: dict[str, Any], row: Row, action: Callable[[], None]) -> None:
        try:
            action()
        except WorkerFailedError as error:
            print(render(error), file=sys.stderr)
            entry["failures"][row.name] = error.reason

    def _tests(self, stage: Stage) -> list[tuple[str, int]]:
        if stage.what == "policies":
            return self.tests[:1]
        return self.tests

    # stages

    def run_stage(self, stage: Stage) -> bool:
        """Runs or continues one stage; False when the time ran out."""
        stages = self.report["stages"]
        entry = stages.setdefault(
            stage.key,
            {"stage": asdict(stage), "is_worst_case": stage.is_worst_case, "rounds": [], "failures": {}, "facts": {}}
            | {"rows": {}, "done": False},
        )
        if entry["done"] and len(entry["rounds"]) >= (
            self.options.rounds if stage.what in ("compare", "policies") else 0
        ):
            return True
        # A search runs some rows a few times each, which no round has told the duration of.
        if not self.budget.allows(2 * self._longest_round_s() if stage.what == "opponents" else 0.0):
            return False
        entry["done"] = {
            "variants": self._variants,
            "opponents": self._opponents,
            "compare": self._compare,
            "policies": self._policies,
        }[stage.what](stage, entry)
        self.keep()
        return bool(entry["done"])

    def _variants(self, stage: Stage, entry: dict[str, Any]) -> bool:
        """Which way of loading serves stock best with -cmoe: one for decode, one for prefill."""
        if not self.measure_rounds(stage, STOCK_VARIANTS, 0, 2):
            return False
        by_test: dict[str, dict[str, float]] = {}
        for name in entry["rows"]:
            for test, n in self.tests:
                us = [one["rows"][name][f"{test} {n}"]["us"] for one in entry["rounds"] if name in one["rows"]]
                if us:
                    by_test.setdefault(test, {})[name] = n / min(us) * 1e6
        entry["choice"] = {test: best_of(values) for test, values in by_test.items()}
        return True

    def _opponents(self, stage: Stage, entry: dict[str, Any]) -> bool:
        """The best -ncmoe that fits into the memory of our cache, and the other llama.cpp's best share for the CPU."""
        model, options = self.model(stage.model), self.options
        variant = self._chosen(stage.model)["decode"]
        low = least_n_cpu_moe(model, self.cache_bytes(stage))
        test = ("decode", options.search_decode)

        def speed(row: Row) -> float | None:
            try:
                reply = self.run_row(row, model, [test, test, test])[0][f"decode {options.search_decode}"]
            except WorkerFailedError as error:
                entry["failures"][row.name] = error.reason
                return None
            return float(options.search_decode / reply["us"] * 1e6)

        if low < model.n_layers:
            best, speeds = search_least(low, model.n_layers, lambda n: speed(stock_on_gpu(variant, n)))
            # All layers on the CPU is the row with -cmoe, which is measured anyway.
            on_gpu = best if best < model.n_layers else None
            entry["choice"] = {"n_cpu_moe": on_gpu, "least_that_fits": low, "decode_t_per_s": speeds}
        else:
            entry["choice"] = {"n_cpu_moe": None, "least_that_fits": low, "decode_t_per_s": {}}
        if options.baseline_bin:
            shares = {f"{s:g}": speed(self.baseline_row(stage, s)) for s in options.baseline_shares}
            ran = {key: value for key, value in shares.items() if value is not None}
            entry["choice"]["cpu_share"] = float(best_of(ran)) if ran else None
            entry["choice"]["cpu_share_t_per_s"] = shares
        return True

    def _chosen(self, model: str) -> dict[str, Row]:
        choice = self.report["stages"][Stage("variants", model).key]["choice"]
        variants = {row.name: row for row in STOCK_VARIANTS}
        return {test: variants[name] for test, name in choice.items()}

    def cache_bytes(self, stage: Stage) -> int:
        return int(stage.fraction * self.model(stage.model).expert_bytes)

    def baseline_row(self, stage: Stage, share: float) -> Row:
        mib = self.cache_bytes(stage) >> 20
        return Row("baseline", "baseline", cache_mib=mib, cpu_share=share)

    def _compare(self, stage: Stage, entry: dict[str, Any]) -> bool:
        chosen = self._chosen(stage.model)
        found = self.report["stages"][Stage("opponents", stage.model, stage.fraction).key]["choice"]
        rows = [chosen["decode"], chosen.get("prefill", chosen["decode"])]
        if found["n_cpu_moe"] is not None:
            rows.append(stock_on_gpu(chosen["decode"], found["n_cpu_moe"]))
        if found.get("cpu_share") is not None:
            rows.append(self.baseline_row(stage, found["cpu_share"]))
        ours = self._ours(stage, entry)
        rows += [ours.row(), ours.row("ours --guard off", guard=False)]
        return self.measure_rounds(stage, unique(rows), self.cache_bytes(stage), self.options.rounds)

    def _policies(self, stage: Stage, entry: dict[str, Any]) -> bool:
        ours = self._ours(stage, entry)
        found = self.report["stages"][Stage("opponents", stage.model, stage.fraction).key]["choice"]
        variant = self._chosen(stage.model)["decode"]
        rows = [variant if found["n_cpu_moe"] is None else stock_on_gpu(variant, found["n_cpu_moe"])]
        rows += [ours.row(f"ours {text}", **{key: name}) for text, key, name in self.options.policies]
        return self.measure_rounds(stage, rows, self.cache_bytes(stage), self.options.rounds)

    def _ours(self, stage: Stage, entry: dict[str, Any]) -> OursOptions:
        path, note = route_file(stage, self.model(stage.model), self.options)
        if note.startswith(UNIFORM) and not entry["is_worst_case"]:
            entry["is_worst_case"] = True
            print(f"{stage.model} has no --route-trace: routing without locality, a worst case", file=sys.stderr)
        throttle = self.options.throttle_link * 1e9 if stage.scenario == "throttled" else 0.0
        entry["routing"] = note + (f"; link held to {self.options.throttle_link:g} GB/s" if throttle else "")
        return OursOptions((self.device.name,), self.cache_bytes(stage), str(path), throttle, self.options.ubatch)


def unique(rows: Sequence[Row]) -> list[Row]:
    """Rows in order, each name once."""
    return list({row.name: row for row in rows}.values())


# --- the other llama.cpp ----------------------------------------------------------------------------------------------


def baseline_command(
    options: argparse.Namespace, row: Row, model: GgufModel, tests: Sequence[tuple[str, int]]
) -> list[str]:
    prefill = sorted({n for test, n in tests if test == "prefill"})
    decode = sorted({n for test, n in tests if test == "decode"})
    command = [str(options.baseline_bin), "-m", str(model.path), "-ngl", "99", "-t", str(options.threads)]
    command += ["-ub", str(options.ubatch), "-r", "1", "-o", "json"]
    command += ["-p", ",".join(map(str, prefill)) or "0", "-n", ",".join(map(str, decode)) or "0"]
    command += ["--moe-cache-mib", str(row.cache_mib), "--moe-cache-cpu-share", f"{row.cpu_share:g}"]
    return command + shlex.split(options.baseline_args)


def baseline_replies(text: str, tests: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Microseconds by test from llama-bench's JSON. Raises WorkerFailedError where a test is missing."""
    try:
        entries = json.loads(text)
        speeds = {("decode", e["n_gen"]) if e["n_gen"] else ("prefill", e["n_prompt"]): e["avg_ts"] for e in entries}
        return {f"{test} {n}": {"us": n / speeds[(test, n)] * 1e6} for test, n in tests}
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise WorkerFailedError("baseline", f"its output cannot be read: {error!r}", "it must know -o json") from error


# --- the report -------------------------------------------------------------------------------------------------------


def provenance(options: argparse.Namespace, device: Device) -> dict[str, Any]:
    import llama_cpp

    from hybrimoe.machine import host

    cpu = host.cpu()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "tools/bench_gpu.py", *sys.argv[1:]]),
        "commit": git_commit(),
        "llama_cpp_python": llama_cpp.__version__,
        "backends": [path.name for path in options.backend],
        "baseline": str(options.baseline_bin or ""),
        "threads": options.threads,
        "device": {**asdict(device), **gpu_facts()},
        "host_read_bytes_per_s": host_read_bytes_per_s(options.threads),
        "machine": {
            "cpu": cpu.name,
            "n_cores": cpu.n_cores,
            "n_threads": cpu.n_threads,
            "memory_bytes": host.memory().total_bytes,
            "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
        },
    }


def fingerprint(options: argparse.Namespace, device: Device) -> str:
    """Of everything that makes figures of two runs comparable; the number of rounds and the stages may change."""
    parts = [device.name, device.description, options.threads, options.layers, options.decode, options.prefill]
    parts += [options.ubatch, options.warmup, options.search_decode, options.throttle_link, str(options.baseline_bin)]
    parts += [
        options.baseline_args,
        options.baseline_shares,
        sorted((k, str(v)) for k, v in options.route_trace.items()),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def read_report(path: Path) -> dict[str, Any]:
    """A report of this tool. Raises UsageError for any other file."""
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        if report["format"] == FORMAT and isinstance(report["stages"], dict):
            return report
        reason = f"its format is {report['format']}"
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, KeyError, TypeError) as error:
        reason = repr(error)
    raise UsageError(f"{path} is no report of this tool: {reason}", "choose another --json FILE")


def open_report(options: argparse.Namespace, device: Device) -> dict[str, Any]:
    """The report to go on with, or a new one. Raises UsageError for a file of another command."""
    key = fingerprint(options, device)
    if not options.json.exists() or options.fresh:
        return {"format": FORMAT, "fingerprint": key, "provenance": provenance(options, device), "stages": {}}
    report = read_report(options.json)
    if report["fingerprint"] != key:
        raise UsageError(
            f"{options.json} was measured with other options or on another device",
            "choose another --json FILE, or --fresh to begin anew",
        )
    report["resumed"] = [*report.get("resumed", []), provenance(options, device)]
    return report


def summarise(bench: Bench) -> None:
    host = bench.report["provenance"]["host_read_bytes_per_s"]
    for entry in bench.report["stages"].values():
        layer = bench.model(entry["stage"]["model"]).moe_layers[0]
        entry["summary"] = summarise_stage(entry, layer.bytes_per_expert, host)


def heading(report: Mapping[str, Any]) -> list[str]:
    origin = report["provenance"]
    device = origin["device"]
    return [
        f"{device['name']}: {device['description']}, {device['total_bytes'] / 2**20:.0f} MiB"
        + (f", driver {device['driver']}" if "driver" in device else ""),
        f"{origin['machine']['cpu']}, {origin['threads']} threads, memory reads at "
        f"{origin['host_read_bytes_per_s'] / 1e9:.1f} GB/s",
        f"llama-cpp-python {origin['llama_cpp_python']}, commit {origin['commit']}, {origin['date']}",
        origin["command"],
        "",
    ]


def print_report(report: Mapping[str, Any], markdown: bool) -> None:
    print("\n".join([*heading(report), *tables(report, markdown=markdown), *LEGEND]))


# --- the command ------------------------------------------------------------------------------------------------------


def shares(text: str) -> list[float]:
    try:
        values = [float(part.rstrip("%")) / (100 if part.endswith("%") else 1) for part in text.split(",") if part]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of shares such as 0.25,0.5") from None
    if not values or any(not 0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError("shares are 0 to 1")
    return values


def stage_names(text: str) -> list[str]:
    names = [part for part in text.split(",") if part]
    for name in names:
        if name not in STAGES:
            raise argparse.ArgumentTypeError(f"unknown stage '{name}', known: {', '.join(STAGES)}")
    return names


def model_names(text: str) -> list[str]:
    from make_bench_model import PRESETS

    names = [part for part in text.split(",") if part]
    for name in names:
        if name not in PRESETS and not name.endswith(".gguf"):
            raise argparse.ArgumentTypeError(f"unknown model '{name}', known: {', '.join(PRESETS)}, or a .gguf file")
    return names


def policy_names(text: str) -> list[tuple[str, str, str]]:
    """(as given, the plug-in's key, its value) of each."""
    found = []
    for part in (part for part in text.split(",") if part):
        key, equals, name = part.rpartition("=")
        if equals and key not in POLICY_KEYS:
            raise argparse.ArgumentTypeError(f"unknown kind of policy '{key}', known: {', '.join(POLICY_KEYS)}")
        found.append((part, key or POLICY_KEYS[0], name))
    return found


def trace_argument(text: str) -> tuple[str, Path]:
    model, _, path = text.rpartition("=")
    return model, Path(path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--models", type=model_names, default=list(LAYERS), metavar="A,B", help=f"default: {','.join(LAYERS)}"
    )
    what.add_argument(
        "--fractions", type=shares, default=[0.25, 0.5, 0.1, 0.75], metavar="F,F", help="shares of experts"
    )
    what.add_argument(
        "--stages", type=stage_names, default=list(STAGES), metavar="A,B", help=f"default: {','.join(STAGES)}"
    )
    what.add_argument("--decode", type=int, default=64, metavar="N", help="tokens to decode (default: %(default)s)")
    what.add_argument("--prefill", type=sizes, default=[512, 2048], metavar="N,N", help="default: 512,2048")
    what.add_argument(
        "--policies",
        type=policy_names,
        default=policy_names(POLICIES),
        metavar="A,B",
        help=f"cache policies, or KEY=NAME of the plug-in's settings (default: {POLICIES})",
    )
    what.add_argument("--policy-fractions", type=shares, default=[0.25, 0.5], metavar="F,F")
    what.add_argument("--worst-fraction", type=float, default=0.5, metavar="F", help="share in the worst cases")
    what.add_argument(
        "--throttle-link", type=float, default=2.0, metavar="GB/S", help="slow link (default: %(default)s)"
    )
    what.add_argument(
        "--route-trace",
        type=trace_argument,
        action="append",
        default=[],
        metavar="[MODEL=]FILE",
        help="expert choices to replay (see tools/route_trace.py)",
    )
    what.add_argument(
        "--traces-dir", type=Path, default=os.environ.get("HYBRIMOE_TRACES"), help="default: HYBRIMOE_TRACES"
    )
    what.add_argument("--layers", choices=("short", "real"), default="short", help="models of some layers or of all")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--device", default="auto", metavar="NAME", help="ggml's name, such as CUDA0; default: the first GPU"
    )
    how.add_argument(
        "--backend", type=Path, action="append", metavar="FILE", help="module to load; default: HYBRIMOE_BACKENDS"
    )
    how.add_argument("--build", choices=("cuda", "vulkan"), help="build ggml's backend as a module first and load it")
    how.add_argument(
        "--baseline-bin", type=Path, metavar="FILE", help="llama-bench of a llama.cpp with an expert cache"
    )
    how.add_argument("--baseline-args", default="-ncmoe 999", metavar="ARGS", help="default: '%(default)s'")
    how.add_argument("--baseline-shares", type=shares, default=[0.0, 0.25, 0.5, 0.75], metavar="F,F")
    how.add_argument("--rounds", type=int, default=6, metavar="N", help="default: %(default)s")
    how.add_argument("--threads", "-t", type=int, metavar="N", help="default: one per physical core")
    how.add_argument("--ubatch", type=int, default=512, metavar="N", help="default: %(default)s")
    how.add_argument(
        "--warmup", type=int, default=128, metavar="N", help="tokens that fill our cache (default: %(default)s)"
    )
    how.add_argument("--search-decode", type=int, default=16, metavar="N", help="tokens per step of a search")
    how.add_argument(
        "--keep-loaded", choices=("auto", "always", "never"), default="auto", help="rows in memory together"
    )
    how.add_argument(
        "--max-minutes", type=float, default=60.0, metavar="M", help="then stop; go on by the same command"
    )
    how.add_argument("--give-up", type=float, default=900.0, metavar="S", help="for a process that does not answer")
    how.add_argument("--max-busy", type=float, default=0.2, metavar="CORES", help="others may use this much")
    how.add_argument("--wait", type=float, default=60, metavar="S", help="seconds to wait for that before each round")
    how.add_argument("--models-dir", type=Path, metavar="DIR", help="where models are kept (default: the user's cache)")
    how.add_argument("--json", type=Path, default=Path("bench-gpu.json"), metavar="FILE", help="default: %(default)s")
    how.add_argument("--fresh", action="store_true", help="begin anew although that file exists")
    how.add_argument("--markdown", action="store_true", help="print Markdown for docs/benchmarks.md")
    how.add_argument("--only-print", action="store_true", help="measure nothing, print the file's tables")
    options = parser.parse_args(argv)
    counts = (options.rounds, options.decode, options.ubatch, options.search_decode, options.threads or 1)
    if min(counts) < 1 or options.warmup < 0 or options.max_minutes <= 0 or options.throttle_link <= 0:
        parser.error(
            "--rounds, --decode, --ubatch, --search-decode, --threads, --max-minutes and --throttle-link are above 0"
        )
    if options.ubatch < N_PROMPT_BEFORE_DECODE:
        parser.error(f"--ubatch is {N_PROMPT_BEFORE_DECODE} at least")
    options.route_trace = dict(options.route_trace)
    return options


def prepare(options: argparse.Namespace) -> None:
    """Completes options from the machine. Raises UsageError."""
    from hybrimoe.machine import host
    from hybrimoe.native.backend_modules import backend_module_paths

    options.threads = options.threads or host.n_physical_cores()
    options.models_dir = options.models_dir or cache_root().parent / "bench"
    options.backend = list(options.backend or backend_module_paths())
    for path in [*options.route_trace.values(), *([options.baseline_bin] if options.baseline_bin else [])]:
        if not path.is_file():
            raise UsageError(f"there is no file {path}", "correct --route-trace or --baseline-bin")
    if not os.access(options.json.resolve().parent, os.W_OK):
        raise HybrimoeError(f"cannot write into {options.json.resolve().parent}", "choose another --json FILE")
    if options.build:
        options.backend.append(built_module(options.build))


def run(options: argparse.Namespace) -> int:
    if options.only_print:
        report = read_report(options.json)
        print_report(report, options.markdown)
        return 0
    prepare(options)
    device = pick_device(list_devices(options.backend), options.device)
    bench = Bench(options, device, open_report(options, device))
    stages = make_stages(
        options.models,
        options.fractions,
        options.stages,
        policy_fractions=options.policy_fractions,
        worst_fraction=options.worst_fraction,
    )
    left = stages
    try:
        for number, stage in enumerate(stages):
            if not bench.run_stage(stage):
                break
            left = stages[number + 1 :]
    finally:
        summarise(bench)
        bench.keep()
    print_report(bench.report, options.markdown)
    if left:
        print(
            f"stopped after {bench.budget.used_s / 60:.0f} minutes, {len(left)} of {len(stages)} stages are left: "
            "the same command goes on",
            file=sys.stderr,
        )
    return 0


@as_script
def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
