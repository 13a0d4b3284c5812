"""Time and memory of one use, bounded."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class HangError(BaseException):
    """The use did not come to an end. No Exception, and no OSError such as TimeoutError: nothing may swallow it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises HangError in what runs longer (in Python code; a hang in C is pytest-timeout's affair)."""

    def give_up(*_: Any) -> None:
        raise HangError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Memory:
    """Growth of this process's resident memory to its peak within `with`: Python's, numpy's and native code's."""

    peak_bytes = 0

    def __enter__(self) -> Memory:
        _STATUS.with_name("clear_refs").write_text("5")  # the peak begins anew
        self._before = _kib("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.peak_bytes = max(0, _kib("VmHWM") - self._before) << 10


_STATUS = Path("/proc/self/status")


def _kib(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])
