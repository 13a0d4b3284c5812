"""`hybrimoe chat`: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from hybrimoe.cli import slash
from hybrimoe.cli.console import is_terminal, note, show_error
from hybrimoe.cli.loading import flush, model_path, open_engine, sampling, show_events, warn_unless_verified
from hybrimoe.cli.prompt import decode, system_prompt
from hybrimoe.cli.report import expert_table, footer, prediction_table
from hybrimoe.cli.session import Session
from hybrimoe.config import Settings
from hybrimoe.errors import EXIT_INTERRUPTED, EXIT_OK, HybrimoeError, UsageError

if TYPE_CHECKING:
    from hybrimoe.generation import Answer

_QUOTES = '"""'


def chat(settings: Settings, positionals: list[str]) -> int:
    """Chats until the user leaves or stdin ends. Returns the exit code."""
    if len(positionals) > 1:
        raise UsageError(f"unexpected argument '{positionals[1]}'", "hybrimoe chat takes one model")
    if positionals and settings.sources["model"] == "flag":
        raise UsageError(f"the model is given twice, by -m and by '{positionals[0]}'")
    model = positionals[0] if positionals else settings.model
    system = system_prompt(settings)
    with open_engine(settings, model_path(model), "chat") as engine:
        session = Session(engine, sampling(settings), settings.n_predict, system)
        return Chat(session, settings).loop()


class Chat:
    """The loop around a session: reads messages, runs commands, prints answers."""

    def __init__(self, session: Session, settings: Settings) -> None:
        self.session = session
        self.settings = settings
        self.interactive = is_terminal(sys.stdin) and is_terminal(sys.stdout)
        self.attachment = ""
        # Ctrl-C since the last complete answer: the first stops an answer, the second leaves.
        self.n_interrupts = 0

    def loop(self) -> int:
        if self.interactive:
            note(f"{self.session.engine.info.name} - /help for commands, Ctrl-D to leave")
        try:
            with contextlib.closing(self._messages()) as messages:
                for text in messages:
                    if not self._turn(text):
                        return EXIT_OK
                    if self.n_interrupts > 1:
                        return EXIT_INTERRUPTED
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        return EXIT_OK

    def _messages(self) -> Any:
        if not self.interactive:
            return join_quoted(piped_lines())
        from hybrimoe.cli.terminal import Terminal

        terminal = Terminal()
        return join_quoted(terminal.lines(), terminal.set_continuing)

    def _turn(self, text: str) -> bool:
        """One message or command. Returns whether to go on."""
        try:
            if text.startswith("/") and not _is_path(text):
                result = slash.execute(self.session, text)
                if result.text:
                    print(result.text, flush=True)
                if result.attachment:
                    self.attachment += result.attachment.rstrip("\n") + "\n\n"
                if result.regenerate:
                    self._show(self.session.again())
                return not result.leave
            if text.strip():
                answer = self.session.ask(self.attachment + text)
                self.attachment = ""
                self._show(answer)
        except HybrimoeError as error:
            # A mistake in one message ends neither the conversation nor, from a pipe, the messages after it.
            show_error(error)
        return True

    def _show(self, answer: Answer) -> None:
        session, engine = self.session, self.session.engine
        if session.n_dropped:
            n, session.n_dropped = session.n_dropped, 0
            note(f"note: the context of {engine.n_ctx()} tokens is full: the {n} oldest messages are forgotten")
        verified = engine.verification is not None
        engine.reset_counters()
        pieces: Any = iter(answer)
        try:
            with contextlib.closing(pieces):
                for piece in pieces:
                    flush(piece)
            self.n_interrupts = 0 if self.interactive else self.n_interrupts
        except KeyboardInterrupt:
            self.n_interrupts += 1
        finally:
            session.keep(answer)
        flush("" if answer.text.endswith("\n") else "\n")
        if not verified:
            warn_unless_verified(engine)
        show_events(engine)
        if answer.finish_reason == "context":
            note("note: the answer was cut: the context is full; /clear starts anew")
        if self.settings.show_timings and answer.tokens:
            note(footer(engine, answer))
        if self.settings.expert_stats:
            note(expert_table(engine) + "\n" + prediction_table(engine))


def _is_path(text: str) -> bool:
    """Whether a line that begins with a slash is a message about a file, such as '/etc/hosts is what?'."""
    return "/" in text.split(maxsplit=1)[0][1:]


def piped_lines() -> Iterator[str]:
    """Lines of stdin that is no terminal. Raises UsageError for what is no UTF-8."""
    if sys.stdin is None:
        return
    for number, line in enumerate(sys.stdin.buffer, start=1):
        yield decode(line, f"line {number} of stdin").rstrip("\r\n")


def join_quoted(lines: Iterator[str], on_quote: Callable[[bool], None] = lambda _: None) -> Iterator[str]:
    '''Messages from lines: those between """ are one message. An open """ at the end closes itself.

    `on_quote` is told when such a message begins (True) and ends (False).
    '''
    with contextlib.closing(lines):  # type: ignore[type-var]
        for line in lines:
            if not line.strip().startswith(_QUOTES):
                yield line
                continue
            first = line.strip()[len(_QUOTES) :]
            if first.rstrip().endswith(_QUOTES):
                yield first.rstrip()[: -len(_QUOTES)]
                continue
            on_quote(True)
            parts = [first] if first else []
            for following in lines:
                if following.rstrip().endswith(_QUOTES):
                    last = following.rstrip()[: -len(_QUOTES)]
                    parts += [last] if last else []
                    break
                parts.append(following)
            on_quote(False)
            yield "\n".join(parts)
