"""A conversation: messages, settings and the turns between user and model, without any terminal."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import UsageError, from_os_error
from hybrimoe.files import check_replaceable, read_text
from hybrimoe.generation import RANDOM_SEED, Answer, Sampling
from hybrimoe.json_text import parse_json

if TYPE_CHECKING:
    from hybrimoe.engine import Engine

# Room that a turn leaves for its answer before the oldest turns are dropped, unless -n asks for less.
_ANSWER_SHARE = 0.25
_ROLES = ("system", "user", "assistant")


@dataclass
class Session:
    """The state of a chat. `messages` are the turns since /clear without the system prompt."""

    engine: Engine
    sampling: Sampling
    n_predict: int = -1
    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    n_dropped: int = 0
    n_answers: int = 0

    def ask(self, text: str) -> Answer:
        """Adds a message of the user and returns the answer to iterate over; `keep` stores it.

        Drops the oldest turns when the conversation has outgrown the context (`n_dropped` counts their messages).
        Raises UsageError when the message alone is too long; it is not kept then.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            return self._answer()
        except BaseException:
            self.messages.pop()
            raise

    def again(self) -> Answer:
        """Another answer to the last message. Raises UsageError when there is none."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages:
            raise UsageError("there is no answer to repeat")
        return self._answer()

    def keep(self, answer: Answer) -> None:
        """Takes an answer, also one that was interrupted, into the conversation."""
        if answer.text:
            self.messages.append({"role": "assistant", "content": answer.text})
        else:
            # A turn without an answer would leave two messages of the user in a row, which templates refuse.
            self.messages.pop()

    def clear(self) -> None:
        self.messages.clear()
        self.n_dropped = 0

    def _answer(self) -> Answer:
        tokens = self._fit()
        sampling = self.sampling
        if sampling.seed != RANDOM_SEED:
            # A given seed makes the conversation repeatable, not every answer in it equal.
            sampling = replace(sampling, seed=(sampling.seed + self.n_answers) % RANDOM_SEED)
        self.n_answers += 1
        return self.engine.answer(tokens, sampling, self.n_predict)

    def _fit(self) -> list[int]:
        """The prompt, after dropping whole turns from the front until the answer has room."""
        n_ctx = self.engine.n_ctx()
        room = int(n_ctx * _ANSWER_SHARE)
        if self.n_predict >= 0:
            room = min(room, self.n_predict)
        head = [{"role": "system", "content": self.system}] if self.system else []
        start = 0
        while True:
            tokens = self.engine.chat_prompt([*head, *self.messages[start:]])
            if len(tokens) + room <= n_ctx or start >= len(self.messages) - 1:
                break
            start += 1
            while start < len(self.messages) - 1 and self.messages[start]["role"] != "user":
                start += 1
        if len(tokens) >= n_ctx:
            raise UsageError(
                f"this message takes {len(tokens)} tokens, the context holds {n_ctx}",
                "shorten it, or start with a larger context: -c",
            )
        del self.messages[:start]
        self.n_dropped += start
        return tokens

    # Files

    def save(self, path: Path) -> None:
        """Writes the conversation as JSON; the file appears complete or not at all."""
        data: dict[str, Any] = {
            "format": "hybrimoe-chat",
            "version": 1,
            "model": self.engine.info.name,
            "system": self.system,
            "messages": self.messages,
        }
        write_atomically(path, json.dumps(data, ensure_ascii=False, indent=1) + "\n")

    def load(self, path: Path) -> None:
        """Replaces the conversation by a saved one. Raises UsageError for a file that is none; nothing changes then."""
        try:
            data = parse_json(read_text(path))
        except OSError as error:
            raise from_os_error(error, f"read '{path}'") from error
        except ValueError as error:
            raise UsageError(f"'{path}' is no saved chat: {error}") from None
        messages = data.get("messages") if isinstance(data, dict) else None
        if not isinstance(messages, list) or not all(_is_message(m) for m in messages):
            raise UsageError(f"'{path}' is no saved chat", "give a file that /save wrote")
        system = data.get("system", "")
        self.system = system if isinstance(system, str) else ""
        self.messages = [{"role": m["role"], "content": m["content"]} for m in messages]
        self.n_dropped = 0


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    return value["role"] in _ROLES and isinstance(value.get("content"), str)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file through a temporary one beside it. Raises HybrimoeError; nothing is left behind then."""
    try:
        check_replaceable(path)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise from_os_error(error, f"write '{path}'") from error
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        Path(name).chmod(0o666 & ~mask)
        Path(name).replace(path)
    except OSError as error:
        raise from_os_error(error, f"write '{path}'") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
