"""Requests that are wrong: an error in OpenAI's form, and a server that goes on."""

from __future__ import annotations

import contextlib
import http.client
import socket
import time
from typing import Any

import pytest

MESSAGES = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"


def assert_error(found: tuple[int, Any], status: int, code: str | None = None) -> str:
    got, body = found
    assert got == status, found
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert code is None or error["code"] == code
    return str(error["message"])


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 7}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"seed": 1 << 40}, "seed"),
        ({"messages": "hello"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 20}, "stop"),
        ({"stream": "maybe"}, "stream"),
        ({"logit_bias": {"99999999": 1.0}}, "logit_bias"),
        ({"logit_bias": {"-1": 1.0}}, "logit_bias"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ],
)
def test_wrong_fields_are_named(server: Any, change: dict[str, Any], param: str) -> None:
    found = server.ask(CHAT, {"messages": MESSAGES, "max_tokens": 2, **change})
    assert_error(found, 400)
    assert found[1]["error"]["param"] == param
    assert server.ask("/health") == (200, {"status": "ok"})


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[]", b"null", b'"x"', b'{"messages": NaN}', b"\xff\xfe{}", b'{"messages": "\xc3"}',
        b"[" * 100_000, b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    ],
)  # fmt: skip
def test_what_is_no_json_object_of_utf8_is_refused(server: Any, raw: bytes) -> None:
    assert_error(server.ask(CHAT, raw=raw), 400)


def test_error_messages_do_not_quote_the_request(server: Any) -> None:
    secret = "my secret text"
    _, body = server.ask(CHAT, {"messages": [{"role": secret, "content": secret}], "temperature": secret})
    assert secret not in str(body)
    assert not any(secret in line for line in server.lines)


def test_an_unknown_model_is_named_as_such(server: Any) -> None:
    message = assert_error(server.chat(model="gpt-4"), 404, "model_not_found")
    assert "'tiny'" in message
    for path in ("../../etc/passwd", "/etc/passwd", "tiny/../x"):
        assert_error(server.chat(model=path), 404, "model_not_found")


@pytest.mark.parametrize(
    "path", ["/nowhere", "/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/v1"]
)
def test_unknown_paths(server: Any, path: str) -> None:
    assert_error(server.ask(path), 404)


def test_other_methods_and_types_of_content(server: Any) -> None:
    assert_error(server.ask(CHAT), 405)
    assert_error(server.ask(CHAT, raw=b"{}", **{"Content-Type": "text/plain"}), 415)


def test_other_host_names_are_refused_without_a_key(server: Any) -> None:
    assert_error(server.ask("/v1/models", Host="evil.example"), 403)
    assert server.ask("/v1/models", Host="localhost:1234")[0] == 200


def test_ten_megabytes_are_too_large(server: Any) -> None:
    text = "a " * (5 << 20)
    assert_error(server.chat(text), 413, "request_too_large")
    chunked = (b"x" * 65536 for _ in range(160))
    connection = http.client.HTTPConnection(*server.host_and_port, timeout=60)
    connection.request("POST", CHAT, body=chunked, headers={"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_a_prompt_longer_than_the_context(server: Any) -> None:
    message = assert_error(server.chat("word " * 20_000), 400, "context_length_exceeded")
    assert "512" in message
    assert_error(
        server.ask("/v1/completions", {"prompt": "word " * 20_000, "stream": True}), 400, "context_length_exceeded"
    )


@pytest.mark.parametrize(
    "grammar",
    [
        "root ::= nowhere", "not a grammar", "root ::= root", "", "root ::= [", 'root ::= "\\', "x" * 10_000,
        'root ::= "a"{100000}', "root ::= " + "(" * 60_000, "root ::= [z-a]", 'root ::= "\\x00"',
    ],
)  # fmt: skip
def test_bad_grammars_are_refused(server: Any, grammar: str) -> None:
    status, body = server.ask(CHAT, {"messages": MESSAGES, "grammar": grammar, "max_tokens": 4})
    assert status == 400 or (grammar == "" and status == 200), body
    assert server.ask("/health")[0] == 200


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"$ref": "https://example.com/x"}, {"$ref": "#/nowhere"}])
def test_bad_schemas_are_refused(server: Any, schema: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert_error(server.ask(CHAT, {"messages": MESSAGES, "response_format": form, "max_tokens": 4}), 400)


def test_several_prompts_and_bad_tokens(server: Any) -> None:
    assert_error(server.ask("/v1/completions", {"prompt": ["a", "b"]}), 400)
    assert_error(server.ask("/v1/completions", {"prompt": [1, 2]}), 400)
    assert_error(server.ask("/detokenize", {"tokens": [-1]}), 400)
    assert_error(server.ask("/detokenize", {"tokens": ["x"]}), 400)
    assert_error(server.ask("/tokenize", {"content": 5}), 400)


def test_nulls_are_what_was_left_out(server: Any) -> None:
    status, _ = server.ask(
        CHAT, {"messages": MESSAGES, "max_tokens": 2, "temperature": None, "stop": None, "user": None}
    )
    assert status == 200


def test_rubbish_instead_of_http(server: Any) -> None:
    with socket.create_connection(server.host_and_port, 30) as raw:
        raw.sendall(b"\x16\x03\x01" + bytes(range(256)) * 8 + b"\r\n\r\n")
        raw.settimeout(30)
        assert b"400" in raw.recv(4096)
    with socket.create_connection(server.host_and_port, 30) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nX: " + b"y" * (1 << 20))
        raw.settimeout(30)
        with contextlib.suppress(OSError):  # a response or a reset, as the kernel likes
            raw.recv(4096)
    assert server.ask("/health")[0] == 200


def test_a_client_that_drips_its_request_loses_the_connection(serve: Any, tiny_model: Any) -> None:
    server = serve(str(tiny_model("mixtral")), "--request-timeout", "1").wait_until_ready()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    with socket.create_connection(server.host_and_port, 30) as slow:
        slow.sendall(head + b'{"p')
        slow.settimeout(30)
        assert b"408" in slow.recv(4096)
    slow = socket.create_connection(server.host_and_port, 30)
    slow.settimeout(0.2)
    ended = False
    for _ in range(150):  # far longer than the limit, whatever it is
        try:
            slow.sendall(b"G")
            ended = slow.recv(1) == b""
        except TimeoutError:
            continue
        except OSError:
            ended = True
        if ended:
            break
        time.sleep(0.05)
    slow.close()
    assert ended
    assert server.ask("/health")[0] == 200
