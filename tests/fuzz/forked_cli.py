"""Runs the program many times: a process that has imported it once forks one for each command line.

Starting Python and importing costs a second, a fork some milliseconds; each run is a process of its own all the same,
whose end by a signal is seen. Talks JSON lines: {"arguments", "timeout_s"} to {"code", "out", "err"}.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ended:
    """`code` below 0: ended by that signal; None: it had to be killed."""

    code: int | None
    out: str
    err: str


class ForkedCli:
    """The parent of the runs. `environment` replaces variables of this one's."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
            env={**os.environ, "OMP_WAIT_POLICY": "passive", **environment},
        )

    def run(self, *arguments: str, timeout_s: float = 120, **environment: str) -> Ended:
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"arguments": arguments, "timeout_s": timeout_s, "environment": environment}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def _serve() -> None:
    sys.path.insert(0, str(_ROOT))
    import numpy  # noqa: F401
    import psutil  # noqa: F401
    import rich.console
    import rich.progress
    import rich.table  # noqa: F401

    import hybrimoe.cli.app
    import hybrimoe.cli.models
    import hybrimoe.cli.simulate
    import hybrimoe.cli.trace
    import hybrimoe.gguf_model
    import hybrimoe.native.core_replay
    import hybrimoe.planning
    import hybrimoe.trace.convert
    import hybrimoe.trace.importers
    import hybrimoe.trace.metrics  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            code = _run(request, out.fileno(), err.fileno())
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        print(json.dumps({"code": code, "out": texts[0], "err": texts[1]}), flush=True)


def _run(request: dict[str, Any], out: int, err: int) -> int | None:
    child = os.fork()
    if child == 0:
        status = 70
        try:
            nothing = os.open(os.devnull, os.O_RDONLY)
            for source, target in ((nothing, 0), (out, 1), (err, 2)):
                os.dup2(source, target)
            os.environ.update(request["environment"])
            from hybrimoe.cli.main import main

            status = main(request["arguments"])
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    end = time.monotonic() + request["timeout_s"]
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    _serve()
