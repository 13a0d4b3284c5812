"""What breaks around the program: memory, disk, processes, time. docs/reliability.md lists all of them."""

from __future__ import annotations

import json
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "hybrimoe.cli.main"]
# Experts on a second CPU backend as a stand-in accelerator, so that copies, slots and a state file take part.
STAND_IN = ("--device", "CPU", "--expert-cache", "2", "--guard", "off")
DEADLINE_S = 120


def run(*arguments: str, limit: tuple[int, int] | None = None) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own; `limit` is (resource, bytes), set once Python runs."""
    set_limit = ""
    if limit is not None:
        set_limit = f"import resource; resource.setrlimit({limit[0]}, ({limit[1]}, {limit[1]})); "
    code = f"import sys; {set_limit}from hybrimoe.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_S)


def assert_error(done: subprocess.CompletedProcess[str], *codes: int) -> None:
    assert done.returncode in codes, done
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "hint: "))]
    assert lines and lines[0].startswith("error: ") and len(lines) <= 2, done.stderr


@pytest.mark.parametrize("megabytes", [300, 600, 900])
def test_too_little_memory(home: Path, model: str, megabytes: int) -> None:
    """An address space that ends somewhere between start and context: an error, or, with enough of it, an answer."""
    done = run("run", model, "hello", "-n", "2", "-c", "2048", limit=(resource.RLIMIT_AS, megabytes << 20))
    if done.returncode != 0:
        assert_error(done, 1, 4, 5)


@pytest.mark.parametrize(
    "arguments",
    [
        ("profile", "{model}", "-n", "4", "--no-stock", "--no-files", "--html", "{home}/out.html"),
        ("simulate", "{trace}", "--cache-policy", "lru", "--plot", "{home}/out.png"),
        pytest.param(("probe", "--quick", "--calibration", "{home}/out.json"), marks=pytest.mark.slow),
    ],
    ids=lambda a: a[0],
)
def test_a_full_disk_leaves_nothing_half_written(
    home: Path, model: str, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    trace = tmp_path / "a.trace"
    if "{trace}" in arguments:
        assert run("run", model, "hello", "-n", "4", "--trace", str(trace)).returncode == 0
    given = [part.format(model=model, home=home, trace=trace) for part in arguments]
    # A file that may not grow beyond 2 KiB: to the writer the same as a disk that is full.
    done = run(*given, limit=(resource.RLIMIT_FSIZE, 2048))
    assert_error(done, 1)
    assert not list(home.glob("out*")) and not list(home.glob("**/*.part")), list(home.iterdir())


def test_a_full_disk_does_not_end_an_answer(home: Path, model: str) -> None:
    """Recording and the kept residency are given up, the answer goes on."""
    trace = home / "a.trace"
    done = run("run", model, "hello", "-n", "48", *STAND_IN, "--trace", str(trace), limit=(resource.RLIMIT_FSIZE, 2048))
    assert done.returncode == 0 and "Traceback" not in done.stderr, done
    assert "a.trace" in done.stderr  # it was told
    done = run("run", model, "hello", "-n", "4", *STAND_IN)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_a_stopped_process_goes_on(home: Path, model: str, seconds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after the machine slept: copies seem to have taken long, the answer is the same.

    With ggml's kernels, which the stand-in runs too: with others the bits depend on who computes an expert, and that
    on timings (docs/reproducibility.md).
    """
    monkeypatch.setenv("HYBRIMOE_CPU", "ggml")
    arguments = ("run", model, "hello", "-n", "400", "--temp", "0", *STAND_IN)
    reference = run(*arguments)
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    first = process.stdout.read(1)
    process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    process.send_signal(signal.SIGCONT)
    rest, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, err
    assert (first + rest).decode("utf-8", "replace") == reference.stdout


_FORK = """
import os, sys
from pathlib import Path
from hybrimoe.engine import Engine, EngineOptions
from hybrimoe.expert_options import CacheSize, ExpertOptions
experts = ExpertOptions(devices=("CPU",), cache=CacheSize(n_slots=2), guard=False)
with Engine(Path(sys.argv[1]), EngineOptions(n_ctx=256, n_threads=2, experts=experts)) as engine:
    prompt = engine.text_prompt("one two three")
    engine.eval(prompt)
    child = os.fork()
    if child == 0:
        sys.exit(7)  # runs every clean-up that Python has, on threads that the child does not have
    _, status = os.waitpid(child, 0)
    engine.eval(prompt)
    print(os.waitstatus_to_exitcode(status), engine.n_evaluated)
"""


def test_a_fork_after_loading(home: Path, model: str) -> None:
    """The child may end in any way; the parent's engine goes on."""
    done = subprocess.run([sys.executable, "-c", _FORK, model], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "7"


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_a_killed_run_spoils_nothing(home: Path, model: str, number: int) -> None:
    """Whatever was being written, the next start works and is told of nothing broken."""
    trace = home / "cut.trace"
    arguments = ("run", model, "hello", "-n", "100000", "-c", "0", "--seed", "1", *STAND_IN, "--trace", str(trace))
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None and process.stdout.read(1)
    process.send_signal(number)
    process.communicate(timeout=DEADLINE_S)
    done = run("run", model, "hello", "-n", "4", *STAND_IN)
    assert done.returncode == 0 and "error" not in done.stderr, done.stderr
    if trace.exists():  # what was written until then is a whole trace, or said to be cut
        told = run("trace", "info", str(trace), "--json")
        assert told.returncode in (0, 3) and "Traceback" not in told.stderr
        if told.returncode == 0:
            json.loads(told.stdout)


def test_no_decision_depends_on_the_time_of_day() -> None:
    """A clock that is set back moves nothing: durations come from monotonic clocks alone."""
    wall = re.compile(r"system_clock|gettimeofday|CLOCK_REALTIME|\btime\.time\(\)|high_resolution_clock")
    sources = [*ROOT.glob("native/**/*.cpp"), *ROOT.glob("native/**/*.h"), *ROOT.glob("hybrimoe/**/*.py")]
    found = [str(p.relative_to(ROOT)) for p in sources if wall.search(p.read_text(encoding="utf-8"))]
    assert found == ["hybrimoe/server/app.py"]  # OpenAI's field "created"


def test_a_probe_whose_process_dies(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrimoe.errors import HybrimoeError
    from hybrimoe.probing import measure

    real: Callable[..., Any] = subprocess.Popen

    def dying(command: list[str], **options: Any) -> Any:
        return real([sys.executable, "-c", "import os; os.abort()"], **options)

    monkeypatch.setattr(subprocess, "Popen", dying)
    request = measure.Request((), (1,), (), 1.0, "")
    with pytest.raises(HybrimoeError, match="the probe's process ended with -6"):
        measure.run_in_child(request, lambda *_: None)
