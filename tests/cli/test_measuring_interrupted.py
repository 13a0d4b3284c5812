"""Ctrl-C while `bench` and `profile` load and run: an end without tracebacks, remains or processes left over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

COMMANDS = {
    # Long enough never to end by itself within the test.
    "bench": ["bench", "-p", "0", "-n", "64", "-r", "2000", "-o", "jsonl"],
    "bench-process": ["bench", "-p", "0", "-n", "64", "-r", "2000", "--interleave", "process"],
    "profile": ["profile", "-p", "16", "-n", "2000", "--html", "r.html", "--trace", "r.trace"],
    "profile-stock": ["profile", "-p", "8", "-n", "8", "--html", "r.html", "--perfetto", "r.json"],
}
DEADLINE_S = 60


@pytest.fixture
def started(
    request: pytest.FixtureRequest, tmp_path: Path, tiny_model: Callable[..., Path]
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A command in a process group of its own, as a terminal starts it, in an empty folder."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    for name in ("CONFIG", "STATE", "CACHE"):
        environment[f"XDG_{name}_HOME"] = str(tmp_path / "home" / name.lower())
    folder = tmp_path / "work"
    folder.mkdir()
    name, *arguments = COMMANDS[request.param]
    process = subprocess.Popen(
        [sys.executable, "-m", "hybrimoe.cli.main", name, str(tiny_model("qwen3moe", "Q4_0")), *arguments],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=folder, env=environment, start_new_session=True,
    )  # fmt: skip
    yield process, folder
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> None:
    """Until `condition` holds, at most as long as `process` runs."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.01)


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Measured processes that it has started."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "hybrimoe.bench.worker" in child.cmdline():
                found.append(child)
        except psutil.NoSuchProcess:
            pass
    return found


def interrupt(process: subprocess.Popen[str]) -> None:
    """As a terminal does it: the signal goes to every process of the group."""
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "Exception ignored" not in err and "error:" not in err, err
    wait_for(lambda: not any(child.is_running() for child in children))


@pytest.mark.parametrize("started", ["bench", "bench-process"], indirect=True)
@pytest.mark.parametrize("when", ["a child starts", "it computes"])
def test_bench(started: tuple[subprocess.Popen[str], Path], when: str) -> None:
    process, folder = started
    wait_for(lambda: workers(process), process)
    if when == "it computes":
        time.sleep(2.5)
    assert process.poll() is None
    interrupt(process)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("started", ["profile"], indirect=True)
def test_profile_before_it_runs(started: tuple[subprocess.Popen[str], Path]) -> None:
    process, folder = started
    # Until then Python itself may end, in its own way.
    wait_for(lambda: "libllama" in Path(f"/proc/{process.pid}/maps").read_text(), process)
    interrupt(process)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("started", "stage"), [("profile", "profiling"), ("profile-stock", "plain llama.cpp")], indirect=["started"]
)
def test_profile_reports_what_was_done(started: tuple[subprocess.Popen[str], Path], stage: str) -> None:
    """The report is whole, the exit code tells that it was cut."""
    process, folder = started
    if stage == "profiling":
        assert process.stderr is not None
        assert any(line.startswith("profiling: ") for line in process.stderr)
    else:
        wait_for(lambda: workers(process), process)
    interrupt(process)
    names = {path.name for path in folder.iterdir()}
    assert "r.html" in names and not any(name.startswith(".") or "tmp" in name for name in names)
    assert (folder / "r.html").read_text().rstrip().endswith("</html>")
    timeline = next(path for path in folder.iterdir() if path.suffix == ".json")
    assert json.loads(timeline.read_text())["traceEvents"]
