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
    """Shows how far `what` is: gives a function that takes the share done, from 0 to 1.

    A bar with the time left on a terminal; plain lines for slow steps otherwise.
    """
    if is_terminal(sys.stderr):
        with _bar(what) as update:
            yield update
    else:
        yield _plain(what)


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Callable[[float], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda share: bar.update(task, completed=share)


def _plain(what: str) -> Callable[[float], None]:
    start = time.monotonic()
    next_share = 0.0

    def update(share: float) -> None:
        nonlocal next_share
        passed = time.monotonic() - start
        if passed < _QUIET_S or share < next_share:
            return
        left = f", {passed / share * (1 - share):.0f} s left" if 0 < share < 1 else ""
        note(f"{what}: {share:.0%}{left}")
        next_share = share + _PLAIN_STEP

    return update
