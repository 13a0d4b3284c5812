"""Measures: plain llama.cpp and ours in processes of their own, asked one after the other, never two at once."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hybrimoe.bench.cases import Setup, Test
from hybrimoe.bench.process import WorkerFailedError, WorkerProcess
from hybrimoe.bench.rows import Row
from hybrimoe.bench.worker import WorkerOptions
from hybrimoe.errors import DoesNotFitError

if TYPE_CHECKING:
    from hybrimoe.gguf_model import GgufModel

__all__ = ["BenchOptions", "describe_machine", "measure", "measure_stock", "open_stock"]

Notify = Callable[[str], None]
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class BenchOptions:
    """`interleave`: 'repetition' keeps both processes loaded and alternates; 'process' loads one at a time, A-B-A, for
    machines that cannot hold both; 'auto' decides. `worker` has what is common to all rows."""

    tests: Sequence[Test]
    setups: Sequence[Setup]
    n_repetitions: int
    worker: WorkerOptions
    stock: bool = True
    warm_up: bool = True
    delay_s: float = 0.0
    interleave: str = "auto"


class Side:
    """One process of a pair, while it runs."""

    def __init__(self, options: WorkerOptions, setup: Setup, warm_up: bool) -> None:
        name = "hybrimoe" if options.plugin else "llama.cpp"
        command = [sys.executable, "-m", "hybrimoe.bench.worker", options.to_json()]
        environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
        # A host of llama.cpp loads what this names, which may be our plug-in.
        environment.pop("GGML_BACKEND_PATH", None)
        root = str(Path(__file__).resolve().parent.parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self.process = WorkerProcess(name, command, environment, give_up_s=24 * 3600.0)
        self.is_ours = options.plugin
        self.setup = setup
        self._warm_up = warm_up
        self._is_warm: set[Test] = set()

    def row(self, test: Test) -> Row:
        return Row(self.is_ours, test, self.setup, self.process.ready)

    def run(self, row: Row, repetition: int, delay_s: float) -> None:
        time.sleep(delay_s)
        if self._warm_up and row.test not in self._is_warm:
            self.process.ask(test=asdict(row.test), warm_up=True)
            self._is_warm.add(row.test)
        row.samples.append(self.process.ask(test=asdict(row.test), warm_up=False, repetition=repetition))

    def close(self) -> None:
        self.process.close()


def measure(options: BenchOptions, notify: Notify, progress: Progress) -> Iterator[list[Row]]:
    """Rows of one test at a time: plain llama.cpp's first, then ours.

    Raises WorkerFailedError (with the exit code of the process that failed) and what opening the model raises.
    """
    done, total = 0, len(options.setups) * len(options.tests)

    def at(label: str, share: float) -> None:
        progress(label, min(1.0, (done + share) / total))

    for setup in options.setups:
        if is_together(options, setup):
            for rows in _together(options, setup, notify, at):
                yield rows
                done += 1
        else:
            yield from _apart(options, setup, notify, at)
            done += len(options.tests)


def is_together(options: BenchOptions, setup: Setup) -> bool:
    """Whether both processes may stay loaded: none wants the GPU's memory, and main memory holds both."""
    if options.interleave != "auto" or not options.stock:
        return options.interleave != "process"
    from hybrimoe.gguf_model import inspect
    from hybrimoe.machine import host

    if _uses_gpu(setup):
        return False
    # The file's pages are shared; llama.cpp keeps a repacked copy, we one of the dense part at most.
    model = inspect(setup.model, header_only=True)
    return host.memory().available_bytes > 2.2 * model.total_bytes


def _uses_gpu(setup: Setup) -> bool:
    import llama_cpp

    from hybrimoe.native.backend_modules import backend_module_paths

    return setup.n_gpu_layers != 0 and (bool(llama_cpp.llama_supports_gpu_offload()) or bool(backend_module_paths()))


def _open(options: BenchOptions, setup: Setup, plugin: bool, notify: Notify) -> Side:
    n_longest = max(t.n_ctx for t in options.tests)
    worker = replace(
        options.worker,
        setup=setup.to_dict(),
        plugin=plugin,
        n_ctx=n_longest,
        # A repetition reads on where the one before it ended.
        n_stream=n_longest + options.n_repetitions * max(t.n_tokens for t in options.tests),
        trace=options.worker.trace if plugin else None,
    )
    if not plugin and _uses_gpu(setup) and setup.n_cpu_moe == 0 and not setup.overrides:
        side = _open_fitting(options, worker, setup)
    else:
        side = Side(worker, setup, options.warm_up)
    if warning := side.process.ready.get("warning"):
        notify(f"warning: {warning}")
    return side


def _open_fitting(options: BenchOptions, worker: WorkerOptions, setup: Setup) -> Side:
    """Plain llama.cpp with as many layers' experts on the GPU as fit, which is the best it can do without us."""
    from hybrimoe.gguf_model import inspect

    model = inspect(setup.model, header_only=True)
    n, step = _guessed_n_cpu_moe(model, setup, worker.n_ctx), 1
    while True:
        try:
            return Side(replace(worker, n_cpu_moe=n), setup, options.warm_up)
        except WorkerFailedError as error:
            if n >= model.n_layers or error.exit_code not in (1, DoesNotFitError.exit_code):
                raise
            n, step = min(model.n_layers, n + step), 2 * step


