"""The unix sockets through which chats are watched."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from hybrimoe.errors import HybrimoeError, UsageError
from hybrimoe.live.remote import live_url
from hybrimoe.live.sockets import LiveSocket, processes, read_snapshots, runtime_dir


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "hybrimoe"


def test_snapshots_come_one_after_the_other_until_the_end(runtime: Path) -> None:
    numbers = iter(range(100))
    with LiveSocket(lambda: {"n": next(numbers)}, period_s=0.01) as live:
        assert stat.S_IMODE(runtime.stat().st_mode) == 0o700
        assert stat.S_IMODE(live.path.stat().st_mode) == 0o600
        (process,) = processes()
        assert process.pid == os.getpid()
        snapshots = read_snapshots(process.path)
        found = [next(snapshots)["n"] for _ in range(3)]
        assert found == sorted(found) and len(set(found)) == 3
    assert not live.path.exists()
    assert len(list(snapshots)) < 100, "a closed socket ends the reader"
    assert processes() == []


def test_a_socket_that_a_killed_process_left_is_removed(runtime: Path) -> None:
    runtime.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(runtime / "123456.sock"))
    (runtime / "notes.sock").touch()
    assert processes() == []
    assert not (runtime / "123456.sock").exists() and (runtime / "notes.sock").exists()


def test_a_folder_that_others_may_enter_is_closed_to_them(runtime: Path) -> None:
    runtime.mkdir(mode=0o755)
    with LiveSocket(dict):
        assert stat.S_IMODE(runtime.stat().st_mode) == 0o700


def test_a_folder_that_is_none_is_refused(runtime: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o755)
    runtime.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HybrimoeError, match="private folder"):
        LiveSocket(dict)


def test_long_paths_move_to_the_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("x" * 100)))
    assert runtime_dir().name == f"hybrimoe-{os.getuid()}"


def test_only_so_many_may_watch() -> None:
    with LiveSocket(dict, period_s=0.01) as live:
        readers: list[Any] = [read_snapshots(live.path) for _ in range(8)]
        for reader in readers:
            assert next(reader) == {}
        assert list(read_snapshots(live.path)) == []
        for reader in readers:
            reader.close()


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
