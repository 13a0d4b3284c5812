"""Errors that a user sees: one message, one hint, one exit code.

Every expected failure is raised as a `HybrimoeError`; the command line prints `render(error)` on stderr and leaves with
`error.exit_code`. Anything else that escapes is a defect of this program.
"""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

__all__ = [
    "EXIT_INTERRUPTED",
    "EXIT_OK",
    "DoesNotFitError",
    "HybrimoeError",
    "ModelError",
    "PluginError",
    "UsageError",
    "as_script",
    "from_os_error",
    "render",
]

_P = ParamSpec("_P")

EXIT_OK = 0
EXIT_INTERRUPTED = 130


class HybrimoeError(Exception):
    """A run-time failure (disk full, no permission, device trouble): exit code 1.

    `message` says what is wrong and names the thing; `hint` says what to do about it, a command where there is one
    (empty: no second line). Neither holds a line break once rendered.
    """

    exit_code: int = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[type[HybrimoeError], tuple[str, str]]:
        return (type(self), (self.message, self.hint))


class UsageError(HybrimoeError):
    """Wrong or contradicting arguments: exit code 2."""

    exit_code = 2


class ModelError(HybrimoeError):
    """Model missing, corrupt, truncated, unsupported or without experts: exit code 3."""

    exit_code = 3


class DoesNotFitError(HybrimoeError):
    """The model or its context does not fit this machine's memory: exit code 4."""

    exit_code = 4


class PluginError(HybrimoeError):
    """The backend plug-in is missing, of another release, or did not run: exit code 5."""

    exit_code = 5


def _one_line(text: str) -> str:
    # File names and metadata reach messages: control characters must not reach the terminal.
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


def render(error: HybrimoeError) -> str:
    """The two lines a user reads: `error: ...` and, where there is a hint, `hint: ...`. No final line break."""
    lines = [f"error: {_one_line(error.message)}"]
    if error.hint:
        lines.append(f"hint: {_one_line(error.hint)}")
    return "\n".join(lines)


_OS_HINTS = {
    errno.ENOSPC: "free some disk space, or choose another folder",
    errno.EDQUOT: "your disk quota is used up: free some space, or choose another folder",
    errno.EACCES: "check the permissions, or choose a folder you can write to",
    errno.EPERM: "check the permissions, or choose a folder you can write to",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def from_os_error(error: OSError, doing: str, hint: str = "") -> HybrimoeError:
    """`error` as a run-time failure: 'cannot <doing>: <reason>'. `hint` replaces the one for its error number."""
    reason = error.strerror or str(error) or type(error).__name__
    return HybrimoeError(f"cannot {doing}: {reason}", hint or _OS_HINTS.get(error.errno or 0, ""))


def as_script(main: Callable[_P, int | None]) -> Callable[_P, int]:
    """`main` of a script: expected failures become two lines on stderr and their exit code, Ctrl-C becomes 130."""

    @functools.wraps(main)
    def run(*args: _P.args, **options: _P.kwargs) -> int:
        try:
            return main(*args, **options) or EXIT_OK
        except HybrimoeError as error:
            print(render(error), file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED

    return run
