"""Starting, stopping, keys, clients that leave, several clients."""

from __future__ import annotations

import json
import signal
import socket
import stat
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import COMMAND, DEADLINE_S, Server, launch

Serve = Callable[..., Server]
# Random weights hardly ever end a turn: with the model's whole context an answer takes long.
LONG = ("-c", "0")


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> str:
    return str(tiny_model("mixtral"))


def start_long_answer(server: Server, **more: Any) -> Any:
    """An answer that streams; its first event has come."""
    asked = {"messages": [{"role": "user", "content": "hello"}], "stream": True, "min_tokens": 100_000, **more}
    body = json.dumps(asked).encode()
    request = urllib.request.Request(f"{server.url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = urllib.request.urlopen(request, timeout=DEADLINE_S)
    assert response.readline().startswith(b"data: ")
    return response


@pytest.fixture(scope="module")
def patient(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the model's whole context, for tests of clients that leave; nothing runs between them."""
    server = launch(str(tiny_model("mixtral")), "--port", "0", *LONG, home=tmp_path_factory.mktemp("patient"))
    server.url = server.wait_for_line(r"listening on (http://\S+),")[1]
    yield server.wait_until_ready()
    assert server.stop() == 0


def counts(server: Server) -> dict[str, int]:
    return dict(server.ask("/live")[1]["requests"])


def test_a_client_that_goes_away_stops_its_answer(patient: Server) -> None:
    server, before = patient, counts(patient)
    start_long_answer(server).close()
    # A snapshot may be from just before.
    after = server.wait_until(lambda s: s["requests"]["cancelled"] > before["cancelled"])["requests"]
    assert after["cancelled"] == before["cancelled"] + 1 and after["done"] == before["done"]
    server.wait_until(lambda s: not s["requests"]["running"])
    assert server.chat(max_tokens=2)[0] == 200
    server.wait_for_line("client left")


def test_a_client_that_goes_away_without_streaming_stops_its_answer_too(patient: Server) -> None:
    server, before = patient, counts(patient)
    body = b'{"messages": [{"role": "user", "content": "hello"}], "min_tokens": 100000}'
    with socket.create_connection(server.host_and_port, DEADLINE_S) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        server.wait_until(lambda s: s["requests"]["running"] == 1)
    snapshot = server.wait_until(lambda s: s["requests"]["cancelled"] > before["cancelled"])
    assert snapshot["requests"]["cancelled"] == before["cancelled"] + 1
    server.wait_until(lambda s: not s["requests"]["running"])


def test_one_that_waits_and_leaves_is_never_begun(serve: Serve, model: str) -> None:
    server = serve(model, *LONG, "--max-waiting", "1").wait_until_ready()
    first = start_long_answer(server)
    waiting = threading.Thread(target=lambda: start_long_answer(server).close())
    waiting.start()
    server.wait_until(lambda s: s["requests"]["waiting"] == 1)
    status, body = server.chat(max_tokens=1)
    assert status == 503 and body["error"]["code"] == "queue_full", "one runs, one waits, no more may"
    first.close()  # now the second one is begun, gets its first event and leaves
    waiting.join()
    snapshot = server.wait_until(lambda s: not s["requests"]["running"] and not s["requests"]["waiting"])
    assert snapshot["requests"]["cancelled"] == 2


def test_requests_are_answered_in_the_order_in_which_they_came(patient: Server) -> None:
    server = patient
    first = start_long_answer(server)
    order: list[int] = []

    def ask(i: int) -> None:
        answer = start_long_answer(server)
        order.append(i)
        answer.close()  # only now can the next one begin: no race between clients that were answered at once

    threads = []
    for i in range(4):
        threads.append(threading.Thread(target=ask, args=(i,)))
        threads[-1].start()
        server.wait_until(lambda s, n=i + 1: s["requests"]["waiting"] == n)  # type: ignore[misc]
    first.close()
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3]


def test_sigterm_lets_an_answer_end(serve: Serve, model: str) -> None:
    server = serve(model, "--grace", "60").wait_until_ready()
    response = start_long_answer(server, max_tokens=100)
    server.process.send_signal(signal.SIGTERM)
    events = [line for line in response.read().decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] in ("stop", "length")
    assert server.process.wait(DEADLINE_S) == 0


def test_after_the_grace_period_the_answer_is_cut(serve: Serve, model: str) -> None:
    server = serve(model, *LONG, "--grace", "0").wait_until_ready()
    response = start_long_answer(server)
    server.process.send_signal(signal.SIGTERM)
    events = [line for line in response.read().decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]", "a cut answer is a whole one in form"
    assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(DEADLINE_S) == 0
    server.wait_for_line("^cut: ")


def test_ctrl_c_twice_cuts_and_ends_with_130(serve: Serve, model: str) -> None:
    server = serve(model, *LONG, "--grace", "3600").wait_until_ready()
    response = start_long_answer(server)
    server.process.send_signal(signal.SIGINT)
    server.wait_for_line("stopping: answers have 3600 s")
    server.process.send_signal(signal.SIGINT)
    assert response.read().rstrip().endswith(b"[DONE]")
    assert server.process.wait(DEADLINE_S) == 130
    assert not any("Traceback" in line for line in server.lines)


def test_ctrl_c_while_idle_ends_at_once(serve: Serve, model: str) -> None:
    server = serve(model, "--grace", "3600").wait_until_ready()
    assert server.stop(signal.SIGINT) == 130


@pytest.mark.parametrize("delay_s", [0.0, 0.8])
def test_ctrl_c_while_starting(model: str, serve: Serve, delay_s: float) -> None:
    server = serve(model)
    time.sleep(delay_s)
    assert server.stop(signal.SIGINT) == 130
    assert not any("Traceback" in line or line.startswith("error") for line in server.lines), server.lines


def test_a_key_is_asked_for(serve: Serve, model: str) -> None:
    server = serve(model, "--alias", "x", LLAMA_API_KEY="sesame").wait_until_ready()
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame"}, {"Authorization": "Bearer "}):
        for path in ("/v1/models", "/live", "/metrics", "/live/stream"):
            status, body = server.ask(path, **headers)
            assert status == 401 and body["error"]["code"] == "invalid_api_key", path
    assert server.ask("/v1/models", Authorization="Bearer sesame")[0] == 200
    assert server.ask("/live", **{"X-Api-Key": "sesame"})[0] == 200
    for path in ("/health", "/", "/static/page.js"):
        assert server.ask(path)[0] == 200
    assert not any("sesame" in line for line in server.lines)


def test_the_key_does_not_show_in_the_configuration(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "serve", "--api-key", "sesame", "--print-config"], capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 0 and "api-key" in done.stdout and "sesame" not in done.stdout


def test_elsewhere_without_a_key_is_warned_about(serve: Serve, model: str) -> None:
    server = serve(model, "--host", "0.0.0.0")
    server.wait_for_line("^warning: everybody who can reach 0.0.0.0")
    assert server.stop() == 0


def test_a_port_in_use(serve: Serve, model: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        done = subprocess.run(
            [*COMMAND, "serve", model, "--port", port], capture_output=True, text=True, timeout=DEADLINE_S
        )
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and lines[0] == f"error: port {port} is in use" and lines[1].startswith("hint: ")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("no-such-model",), 3),
        (("--host", "999.1.1.1"), 1),
        (("--port", "70000"), 2),
        (("--max-request", "many"), 2),
        (("--api-key", ""), 2),
        (("a.gguf", "b.gguf"), 2),
        (("-c", "99999999"), 2),
    ],
)
def test_bad_starts_are_two_lines(model: str, tmp_path: Path, arguments: tuple[str, ...], code: int) -> None:
    given = arguments if arguments[0][0] != "-" else (model, *arguments)
    ports = () if "--port" in arguments else ("--port", "0")
    done = subprocess.run([*COMMAND, "serve", *given, *ports], capture_output=True, text=True, timeout=DEADLINE_S)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("listening")]
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert errors[0].startswith("error: ") and len(errors) <= 2


