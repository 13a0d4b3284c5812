"""A prompt of several micro-batches does not end the expert cache, in an answer and in a conversation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

Spawn = Callable[..., Any]
DEADLINE_S = 600


def test_run_keeps_the_cache_in_its_answer(spawn: Spawn, long_prompt: Any) -> None:
    flags = ("-c", str(long_prompt.n_ctx), "-n", "24", "--temp", "0", *long_prompt.sharing)
    outcome = spawn("run", long_prompt.model, "-p", long_prompt.text, *flags, "--json", deadline_s=DEADLINE_S)
    assert outcome.code == 0, outcome
    data = json.loads(outcome.out)
    assert data["usage"]["prompt_tokens"] >= 3000
    layers = data["experts"]["layers"]
    for layer in layers:
        # Every expert of every step was asked of the cache: no step went by without it.
        n_used = layer["n_experts_cpu"] + layer["n_experts_gpu"]
        assert layer["n_decode"] > 0 and layer["n_hits"] + layer["n_misses"] == n_used, layer
    totals = data["experts"]["totals"]
    assert totals["n_hits"] > 0 and totals["n_experts_gpu"] > 0


def test_chat_keeps_the_cache_in_later_answers(spawn: Spawn, long_prompt: Any) -> None:
    questions = [long_prompt.text.strip(), "What is the sun?", "And how old is it?"]
    stdin = "".join(f"{question}\n/stats\n" for question in questions).encode()
    flags = ("-c", str(long_prompt.n_ctx), "-n", "24", "--temp", "0", *long_prompt.sharing)
    outcome = spawn("chat", long_prompt.model, *flags, stdin=stdin, deadline_s=DEADLINE_S)
    assert outcome.code == 0, outcome
    assert "forgotten" not in outcome.err and "is paused" not in outcome.out
    n_tokens = [int(n) for n in re.findall(r"^steps \d+, tokens (\d+)", outcome.out, re.MULTILINE)]
    on_gpu = [int(share) for share in re.findall(r"^experts run \d+: CPU \d+%, GPU (\d+)%", outcome.out, re.MULTILINE)]
    hits = [int(share) for share in re.findall(r"^expert cache (\d+)% hits", outcome.out, re.MULTILINE)]
    assert len(n_tokens) == len(on_gpu) == len(hits) == len(questions), outcome
    assert n_tokens[0] >= 3000
    assert min(on_gpu) > 0 and min(hits) > 0, outcome.out
