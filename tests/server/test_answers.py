"""Answers, asked for with OpenAI's own client and with curl."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from typing import Any

import pytest

openai = pytest.importorskip("openai")


@pytest.fixture
def client(server: Any) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=90)


MESSAGES: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


def test_the_openai_client_gets_an_answer(client: Any) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8, temperature=0)
    assert answer.object == "chat.completion" and answer.model == "tiny"
    assert answer.choices[0].message.role == "assistant" and answer.choices[0].finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.completion_tokens <= 8 and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    timings = answer.model_extra["timings"]
    assert timings["prompt_n"] + timings["cache_n"] == usage.prompt_tokens
    assert timings["predicted_n"] == usage.completion_tokens
    assert set(timings["experts"]) == {"hits", "misses", "cpu", "gpu", "h2d_bytes"} and timings["experts"]["cpu"] > 0


def test_a_streamed_answer_is_the_same_and_carries_usage(client: Any) -> None:
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=12, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=12, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0, "the same prompt is still in the KV cache"
    ends = [c for c in chunks if c.choices and c.choices[0].finish_reason]
    assert len(ends) == 1 and "experts" in ends[0].model_extra["timings"]


def test_a_stream_without_the_option_has_no_usage(client: Any) -> None:
    chunks = list(client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=3, stream=True))
    assert all(c.usage is None and c.choices for c in chunks)


def test_text_is_continued(client: Any) -> None:
    answer = client.completions.create(model="tiny", prompt="hello", max_tokens=5, temperature=0, seed=7)
    again = client.completions.create(model="tiny", prompt="hello", max_tokens=5, temperature=0, stream=True)
    assert answer.choices[0].text == "".join(c.choices[0].text for c in again)


def test_a_seed_repeats_an_answer_and_none_does_not(client: Any) -> None:
    def ask(**more: Any) -> str:
        found = client.completions.create(model="tiny", prompt="hello", max_tokens=24, temperature=1.5, **more)
        return str(found.choices[0].text)

    assert ask(seed=1) == ask(seed=1)
    assert len({ask() for _ in range(4)}) > 1


def test_json_schema_and_tools_come_through(client: Any) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": ["a", "b"]}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, response_format=form, max_tokens=60)
    assert json.loads(answer.choices[0].message.content)["n"] in ("a", "b")
    tools = [{"type": "function", "function": {"name": "pick", "parameters": schema}}]
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=tools, tool_choice="required", max_tokens=60
    )
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "pick" and json.loads(call.function.arguments)["n"] in ("a", "b")


def test_models_are_listed(client: Any) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.model_extra["meta"]["n_ctx"] == 512
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_tokens_there_and_back(server: Any) -> None:
    _, found = server.ask("/tokenize", {"content": "hello"})
    # A vocabulary like SentencePiece's puts a space before the first word.
    assert server.ask("/detokenize", {"tokens": found["tokens"]})[1]["content"].lstrip() == "hello"
    _, pieces = server.ask("/tokenize", {"content": "hello", "with_pieces": True})
    assert [p["id"] for p in pieces["tokens"]] == found["tokens"]
    assert server.ask("/extras/tokenize/count", {"input": "hello"})[1]["count"] == len(found["tokens"])


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl_gets_events(server: Any) -> None:
    body = json.dumps({"messages": MESSAGES, "stream": True, "max_tokens": 4})
    command = [
        "curl",
        "-sN",
        "-i",
        f"{server.url}/v1/chat/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
    ]
    out = subprocess.run(command, capture_output=True, text=True, timeout=90).stdout
    assert "200 OK" in out and "text/event-stream" in out
    events = [line for line in out.splitlines() if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    assert all(json.loads(e[6:])["object"] == "chat.completion.chunk" for e in events[:-1])


def test_clients_at_the_same_time_all_get_their_own_answer(server: Any) -> None:
    alone = {text: server.chat(text, max_tokens=16, temperature=0)[1] for text in ("red", "green", "blue", "white")}
    found: dict[str, Any] = {}

    def ask(text: str) -> None:
        found[text] = server.chat(text, max_tokens=16, temperature=0)[1]

    threads = [threading.Thread(target=ask, args=(text,)) for text in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for text, answer in alone.items():
        assert found[text]["choices"] == answer["choices"], text
        assert found[text]["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"]


def test_metrics_are_counters_that_grow(server: Any) -> None:
    def read() -> dict[str, float]:
        lines = [line for line in server.ask("/metrics")[1].splitlines() if not line.startswith("#")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    before = read()
    server.chat(max_tokens=6)
    after = read()
    assert after["llamacpp:tokens_predicted_total"] > before["llamacpp:tokens_predicted_total"]
    assert after['hybrimoe:expert_compute_total{device="cpu"}'] > before['hybrimoe:expert_compute_total{device="cpu"}']
    for name in (
        "expert_queries",
        "expert_hits",
        "expert_evictions",
        "expert_prefetch_issued",
        "h2d_bytes",
        "stall_seconds",
    ):
        assert f"hybrimoe:{name}_total" in after
    assert not any("per_second" in name or "ratio" in name for name in after)


def test_a_prompt_is_computed_anew_where_that_is_asked_for(server: Any) -> None:
    server.chat("once", max_tokens=1)
    assert server.chat("once", max_tokens=1)[1]["timings"]["cache_n"] > 0
    again = server.chat("once", max_tokens=1, cache_prompt=False)[1]["timings"]
    assert again["cache_n"] == 0 and again["prompt_n"] > 0


def test_reproducible_answers_do_not_depend_on_what_was_asked_before(
    serve: Any, tiny_model: Any, tmp_path: Any
) -> None:
    flags = ("--reproducible", "--device", "CPU", "--expert-cache", "50%", "--temp", "0", "-t", "2")
    server = serve(str(tiny_model("mixtral")), *flags).wait_until_ready()
    story = "once upon a time there was a small house"

    def ask(text: str, **more: Any) -> tuple[Any, Any]:
        status, answer = server.ask("/v1/completions", {"prompt": text, "max_tokens": 24, **more})
        assert status == 200, answer
        return answer["choices"][0]["text"], answer["timings"]["cache_n"]

    first = ask(story)
    assert first[1] == 0
    for before in (story, "once upon a time", "something else"):
        ask(before)
        assert ask(story) == first
    assert ask(story, cache_prompt=True)[1] > 0
    assert ask(story, cache_prompt=None) == first
