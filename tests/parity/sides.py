"""The two sides of a comparison, plain llama.cpp and the plug-in, each in a child process; and how to compare them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

WORKER = Path(__file__).with_name("worker.py")
# Only so that a hanging worker ends the test run; no test is judged by its time.
GIVE_UP_S = 900


class WorkerFailedError(Exception):
    """The worker died, hung, or llama.cpp refused the request."""


@dataclass(frozen=True)
class Reply:
    arrays: dict[str, np.ndarray[Any, Any]]
    facts: dict[str, Any]

    @property
    def layers(self) -> dict[int, dict[str, Any]]:
        """The plug-in's counters by layer."""
        return {layer["layer"]: layer for layer in self.facts["layers"]}


class Side:
    """A worker process, started when first asked and again after it died.

    `cpu` is its HYBRIMOE_CPU, `environment` what else its environment holds.
    """

    def __init__(self, kind: str, folder: Path, cpu: str = "", environment: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self._environment = {"HYBRIMOE_CPU": cpu, **(environment or {})}
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the side
        self._kept: dict[str, Reply] = {}

    def ask(self, scenario: str, model: Path, **options: Any) -> Reply:
        """Run a scenario of worker.py; the same question is answered once. Raises WorkerFailedError."""
        line = json.dumps({"scenario": scenario, "model": str(model), **options})
        if line not in self._kept:
            self._kept[line] = self._run(line)
        return self._kept[line]

    def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.communicate()
            self._process = None
        self._stderr.close()

    def _run(self, line: str) -> Reply:
        text = self._exchange(line)
        reply = json.loads(text)
        if "error" in reply:
            raise WorkerFailedError(f"{self.kind}: {reply['error']}")
        path = Path(reply["arrays"])
        with np.load(path) as stored:
            arrays = {name: stored[name] for name in stored.files}
        path.unlink()
        return Reply(arrays, reply["facts"])

    def _exchange(self, line: str) -> str:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, str(WORKER), self.kind, str(self._folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                # Threads that wait sleep instead of spinning: on a busy machine spinning teams slow each other down.
                env={**os.environ, "OMP_WAIT_POLICY": "passive", "GGML_NO_BACKTRACE": "1", **self._environment},
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        watchdog = threading.Timer(GIVE_UP_S, process.kill)
        watchdog.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(line + "\n")
                process.stdin.flush()
            text = process.stdout.readline()
        finally:
            watchdog.cancel()
        if not text:
            status = process.wait()
            self._process = None
            self._stderr.seek(0)
            tail = self._stderr.read()[-3000:]
            raise WorkerFailedError(f"the {self.kind} worker ended with status {status} at {line}\n{tail}")
        return text


@dataclass(frozen=True)
class Difference:
    nmse: float
    is_equal: bool

    def __str__(self) -> str:
        return "bit-equal" if self.is_equal else f"NMSE {self.nmse:.1e}"


def compare(plain: Reply, ours: Reply) -> Difference:
    """The largest normalised mean squared error over all arrays, plain llama.cpp being the reference."""
    assert plain.arrays.keys() == ours.arrays.keys()
    assert plain.arrays, "nothing was computed"
    worst, is_equal = 0.0, True
    for name, reference in plain.arrays.items():
        value = ours.arrays[name]
        assert value.shape == reference.shape, name
        assert np.isfinite(reference).all(), f"plain llama.cpp's {name} is not finite"
        assert np.isfinite(value).all(), f"{name} is not finite"
        power = float(np.square(reference, dtype=np.float64).mean())
        assert power > 0, f"plain llama.cpp's {name} is all zero"
        worst = max(worst, float(np.square(value - reference, dtype=np.float64).mean()) / power)
        is_equal = is_equal and np.array_equal(value, reference)
    return Difference(worst, is_equal)
