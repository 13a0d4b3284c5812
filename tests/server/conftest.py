"""Servers as processes of their own, as users start them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra [server] is not installed")

COMMAND = [sys.executable, "-m", "hybrimoe.cli.main"]
DEADLINE_S = 90


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str = ""
    lines: list[str] = field(default_factory=list)

    @property
    def host_and_port(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def wait_for_line(self, pattern: str) -> re.Match[str]:
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            for line in list(self.lines):
                if found := re.search(pattern, line):
                    return found
            if self.process.poll() is not None:
                time.sleep(0.2)
                if not any(re.search(pattern, line) for line in self.lines):
                    break
            time.sleep(0.02)
        raise AssertionError(f"no line {pattern!r} in {self.lines}")

    def wait_until_ready(self) -> Server:
        self.wait_for_line(r"answers at")
        return self

    def ask(
        self, path: str, body: Any = None, *, raw: bytes | None = None, deadline_s: float = DEADLINE_S, **headers: str
    ) -> tuple[int, Any]:
        """(status, JSON or text) of a request; a body makes it a POST."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers} if data is not None else headers
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=deadline_s) as response:
                status, text = response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                status, text = error.code, error.read()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text.decode()

    def chat(self, text: str = "hello", **more: Any) -> tuple[int, Any]:
        return self.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **more})

    def wait_until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Polls snapshots until one is as wished."""
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            _, snapshot = self.ask("/live")
            if condition(snapshot):
                return dict(snapshot)
            time.sleep(0.05)
        raise AssertionError(f"never came: {snapshot}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)


def launch(*arguments: str, home: Path, **environment: str) -> Server:
    names = {f"XDG_{name}_HOME": str(home / name.lower()) for name in ("CONFIG", "STATE", "DATA", "CACHE")}
    kept = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_A")}
    environment = {**kept, **names, "XDG_RUNTIME_DIR": str(home / "run"), "OMP_WAIT_POLICY": "passive", **environment}
    (home / "run").mkdir(mode=0o700, exist_ok=True)
    process = subprocess.Popen(
        [*COMMAND, "serve", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    server = Server(process)

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            server.lines.append(line.rstrip("\n"))

    threading.Thread(target=read, daemon=True).start()
    return server


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """`serve(MODEL, ...)` starts a server on a free port; it is ended after the test."""
    started: list[Server] = []

    def run(*arguments: str, home: Path | None = None, **environment: str) -> Server:
        server = launch("--port", "0", "-c", "512", *arguments, home=home or tmp_path, **environment)
        started.append(server)
        server.url = server.wait_for_line(r"listening on (http://\S+),")[1]
        return server

    yield run
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


@pytest.fixture(scope="session")
def server(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a tiny model that all tests share which need no other one: what they count are differences."""
    home = tmp_path_factory.mktemp("server")
    model = tiny_model("mixtral")
    server = launch(str(model), "--port", "0", "-c", "512", "--alias", "tiny", "--max-request", "1MiB", home=home)
    server.url = server.wait_for_line(r"listening on (http://\S+),")[1]
    server.wait_until_ready()
    yield server
    assert server.process.poll() is None, f"the server has ended: {server.lines[-20:]}"
    assert server.stop() == 0
