"""Programs of llama.cpp that were compiled by others or for themselves, and a server of one to talk to."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cli.conftest import call, home, spawn  # noqa: F401
from filelock import FileLock

from hosts.stand_ins import clean, stand_in  # noqa: F401
from hybrimoe.native.plugin import library_path

ROOT = Path(__file__).resolve().parent.parent.parent
EXPERTS = r"ffn_(gate_inp\.|.*_exps)=HybriMoE"
_START_S = 120.0


@dataclass(frozen=True)
class Host:
    """llama.cpp's programs of one origin: `start` is what begins their command lines, run in `folder`."""

    name: str
    start: Callable[[str], list[str]]
    folder: Path

    def environment(self, plugin: bool, settings: Mapping[str, Any] | None = None, **more: str) -> dict[str, str]:
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive", **more}
        environment.pop("GGML_BACKEND_PATH", None)
        if plugin:
            environment["GGML_BACKEND_PATH"] = str(library_path())
            environment["HYBRIMOE_CONFIG"] = json.dumps(settings or {})
        return environment

    def run(self, program: str, *arguments: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.start(program), *arguments],
            env=environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=1800,
        )

    @contextlib.contextmanager
    def server(self, model: Path, *arguments: str, environment: Mapping[str, str], log: Path) -> Iterator[int]:
        """Its llama-server with `model`, ready to answer; yields the port. What it says goes to `log`."""
        port = _free_port()
        command = [*self.start("llama-server"), "-m", str(model), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--no-webui", "-fit", "off", *arguments]
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, env=environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
        try:
            _wait_until_ready(process, port, log)
            yield port
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            if ask(port, "GET", "/health")[0] == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"the server does not answer:\n{log.read_text(errors='replace')[-3000:]}")


def ask(port: int, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
    """Status and JSON of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request(
            method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or b"null")
    finally:
        connection.close()


def greedy(port: int, prompts: Sequence[str], n_tokens: int = 24) -> list[list[tuple[int, float]]]:
    """Each prompt's most likely continuation: tokens with the logarithms of their probabilities."""
    found = []
    for prompt in prompts:
        body = {"prompt": prompt, "n_predict": n_tokens, "temperature": 0, "ignore_eos": True, "n_probs": 1}
        status, answer = ask(port, "POST", "/completion", body)
        assert status == 200, answer
        found.append([(step["id"], step["logprob"]) for step in answer["completion_probabilities"]])
    return found


@pytest.fixture(scope="session")
def pin_host(one_builds: Callable[[str], FileLock]) -> Host:
    """Those of the pinned release: built once (many minutes) unless HYBRIMOE_LLAMA_CPP_BIN names them."""
    with one_builds("llama.cpp"):
        command = [
            sys.executable,
            str(ROOT / "tools" / "build_llama_cpp.py"),
            "--more",
            "llama-server",
            "--more",
            "llama-perplexity",
        ]
        made = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert made.returncode == 0, "tools/build_llama_cpp.py failed, see above"
    folder = Path(made.stdout.strip())
    return Host("the pinned release", lambda program: [str(folder / program)], folder)


@pytest.fixture(scope="session")
def unpacked(one_builds: Callable[[str], FileLock]) -> Host:
    """Those of a distribution, unpacked beside the system. Skips where the packages cannot be had."""
    with one_builds("distribution"):
        command = [sys.executable, str(ROOT / "tools" / "get_distribution.py")]
        made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"no programs of a distribution: {' '.join(made.stderr.split())}")
    folder = Path(made.stdout.strip())
    return Host("a distribution", lambda program: [str(folder / "run"), program], folder / "modules")


@pytest.fixture(scope="session")
def unpacked_version(unpacked: Host) -> str:
    """As it names itself, such as '0.7.0 (build 11669, commit Debian)'."""
    done = unpacked.run("llama-server", "--version", environment=unpacked.environment(plugin=False))
    return re.findall(r"version: (.*)", done.stdout + done.stderr)[-1]


@pytest.fixture
def distribution(request: pytest.FixtureRequest, unpacked: Host, unpacked_version: str) -> Host:
    """As `unpacked`. The distribution moves: a version that docs/hosts.md does not list warns, and never fails."""
    if f"`{unpacked_version}`" not in (ROOT / "docs" / "hosts.md").read_text():
        warnings.warn(f"docs/hosts.md does not list llama.cpp {unpacked_version} as tried", stacklevel=1)
        request.applymarker(pytest.mark.xfail(reason=f"{unpacked_version} was not tried before", strict=False))
    return unpacked
