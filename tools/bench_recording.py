"""What recording (--trace) costs the computing thread: microseconds per decode step, and their share of the step; with
--observe what being watched costs ('hybrimoe top' once a second), answers without and with it in turns.

usage: python tools/bench_recording.py [-n TOKENS] [-r ANSWERS] [--observe] [MODEL]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from hybrimoe.engine import Engine, EngineOptions
from hybrimoe.expert_options import CacheSize, ExpertOptions
from hybrimoe.generation import Sampling
from hybrimoe.models import store

QUESTION = "Name three colours and say why you like them."


def measure(path: Path, experts: ExpertOptions, n_predict: int, n_answers: int) -> str:
    """Decode step (median over answers), recording per step, and share."""
    steps_us = []
    with tempfile.TemporaryDirectory() as folder:
        options = EngineOptions(n_ctx=1024, trace=Path(folder) / "bench.trace", experts=experts)
        with Engine(path, options) as engine:
            prompt = engine.chat_prompt([{"role": "user", "content": QUESTION}])
            for _ in range(n_answers):
                answer = engine.answer(prompt, Sampling(temp=0), n_predict)
                "".join(answer)
                if answer.timings.generation_per_s:
                    steps_us.append(1e6 / answer.timings.generation_per_s)
        recorder = engine.recorder
        assert recorder is not None
        step_us = statistics.median(steps_us)
        return (
            f"{step_us:.0f} us a step, recording {recorder.us_per_decode_pass:.1f} us "
            f"({100 * recorder.us_per_decode_pass / step_us:.2f} %), {recorder.n_bytes / recorder.n_tokens:.0f} bytes "
            f"a token, {recorder.n_dropped} steps dropped"
        )


def measure_observer(path: Path, experts: ExpertOptions, n_predict: int, n_rounds: int) -> str:
    """Median decode step unobserved, observed and watched, unobserved again; what recording takes of a step."""
    watch = [sys.executable, "-m", "hybrimoe.cli.main", "top", str(os.getpid()), "--json"]
    steps_us: dict[str, list[float]] = {"before": [], "watched": [], "after": []}

    def step_us(engine: Engine) -> float:
        prompt = engine.chat_prompt([{"role": "user", "content": QUESTION}])
        answer = engine.answer(prompt, Sampling(temp=0), n_predict)
        "".join(answer)
        return 1e6 / (answer.timings.generation_per_s or float("nan"))

    def options(observe: bool) -> EngineOptions:
        return EngineOptions(n_ctx=1024, observe=observe, experts=experts)

    with Engine(path, options(False)) as plain, Engine(path, options(True)) as observed:
        for _ in range(n_rounds):
            steps_us["before"].append(step_us(plain))
            with subprocess.Popen(watch, stdout=subprocess.PIPE) as watcher:
                assert watcher.stdout is not None
                watcher.stdout.readline()  # it has begun
                reader = threading.Thread(target=watcher.stdout.read)
                reader.start()
                steps_us["watched"].append(step_us(observed))
                watcher.terminate()
                reader.join()
            steps_us["after"].append(step_us(plain))
        assert observed.plugin is not None
        trace = observed.plugin.instance(observed.plugin_instance, "trace")["trace"]
    medians = ", ".join(f"{name} {statistics.median(values):.0f}" for name, values in steps_us.items())
    return f"us a step: {medians}; recording takes {trace['us_per_decode_pass']:.1f} us of it"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="a GGUF file; by default the demo model")
    parser.add_argument("-n", type=int, default=100, help="tokens of an answer")
    parser.add_argument("-r", type=int, default=5, help="answers")
    parser.add_argument("--observe", action="store_true", help="measure the observer instead")
    arguments = parser.parse_args()
    path = arguments.model or store.build_demo()
    for name, experts in (
        ("no accelerator", ExpertOptions(devices=())),
        ("a CPU as accelerator, 8 slots", ExpertOptions(devices=("CPU",), cache=CacheSize(n_slots=8))),
    ):
        measured = measure_observer if arguments.observe else measure
        print(f"{name}: {measured(path, experts, arguments.n, arguments.r)}", flush=True)


if __name__ == "__main__":
    main()
