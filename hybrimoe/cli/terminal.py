"""Line editing for the chat: history, completion of slash commands, continuation lines."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from hybrimoe.cli import slash
from hybrimoe.files import check_replaceable
from hybrimoe.private_files import make_private_folder, private_opener

_FILE_COMMANDS = ("/read", "/save", "/load")


class Terminal:
    """The prompt. `set_continuing` changes it while a message of several lines is open."""

    def __init__(self, **session_arguments: Any) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=_history(history_path()),
            completer=SlashCompleter(),
            complete_while_typing=False,
            enable_history_search=True,
            **session_arguments,
        )
        self._continuing = False

    def set_continuing(self, continuing: bool) -> None:
        self._continuing = continuing

    def lines(self) -> Iterator[str]:
        """Lines as they are typed. Ctrl-D ends; Ctrl-C discards a line that was begun and is raised on an empty one."""
        while True:
            try:
                line = self._session.prompt("... " if self._continuing else "> ")
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self._session.default_buffer.text:
                    raise
            else:
                yield line


class SlashCompleter(Completer):
    """Completes commands, the keys of /set, and file names."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/"):
            return
        name, space, argument = text.partition(" ")
        if not space:
            candidates, word = list(slash.COMMANDS), name
        elif name == "/set" and " " not in argument:
            candidates, word = slash.settable_keys(), argument
        elif name in _FILE_COMMANDS:
            yield from self._paths.get_completions(Document(argument), complete_event)
            return
        else:
            return
        for candidate in candidates:
            if candidate.startswith(word):
                yield Completion(candidate, start_position=-len(word))


def history_path() -> Path:
    """The chat's input history, in the user's state folder."""
    import platformdirs

    return Path(platformdirs.user_state_dir("hybrimoe", appauthor=False)) / "chat_history"


def _history(path: Path) -> History:
    # A folder that cannot be written costs the history, not the chat.
    with contextlib.suppress(OSError):
        make_private_folder(path.parent)
        check_replaceable(path)  # opening a pipe would wait for a reader
        with open(path, "a", opener=private_opener):
            path.chmod(0o600)  # one of an earlier release
        return _KeptHistory(str(path))
    return InMemoryHistory()


class _KeptHistory(FileHistory):
    def store_string(self, string: str) -> None:
        # A full disk costs the history, not the chat.
        with contextlib.suppress(OSError):
            super().store_string(string)
