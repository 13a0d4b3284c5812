"""What the user sees besides answers: notes, warnings, progress and tables, all on stderr unless asked for."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any

from hybrimoe.errors import HybrimoeError, render

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

# Without a terminal a quick step prints nothing at all.
_QUIET_S = 2.0
_PLAIN_STEP = 0.25


def is_terminal(stream: IO[Any] | None) -> bool:
    """Whether `stream` is an open terminal that understands control sequences."""
    with contextlib.suppress(ValueError, AttributeError):
        return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    return False


def note(text: str, hint: str = "") -> None:
    """Lines on stderr that are neither answer nor error."""
    for line in (text, f"hint: {hint}" if hint else ""):
        if line:
            print(line, file=sys.stderr, flush=True)


def warn(text: str, hint: str = "") -> None:
    note(f"warning: {text}", hint)


def show_error(error: HybrimoeError) -> None:
    print(render(error), file=sys.stderr, flush=True)


def size_text(n_bytes: float) -> str:
    """'4.2 GiB', '310 MiB'."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n_bytes >= factor:
            value = n_bytes / factor
            return f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return f"{n_bytes:.0f} B"


def output_console() -> Console:
    """A rich console on stdout: colours on a terminal only, and full width where there is none."""
    from rich.console import Console

    return Console(soft_wrap=not is_terminal(sys.stdout), highlight=False, emoji=False, markup=False)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[float], None]]:
    """Shows how far `what` is: gives a function that takes the share done, from 0 to 1."""
    with stages() as update:
        yield lambda share: update(what, share)


@contextlib.contextmanager
def stages() -> Iterator[Callable[[str, float], None]]:
    """Shows the progress of steps: gives a function that takes what is being done and the share of it that is done.

    A bar with the time left on a terminal; otherwise plain lines, and only for steps that take a while. Shows nothing
    until it is called.
    """
    if not is_terminal(sys.stderr):
        yield _PlainSteps().update
        return
    bar = _Bar()
    try:
        yield bar.update
    finally:
        bar.stop()


class _Bar:
    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._label = ""

    def update(self, label: str, share: float) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        if self._progress is None:
            label_column = TextColumn("{task.description}", markup=False)
            columns = (label_column, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self._progress.start()
        if label != self._label:
            for task in self._progress.task_ids:
                self._progress.remove_task(task)
            self._task = self._progress.add_task(label, total=1.0)
            self._label = label
        self._progress.update(self._task, completed=share)

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()


class _PlainSteps:
    def __init__(self) -> None:
        self._label = ""
        self._start = 0.0
        self._next_share = 0.0

    def update(self, label: str, share: float) -> None:
        now = time.monotonic()
        if label != self._label:
            self._label, self._start, self._next_share = label, now, 0.0
        passed = now - self._start
        if passed < _QUIET_S or share < self._next_share:
            return
        left = f", {passed / share * (1 - share):.0f} s left" if 0 < share < 1 else ""
        note(f"{label}: {share:.0%}{left}")
        self._next_share = share + _PLAIN_STEP
