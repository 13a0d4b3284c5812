"""`hybrimoe models` on a store of tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybrimoe.machine import host
from hybrimoe.models import store

Call = Callable[..., Any]


@pytest.fixture
def shelf(home: Path, model: str) -> Path:
    """A store with a sound and a damaged model."""
    folder = store.models_dir()
    folder.mkdir(parents=True)
    (folder / "tiny.gguf").symlink_to(Path(model).absolute())
    (folder / "torn.gguf").write_bytes(b"GGUF")
    return folder


def test_an_empty_store_says_how_to_fill_it(call: Call) -> None:
    outcome = call("models", "list")
    assert outcome.code == 0
    assert "demo" in outcome.out and "not built yet" in outcome.out
    assert "hybrimoe models build demo" in outcome.err
    (entry,) = json.loads(call("models", "list", "--json").out)
    assert entry["name"] == "demo" and entry["path"] is None and entry["error"]


def test_list_has_every_model_and_its_state(call: Call, shelf: Path) -> None:
    entries = {e["name"]: e for e in json.loads(call("models", "list", "--json").out)}
    assert set(entries) == {"demo", "tiny", "torn"}
    assert entries["tiny"]["n_experts"] > 1 and entries["tiny"]["fits"] is True and entries["tiny"]["error"] == ""
    assert entries["tiny"]["path"] == str(shelf / "tiny.gguf")
    assert entries["torn"]["error"]
    lines = call("models", "list").out.splitlines()
    assert lines[0].split()[:3] == ["name", "architecture", "layers"]
    assert any(line.startswith("tiny") and line.endswith("yes") for line in lines)


def test_fits_depends_on_memory(call: Call, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "memory", lambda: host.Memory(8 << 30, 8 << 30, 1 << 20))
    assert json.loads(call("models", "show", "tiny", "--json").out)["fits"] is False


def test_show_by_name_and_by_path(call: Call, shelf: Path, model: str) -> None:
    by_name, by_path = (json.loads(call("models", "show", which, "--json").out) for which in ("tiny", model))
    assert by_name["path"] == str(shelf / "tiny.gguf") and Path(by_path["path"]).is_absolute()
    for data in (by_name, by_path):
        assert data["layers"][0]["bytes_per_expert"] * data["n_experts"] * len(data["layers"]) == data["expert_bytes"]
    text = call("models", "show", "tiny").out
    assert "per expert" in text and f"top-{by_name['n_experts_used']}" in text


def test_show_groups_layers_that_are_alike(call: Call, tiny_model: Callable[..., Path]) -> None:
    text = call("models", "show", str(tiny_model("deepseek2"))).out
    assert "groups" in text and "shared" in text
    assert any(line.startswith("1-2 ") for line in text.splitlines()), "the first layer is dense"


def test_show_what_is_not_there(call: Call, shelf: Path) -> None:
    call("models", "show", "nothing").assert_two_lines(3)
    call("models", "show", "torn").assert_two_lines(3)
    call("models", "show").assert_two_lines(2)


@pytest.mark.parametrize(
    "arguments",
    [
        ("other",),
        ("demo", "--experts", "1"),
        ("demo", "--top-k", "99"),
        ("demo", "--type", "Q9"),
        ("demo", "--layers", "x"),
    ],
)
def test_build_refuses_the_impossible(call: Call, arguments: tuple[str, ...]) -> None:
    call("models", "build", *arguments).assert_two_lines(2)


def test_build_prints_the_path_and_progress(call: Call, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrimoe.cli import console

    seen: dict[str, Any] = {}

    def build(options: Any, progress: Any, *, force: bool) -> Path:
        seen.update(options=options, force=force)
        for share in (0.0, 0.1, 0.5, 1.0):
            progress("building", share)
        return home / "demo.gguf"

    monkeypatch.setattr(console, "_QUIET_S", 0)
    monkeypatch.setattr(store, "build_demo", build)
    outcome = call("models", "build", "demo", "--experts", "8", "--top-k", "2", "--type", "Q8_0", "--force")
    assert outcome.code == 0 and outcome.out == f"{home / 'demo.gguf'}\n"
    assert (seen["options"].n_experts, seen["options"].top_k, seen["options"].type, seen["force"]) == (
        8,
        2,
        "Q8_0",
        True,
    )
    assert "building: 50%" in outcome.err and "building: 100%" in outcome.err
