"""llama.cpp's log: silent unless asked for, with its last errors kept for the message when something fails."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import os
import re
from typing import Any

# GGML_LOG_LEVEL_ERROR and GGML_LOG_LEVEL_CONT (ggml.h)
_ERROR_LEVEL = 4
_CONTINUE_LEVEL = 5
_FUNCTION_PREFIX = re.compile(r"^[\w:~<>]+: ")


class LlamaLog:
    """The process's log sink of llama.cpp and ggml. `verbose` sends everything to stderr."""

    def __init__(self) -> None:
        self.verbose = False
        self._errors: collections.deque[str] = collections.deque(maxlen=16)
        self._level = 0
        self._line = ""

    def write(self, level: int, text: bytes) -> None:
        if self.verbose:
            # The file descriptor, because llama.cpp logs from its own threads at times when sys.stderr is not usable.
            with contextlib.suppress(OSError):
                os.write(2, text)
        if level != _CONTINUE_LEVEL:
            self._level, self._line = level, ""
        self._line += text.decode("utf-8", "replace")
        while "\n" in self._line:
            line, _, self._line = self._line.partition("\n")
            if self._level == _ERROR_LEVEL and line.strip():
                self._errors.append(line.strip())

    def clear(self) -> None:
        self._errors.clear()

    def errors(self) -> list[str]:
        """Error lines since `clear`, oldest first, without the function names that llama.cpp puts before them."""
        return [_FUNCTION_PREFIX.sub("", line) for line in self._errors]

    def reason(self) -> str:
        """The most telling error line, or an empty string: the first names the cause, later ones its effects."""
        lines = self.errors()
        return lines[0] if lines else ""

    def device_error(self) -> str:
        """The newest line that speaks of an error, with the device that ggml names in the next one; or ''."""
        lines = self.errors()
        for i in reversed(range(len(lines))):
            if "error" in lines[i].lower():
                return "; ".join(line.partition(", in function")[0] for line in lines[i : i + 2])
        return ""


@functools.cache
def llama_log() -> LlamaLog:
    """Direct llama.cpp's log into one `LlamaLog` and return it. ggml has one sink per process, hence the cache."""
    import llama_cpp

    log = LlamaLog()

    def callback(level: int, text: bytes, _user_data: Any) -> None:
        log.write(level, text)

    # The C side keeps the pointer for good: it must never be collected.
    log.c_callback = llama_cpp.llama_log_callback(callback)  # type: ignore[attr-defined]
    llama_cpp.llama_log_set(log.c_callback, ctypes.c_void_p(0))  # type: ignore[attr-defined]
    return log
