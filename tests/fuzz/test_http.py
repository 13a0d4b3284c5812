"""A thousand damaged bodies against the server's application, and twenty through a server of its own."""

from __future__ import annotations

import collections
import random
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fuzz.limits import Memory, time_limit

pytest.importorskip("fastapi", reason="the extra [server] is not installed")

from server.conftest import launch

from fuzz import http_target


def test_damaged_bodies(scratch: Path) -> None:
    target = http_target.make()
    path = scratch / "input.http"
    for case in target.seeds:
        case.write(path)
        target.use(path)
    for seed in range(1000):
        case = target.mutate(random.Random(seed))
        case.write(path)
        try:
            with Memory() as memory, time_limit(20):
                target.use(path)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        assert memory.peak_bytes <= 2 * case.n_bytes + target.slack_bytes, f"seed {seed}"


@pytest.mark.parametrize("where", list(http_target.PATHS))
def test_halves_of_characters(where: str, tmp_path: Path) -> None:
    """Found by atheris: `tokenize` failed with 500."""
    target, path = http_target.make(), tmp_path / "input.http"
    for text in (
        '{"content": "\\ud800"}',
        '{"prompt": "\\uD800x"}',
        '{"messages": [{"role": "user", "content": "\\udfff"}]}',
    ):
        path.write_bytes(f"{where}\n{text}".encode())
        target.use(path)


def test_damaged_bodies_through_a_server(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    target = http_target.make()
    server = launch(str(tiny_model("mixtral")), "--port", "0", "-c", "256", "--alias", "toy", home=tmp_path)
    statuses: collections.Counter[int] = collections.Counter()
    try:
        server.url = server.wait_for_line(r"listening on (http://\S+),")[1]
        server.wait_until_ready()
        for seed in range(40):
            where, _, body = target.mutate(random.Random(1_000_000 + seed)).data.partition(b"\n")
            status, answer = _ask(server, where.decode(), body)
            statuses[status] += 1
            assert status < 500, (seed, status, answer)
        assert server.ask("/health")[0] == 200
        assert not any("Traceback" in line for line in server.lines), server.lines[-20:]
    finally:
        assert server.stop() == 0
    assert len(statuses) > 1, statuses


def _ask(server: Any, where: str, body: bytes) -> tuple[int, Any]:
    request = urllib.request.Request(server.url + where, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read()[:300]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()[:300]
