"""Bodies of requests against the server's application, with an engine that answers at once."""

from __future__ import annotations

import atexit
import contextlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fuzz import mutators
from fuzz.targets import Case, Target

CHAT: dict[str, Any] = {
    "model": "toy",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        {"role": "assistant", "content": "hi", "tool_calls": None},
        {"role": "user", "content": "again"},
    ],
    "max_tokens": 4,
    "temperature": 0.5,
    "top_p": 0.9,
    "stop": ["\n"],
    "seed": 3,
    "stream": False,
    "logit_bias": {"3": -100},
    "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object", "properties": {}}}},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "stream_options": {"include_usage": True},
}
TEXT: dict[str, Any] = {
    "model": "toy", "prompt": "Once", "max_tokens": 4, "stop": "x", "stream": True, "echo": False, "top_k": 5,
    "min_p": 0.1, "presence_penalty": 0.5, "n": 1, "logprobs": None, "suffix": None,
}  # fmt: skip
TOKENIZE: dict[str, Any] = {"content": "some text", "add_special": True, "with_pieces": True}
DETOKENIZE: dict[str, Any] = {"tokens": [1, 2, 3], "model": "toy"}
PATHS = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": TEXT,
    "/tokenize": TOKENIZE,
    "/detokenize": DETOKENIZE,
}


class StubEngine:
    """As much of an engine as the application asks for."""

    job: Any = None
    info = SimpleNamespace(n_ctx_train=64, n_embd=8, n_params=100, total_bytes=100, n_experts=8, n_experts_used=2)
    abort_flag = SimpleNamespace(set=lambda: None, clear=lambda: None)

    def n_vocab(self) -> int:
        return 100

    def n_ctx(self) -> int:
        return 64

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        return [byte % 100 for byte in text[:64]]

    def token_bytes(self, token: int, special: bool = False) -> bytes:
        return b"a"

    def counters(self) -> list[Any]:
        return []

    def create_chat_completion(self, **arguments: Any) -> Any:
        return self._answer("message", {"role": "assistant", "content": "hi"}, "delta", {"content": "hi"}, **arguments)

    def create_completion(self, **arguments: Any) -> Any:
        return self._answer("text", "hi", "text", "hi", **arguments)

    def _answer(self, key: str, value: Any, part_key: str, part: Any, stream: bool = False, **arguments: Any) -> Any:
        json.dumps({name: arguments.get(name) for name in ("messages", "prompt", "stop", "seed", "temperature")})
        head = {"id": "x", "object": "o", "created": 0, "model": "toy"}
        if not stream:
            return {**head, "choices": [{"index": 0, key: value, "finish_reason": "stop"}]}
        chunks = [{"index": 0, part_key: part, "finish_reason": end} for end in (None, "stop")]
        return iter([{**head, "choices": [chunk]} for chunk in chunks])


@contextlib.contextmanager
def _opened() -> Iterator[Any]:
    yield StubEngine()


def make() -> Target:
    """The target; its server's thread lives as long as the process."""
    from starlette.testclient import TestClient

    from hybrimoe.generation import Sampling
    from hybrimoe.server.app import Service, make_app
    from hybrimoe.server.gate import Gate, Limits
    from hybrimoe.server.requests import Defaults
    from hybrimoe.server.worker import Worker

    failures: list[BaseException] = []
    worker = Worker(_opened, max_waiting=4)
    worker._thread.daemon = True
    worker.start()
    sampler: Any = SimpleNamespace(snapshot=lambda: {"version": 1})
    service = Service(worker, sampler, Defaults(("toy",), Sampling()), on_failure=failures.append)
    gate = Gate(make_app(service), Limits(max_request_bytes=1 << 20), None, local_only=True)
    client = TestClient(gate, base_url="http://127.0.0.1", raise_server_exceptions=False)
    # Entered, it keeps one event loop for all requests; else each would start a thread with one of its own.
    client.__enter__()
    atexit.register(client.__exit__)

    def use(path: Path) -> None:
        first, _, body = path.read_bytes().partition(b"\n")
        where = first.decode("ascii", "replace") if first.decode("ascii", "replace") in PATHS else "/v1/completions"
        answer = client.post(where, content=body, headers={"content-type": "application/json"})
        if failures:
            raise failures.pop()
        assert answer.status_code < 500, f"{where}: {answer.status_code} {answer.text[:200]}"
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert error["type"] and error["message"] and len(error["message"]) < 1000
            assert "\n" not in error["message"].strip() and "Traceback" not in error["message"], error

    def request(rng: random.Random, where: str, document: Any) -> Case:
        return Case(where.encode() + b"\n" + mutators.dump_json(rng, document))

    def mutate(rng: random.Random) -> Case:
        where = rng.choice(list(PATHS))
        if rng.random() < 0.1:
            body = mutators.mutate_bytes(rng, json.dumps(PATHS[where]).encode())
            return Case(where.encode() + b"\n" + body)
        return request(rng, where, mutators.mutate_json(rng, PATHS[where]))

    seeds: Sequence[Case] = [Case(w.encode() + b"\n" + json.dumps(d).encode()) for w, d in PATHS.items()]
    return Target("http", ".http", mutate, use, seeds, (), slack_bytes=32 << 20)
