"""The observers of other processes: found, read, and gone in every way that a process can go."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hybrimoe.errors import HybrimoeError, UsageError
from hybrimoe.live.remote import live_url
from hybrimoe.live.sockets import Observer, ObserverGoneError, processes, runtime_dir

COMMAND = [sys.executable, "-m", "hybrimoe.cli.main"]
DEADLINE_S = 90
# A process with an observer and no model: facts alone start it.
HOST = """
import sys
from hybrimoe.native.plugin import plugin_library
library = plugin_library()
library.configure(observe=True)
library.set_host_facts({"command": "test", "phase": "idle", "instance": 0})
print(library.snapshot("events")["socket"], flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "hybrimoe"


@contextlib.contextmanager
def host(stderr: Any = None) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process and its socket."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
    )
    try:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
    finally:
        process.communicate(timeout=DEADLINE_S)


def test_a_process_without_a_model_is_found_until_its_end(runtime: Path) -> None:
    with host() as (process, path):
        assert path == runtime / f"{process.pid}.sock"
        assert stat.S_IMODE(runtime.stat().st_mode) == 0o700 and stat.S_IMODE(path.stat().st_mode) == 0o600
        (found,) = processes()
        assert (found.pid, found.path) == (process.pid, path)
        with Observer(path) as observer:
            assert observer.read()["host"]["command"] == "test"
            with pytest.raises(HybrimoeError, match="nothing is recorded"):
                observer.stream()
    assert not path.exists() and processes() == []


def test_two_hosts_are_told_apart() -> None:
    with host() as (one, _), host() as (other, _):
        assert sorted(p.pid for p in processes()) == sorted((one.pid, other.pid))
        done = subprocess.run([*COMMAND, "top", "--once"], capture_output=True, text=True, timeout=DEADLINE_S)
        assert done.returncode == 2 and str(one.pid) in done.stderr and str(other.pid) in done.stderr
        done = subprocess.run([*COMMAND, "top", "--list", "--json"], capture_output=True, text=True, timeout=DEADLINE_S)
        assert {row["pid"] for row in json.loads(done.stdout)} == {one.pid, other.pid}


def test_a_host_that_is_killed_while_it_is_watched() -> None:
    with host() as (process, path):
        watcher = subprocess.Popen(
            [*COMMAND, "top", str(process.pid), "--json", "--interval", "0.2"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert watcher.stdout is not None
        assert json.loads(watcher.stdout.readline())["pid"] == process.pid
        process.send_signal(signal.SIGKILL)
        process.wait()
        _, errors = watcher.communicate(timeout=DEADLINE_S)
        assert watcher.returncode == 0 and errors == ""
        assert path.exists(), "a killed process cannot remove its socket"
        assert processes() == [] and not path.exists(), "the next reader does"


def test_an_observer_that_goes_says_so() -> None:
    with host() as (process, path), Observer(path) as observer:
        observer.read()
        process.kill()
        process.wait()
        with pytest.raises(ObserverGoneError):
            observer.read()


def test_a_socket_that_a_killed_process_left_is_removed(runtime: Path) -> None:
    runtime.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(runtime / "123456.sock"))
    (runtime / "notes.sock").touch()
    assert processes() == []
    assert not (runtime / "123456.sock").exists() and (runtime / "notes.sock").exists()


def test_a_folder_that_is_none_is_refused(runtime: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o755)
    runtime.symlink_to(tmp_path / "elsewhere")
    process = subprocess.run([sys.executable, "-c", HOST], input="", capture_output=True, text=True, timeout=DEADLINE_S)
    assert process.stdout.strip() == "None" and len(process.stderr.splitlines()) == 1
    assert process.stderr.startswith("warning: HybriMoE") and "private" in process.stderr


def test_long_paths_move_to_the_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("x" * 100)))
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert runtime_dir() == Path(f"/tmp/hybrimoe-{os.getuid()}")
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("y" * 100)))
    process = subprocess.run([sys.executable, "-c", HOST], input="", capture_output=True, text=True, timeout=DEADLINE_S)
    assert process.stdout.strip() == "None" and "too long" in process.stderr


def test_a_companion_shows_a_process_and_notices_its_end() -> None:
    with host() as (process, _):
        companion = subprocess.Popen(
            [*COMMAND, "top", "--serve", "0", str(process.pid)], stderr=subprocess.PIPE, text=True
        )
        try:
            assert companion.stderr is not None
            url = companion.stderr.readline().split(" at ")[1].split(" (page")[0]

            def get(path: str) -> tuple[int, str]:
                request = urllib.request.Request(url + path)
                try:
                    with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
                        return answer.status, answer.read().decode()
                except urllib.error.HTTPError as error:
                    return error.code, error.read().decode()

            until = time.monotonic() + DEADLINE_S
            while True:
                with contextlib.suppress(OSError):
                    status, text = get("/live")
                    break
                assert time.monotonic() < until
            assert status == 200 and json.loads(text)["pid"] == process.pid
            assert "llamacpp:tokens_predicted_total 0.0" in get("/metrics")[1] and "<title>" in get("/")[1]
            process.kill()
            process.wait()
            time.sleep(0.5)  # snapshots within 0.2 s are the same one
            assert get("/live")[0] == 503 and get("/metrics")[0] == 503
        finally:
            companion.send_signal(signal.SIGINT)
            assert companion.wait(DEADLINE_S) == 130


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("localhost:8080", "http://localhost:8080/live"),
        ("http://h:1/v1/", "http://h:1/live"),
        ("https://example.org/models", "https://example.org/models/live"),
        ("http://[::1]:8080", "http://[::1]:8080/live"),
    ],
)
def test_addresses(text: str, url: str) -> None:
    assert live_url(text) == url


@pytest.mark.parametrize("text", ["ftp://x", "http://", "http://h:99999", "http://h:x", "file:///etc/passwd"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError):
        live_url(text)