def _guessed_n_cpu_moe(model: GgufModel, setup: Setup, n_ctx: int) -> int:
    """`-ncmoe` that ought to fit, from the header's sizes."""
    from hybrimoe.machine.here import this_machine
    from hybrimoe.planning import Setting, measure_needs, plan_memory

    setting = Setting(n_ctx, setup.n_batch, setup.n_ubatch, setup.flash_attn, setup.type_k, setup.type_v)
    setting = setting.of_model(model)
    room = plan_memory(model, measure_needs(model, setting), setting, this_machine()).cache_bytes
    n_on_cpu = 0
    for layer in reversed([layer for layer in model.moe_layers if not layer.predicts_ahead]):
        room -= layer.n_experts * layer.bytes_per_expert
        if room < 0:
            # llama.cpp counts from the first layer on.
            n_on_cpu = layer.index + 1
            break
    return n_on_cpu


def open_stock(model: Path, tests: Sequence[Test], n_threads: int, n_repetitions: int) -> Side:
    """Plain llama.cpp with its defaults and random tokens, as llama-bench runs it; close it. Raises as `measure`."""
    setup = Setup(
        model=str(model), n_gpu_layers=-1, n_cpu_moe=0, load_mode="auto", repack=True, flash_attn="auto", type_k="f16",
        type_v="f16", n_batch=2048, n_ubatch=512, n_threads=n_threads, overrides="", device=None, expert_cache="0",
        cache_policy="", schedule="", prefetch="", admission="",
    )  # fmt: skip
    worker = WorkerOptions(setup={}, plugin=False, n_ctx=0, prompt_source="random", n_stream=0)
    return _open(BenchOptions(tests, [setup], n_repetitions, worker), setup, False, lambda text: None)


def measure_stock(worker: WorkerOptions, setup: Setup, tests: Sequence[Test], n_repetitions: int) -> list[Row]:
    """Plain llama.cpp alone. Raises as `measure`."""
    options = BenchOptions(tests, [setup], n_repetitions, worker)
    side = _open(options, setup, False, lambda text: None)
    try:
        rows = [side.row(test) for test in tests]
        for row in rows:
            for i in range(n_repetitions):
                side.run(row, i, 0.0)
        return rows
    finally:
        side.close()


def _together(options: BenchOptions, setup: Setup, notify: Notify, at: Progress) -> Iterator[list[Row]]:
    kinds = (False, True) if options.stock else (True,)
    with ExitStack() as stack:
        sides = []
        for plugin in kinds:
            at("loading", 0.0)
            side = _open(options, setup, plugin, notify)
            stack.callback(side.close)
            sides.append(side)
        for test in options.tests:
            rows = [side.row(test) for side in sides]
            for i in range(options.n_repetitions):
                pairs = list(zip(sides, rows, strict=True))
                # A-B, B-A, ...: drift of the machine's speed hits both alike.
                for j, (side, row) in enumerate(pairs if i % 2 == 0 else reversed(pairs)):
                    name = side.process.name
                    share = (i * len(pairs) + j) / (options.n_repetitions * len(pairs))
                    at(f"{test.name}, {name}, {i + 1} of {options.n_repetitions}", share)
                    side.run(row, i, options.delay_s)
            yield rows


def _apart(options: BenchOptions, setup: Setup, notify: Notify, at: Progress) -> Iterator[list[Row]]:
    """One process at a time: plain llama.cpp, ours, plain llama.cpp again, with half of its repetitions each."""
    n = options.n_repetitions
    first = -(-n // 2)
    turns = [(True, 0, n)]
    if options.stock:
        turns = [(False, 0, first), (True, 0, n), (False, first, n)]
    rows: dict[tuple[bool, Test], Row] = {}
    for number, (plugin, begin, end) in enumerate(turns):
        if begin == end:
            continue
        at("loading", number / len(turns))
        side = _open(options, setup, plugin, notify)
        try:
            for k, test in enumerate(options.tests):
                row = rows.setdefault((plugin, test), side.row(test))
                for i in range(begin, end):
                    share = (number + k / len(options.tests)) / len(turns)
                    at(f"{test.name}, {side.process.name}, {i + 1} of {n}", share * len(options.tests))
                    side.run(row, i, options.delay_s)
        finally:
            side.close()
    for test in options.tests:
        yield [rows[key, test] for key in (False, True) if (key, test) in rows]


def describe_machine() -> str:
    """The machine in one line, for the table's foot."""
    from hybrimoe.machine import host

    cpu = host.cpu()
    gpus = "".join(f", {gpu.name}" for gpu in host.gpus())
    return f"{cpu.name}, {cpu.n_cores} cores, {host.memory().total_bytes / 2**30:.0f} GiB{gpus}"
