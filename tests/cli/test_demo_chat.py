"""What a new user meets first: the demo model, found without being named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def store_with_demo(demo_model: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIMOE_MODELS", str(demo_model.parent))


def test_chat_without_a_model_knows_the_capital_of_france(store_with_demo: None, spawn: Callable[..., Any]) -> None:
    questions = b"The capital of France is\nWhat is the capital of France?\n"
    outcome = spawn("chat", "--temp", "0", "-n", "40", "-c", "1024", stdin=questions)
    assert outcome.code == 0, outcome
    assert "Paris" in outcome.out
    assert "warning" not in outcome.err
    assert outcome.err.count("[ Prompt ") == 2


def test_a_prompt_alone_is_answered_by_the_demo(store_with_demo: None, spawn: Callable[..., Any]) -> None:
    outcome = spawn("run", "Say hello.", "--temp", "0", "-n", "16", "-c", "1024", "--json")
    data = json.loads(outcome.out)
    assert Path(data["model"]["path"]).stem == "demo"
    assert data["plugin"]["verified"] is True
    assert data["experts"]["n_moe_layers"] == len(data["experts"]["layers"]) == 30
    assert data["experts"]["totals"]["n_blocks_delegated"] == 0


def test_models_list_and_show_know_the_demo(store_with_demo: None, call: Callable[..., Any]) -> None:
    (entry,) = [e for e in json.loads(call("models", "list", "--json").out) if e["name"] == "demo"]
    assert (entry["n_experts"], entry["n_experts_used"], entry["is_moe"], entry["error"]) == (16, 4, True, "")
    shown = json.loads(call("models", "show", "demo", "--json").out)
    assert shown["path"] == entry["path"] and len(shown["layers"]) == 30
    assert "top-4" in call("models", "show", "demo").out
