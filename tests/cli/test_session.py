"""The conversation behind the chat, its commands, and its input, with an engine that only counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hybrimoe.cli import slash
from hybrimoe.cli.chat import join_quoted
from hybrimoe.cli.session import Session
from hybrimoe.errors import HybrimoeError, UsageError
from hybrimoe.generation import RANDOM_SEED, Sampling


class Engine:
    """One token for every character, and the messages of the last prompt."""

    plugin = None
    n_tokens = 0
    verification = None
    info = SimpleNamespace(
        name="m", architecture="a", file_type="F32", n_layers=1, n_experts=4, n_experts_used=2, path="p", moe_layers=()
    )

    def __init__(self, n_ctx: int = 100) -> None:
        self._n_ctx = n_ctx
        self.messages: list[Any] = []
        self.samplings: list[Sampling] = []

    def n_ctx(self) -> int:
        return self._n_ctx

    def chat_prompt(self, messages: Any) -> list[int]:
        self.messages = [dict(m) for m in messages]
        return [1] * sum(len(m["content"]) for m in messages)

    def answer(self, tokens: list[int], sampling: Sampling, n_predict: int) -> Any:
        self.samplings.append(sampling)
        return SimpleNamespace(text="an answer", n_predict=n_predict, prompt=tokens)


@pytest.fixture
def session() -> Session:
    engine: Any = Engine()
    return Session(engine, Sampling())


def turn(session: Session, text: str, answer: str = "an answer") -> None:
    result = session.ask(text)
    result.text = answer
    session.keep(result)


def test_turns_are_remembered_with_the_system_prompt(session: Session) -> None:
    session.system = "be brief"
    turn(session, "one")
    turn(session, "two")
    sent: Any = session.engine
    assert [m["role"] for m in sent.messages] == ["system", "user", "assistant", "user"]
    assert [m["role"] for m in session.messages] == ["user", "assistant"] * 2


def test_the_oldest_turns_are_dropped_when_the_context_is_full(session: Session) -> None:
    session.system = "s" * 10
    for letter in "abcd":
        turn(session, letter * 20, "x" * 10)
    sent: Any = session.engine
    assert sent.messages[0]["role"] == "system", "the system prompt stays"
    assert sent.messages[1]["role"] == "user", "whole turns go"
    assert sum(len(m["content"]) for m in sent.messages) + 25 <= 100
    assert session.n_dropped > 0


def test_a_message_longer_than_the_context_is_refused_and_forgotten(session: Session) -> None:
    turn(session, "short")
    before = list(session.messages)
    with pytest.raises(UsageError, match="100"):
        session.ask("x" * 200)
    assert session.messages == before
    turn(session, "goes on")


def test_a_message_that_leaves_little_room_is_still_answered(session: Session) -> None:
    turn(session, "x" * 90)


def test_regenerate_replaces_the_answer(session: Session) -> None:
    turn(session, "one", "first")
    again = session.again()
    again.text = "second"
    session.keep(again)
    assert [m["content"] for m in session.messages] == ["one", "second"]


def test_a_given_seed_repeats_the_conversation_but_not_each_answer(session: Session) -> None:
    engine: Any = session.engine
    session.sampling = Sampling(seed=5)
    turn(session, "one")
    session.again()
    assert [s.seed for s in engine.samplings] == [5, 6]
    session.sampling = Sampling()
    session.again()
    assert engine.samplings[-1].seed == RANDOM_SEED


def test_an_empty_answer_takes_its_question_along(session: Session) -> None:
    turn(session, "one", "")
    assert session.messages == []


def test_save_and_load(session: Session, tmp_path: Path) -> None:
    session.system = "é"
    turn(session, "one", "zwölf 🙂")
    path = tmp_path / "chat.json"
    slash.execute(session, f"/save {path}")
    saved = list(session.messages)
    slash.execute(session, "/clear")
    assert session.messages == []
    slash.execute(session, f"/load {path}")
    assert session.messages == saved and session.system == "é"
    assert [p.name for p in tmp_path.iterdir()] == ["chat.json"], "no temporary file stays"


def test_saving_where_nothing_can_be_written(session: Session, tmp_path: Path) -> None:
    with pytest.raises(HybrimoeError, match="cannot write"):
        slash.execute(session, f"/save {tmp_path}/absent/chat.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(HybrimoeError):
        slash.execute(session, f"/save {tmp_path}/folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"messages": [1]}', '{"messages": [{"role": "x", "content": "y"}]}'])
def test_loading_what_is_no_chat_changes_nothing(session: Session, tmp_path: Path, text: str) -> None:
    turn(session, "one")
    before = list(session.messages)
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UsageError):
        slash.execute(session, f"/load {path}")
    path.write_bytes(b"\xff\x00")
    with pytest.raises(UsageError):
        slash.execute(session, f"/load {path}")
    with pytest.raises(HybrimoeError):
        slash.execute(session, "/load /does/not/exist")
    assert session.messages == before


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("/set temp 0.3", "temp", 0.3),
        ("/set top-k 5", "top_k", 5),
        ("/set top_k 6", "top_k", 6),
        ("/set --min-p 0.1", "min_p", 0.1),
        ("/set typical 0.9", "typical_p", 0.9),
        ("/set seed 9", "seed", 9),
        ("/set seed -1", "seed", RANDOM_SEED),
        ("/set repeat-last-n 0", "repeat_last_n", 0),
    ],
)
def test_set_changes_sampling(session: Session, line: str, name: str, value: Any) -> None:
    slash.execute(session, line)
    assert getattr(session.sampling, name) == value


def test_set_other_keys(session: Session) -> None:
    slash.execute(session, "/set n-predict 12")
    slash.execute(session, "/set system be kind to strangers")
    assert session.n_predict == 12 and session.system == "be kind to strangers"
    slash.execute(session, "/set system")
    assert session.system == ""


@pytest.mark.parametrize(
    "line", ["/set", "/set nothing 1", "/set temp", "/set temp hot", "/set top-p 7", "/set n-predict x"]
)
def test_set_refuses_nonsense(session: Session, line: str) -> None:
    before = session.sampling
    with pytest.raises(UsageError):
        slash.execute(session, line)
    assert session.sampling == before


@pytest.mark.parametrize(
    "line", ["/nope", "/", "/help me", "/read", "/save", "/load", "/regen", "/read /does/not/exist"]
)
def test_wrong_commands(session: Session, line: str) -> None:
    with pytest.raises(HybrimoeError):
        slash.execute(session, line)


def test_help_names_every_command(session: Session) -> None:
    text = slash.execute(session, "/help").text
    for name in (
        "/help",
        "/exit",
        "/clear",
        "/regen",
        "/read",
        "/set",
        "/show",
        "/save",
        "/load",
        "/stats",
        "/experts",
    ):
        assert name in text
    for name in ("/exit", "/bye", "/quit"):
        assert name in text and slash.execute(session, name).leave


def test_read_attaches_a_file(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("the notes")
    assert slash.execute(session, f"/read {path}").attachment == "the notes"
    path.write_bytes(b"\xff")
    with pytest.raises(UsageError, match="UTF-8"):
        slash.execute(session, f"/read {path}")


def test_show_has_all_settings(session: Session) -> None:
    text = slash.execute(session, "/show").text
    for key in slash.settable_keys():
        assert key in text or key == "system"
    assert "seed = random" in text


@pytest.mark.parametrize(
    ("lines", "messages"),
    [
        (["a", "b"], ["a", "b"]),
        (['"""', "a", "b", '"""', "c"], ["a\nb", "c"]),
        (['"""a', 'b"""'], ["a\nb"]),
        (['"""a b"""', "c"], ["a b", "c"]),
        (['"""a', "b"], ["a\nb"]),
        (['"""', "  indented", "", 'x"""'], ["  indented\n\nx"]),
    ],
)
def test_quoted_messages(lines: list[str], messages: list[str]) -> None:
    def source() -> Iterator[str]:
        yield from lines

    assert list(join_quoted(source())) == messages


def test_completion_of_commands_keys_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.document import Document

    from hybrimoe.cli.terminal import SlashCompleter

    def complete(text: str) -> list[str]:
        return [c.text for c in SlashCompleter().get_completions(Document(text), CompleteEvent())]

    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    assert complete("/re") == ["/regen", "/read"]
    assert complete("/set top") == ["top-k", "top-p"]
    assert complete("/read no") == ["tes.txt"]
    assert complete("hello") == [] and complete("/set temp ") == []


def test_saved_files_are_json(session: Session, tmp_path: Path) -> None:
    turn(session, "one")
    session.save(tmp_path / "c.json")
    data = json.loads((tmp_path / "c.json").read_text())
    assert data["format"] == "hybrimoe-chat" and len(data["messages"]) == 2