def test_health_says_503_while_loading(serve: Serve, model: str) -> None:
    server = serve(model)
    status, body = server.ask("/health")  # the very first moment; a fast machine may be ready
    assert status in (503, 200)
    if status == 503:
        assert body["error"]["type"] == "unavailable_error"
    server.wait_until_ready()
    assert server.ask("/health")[0] == 200


def test_two_servers_share_a_state_folder(serve: Serve, model: str, tmp_path: Path) -> None:
    options = (model, "--device", "CPU", "--expert-cache", "2")
    servers = [serve(*options).wait_until_ready() for _ in range(2)]
    for server in servers:
        assert server.chat(max_tokens=8)[0] == 200
    assert [server.stop() for server in servers] == [0, 0]
    (state,) = (tmp_path / "state" / "hybrimoe").glob("experts-*.json")
    json.loads(state.read_text())
    again = serve(*options).wait_until_ready()
    assert again.chat(max_tokens=2)[0] == 200


def test_a_trace_is_whole_after_sigterm(serve: Serve, model: str, tmp_path: Path) -> None:
    trace = tmp_path / "served.trace"
    server = serve(model, "--trace", str(trace)).wait_until_ready()
    assert server.chat(max_tokens=8)[0] == 200
    heat = server.ask("/live")[1]["experts"]["heat"]
    assert heat is not None and sum(heat[0]) == pytest.approx(1, abs=0.01), "the recorder shares what it reads"
    assert server.stop() == 0
    done = subprocess.run([*COMMAND, "trace", "info", str(trace), "--json"], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["n_tokens"] >= 8


def test_the_page_loads_nothing_from_elsewhere(server: Server) -> None:
    with urllib.request.urlopen(server.url + "/") as response:
        page, policy = response.read().decode(), response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "://" not in page.replace(server.url, "")
    for name in ("page.js", "page.css", "icon.svg"):
        assert f"/static/{name}" in page and server.ask(f"/static/{name}")[0] == 200


def test_top_watches_a_server(serve: Serve, model: str, tmp_path: Path) -> None:
    server = serve(model).wait_until_ready()
    server.chat(max_tokens=8)
    runtime = tmp_path / "run" / "hybrimoe"
    (path,) = runtime.glob("*.sock")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(runtime.stat().st_mode) == 0o700

    def top(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": "/usr/bin", "XDG_RUNTIME_DIR": str(tmp_path / "run"), "HOME": str(tmp_path)}
        return subprocess.run(
            [*COMMAND, "top", *arguments], capture_output=True, text=True, env=environment, timeout=90
        )

    for target in ((), (str(server.process.pid),), (server.url.removeprefix("http://"),)):
        done = top(*target, "--once")
        assert done.returncode == 0 and f"serve {server.process.pid}" in done.stdout, done
        assert "\x1b" not in done.stdout and max(map(len, done.stdout.splitlines())) <= 80
    snapshot = json.loads(top("--once", "--json").stdout)
    assert snapshot["totals"]["generated_tokens"] > 0 and snapshot["rates"] is not None
    assert [row["pid"] for row in json.loads(top("--list", "--json").stdout)] == [server.process.pid]
    assert server.stop() == 0
    assert not path.exists()
    done = top()
    assert done.returncode == 1 and done.stderr.startswith("error: nothing of yours")
    assert top("127.0.0.1:1").returncode == 1 and top("1").returncode == 2


def test_without_its_packages_the_server_says_what_to_install(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    from hybrimoe.cli.main import main

    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert main(["serve", model, "--port", "0"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["error: the server needs the package prometheus-client", "hint: pip install 'hybrimoe[server]'"]
