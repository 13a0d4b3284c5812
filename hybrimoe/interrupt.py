"""Stopping a llama.cpp computation from Python: a flag that C code polls, and Ctrl-C that raises it at once."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any


class AbortFlag:
    """A flag that llama.cpp's abort callback reads without entering Python.

    ggml asks before every node of a graph. `strlen` on a one-character buffer is the callback: no interpreter lock, no
    measurable cost, and setting the first byte makes it true.
    """

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(2)

    def install(self, context: Any) -> None:
        """Makes `llama_decode` on `context` return early while the flag is set. Must live as long as `context`."""
        import llama_cpp

        strlen = ctypes.cast(ctypes.CDLL(None).strlen, ctypes.c_void_p).value
        self._callback = llama_cpp.ggml_abort_callback(strlen)
        llama_cpp.llama_set_abort_callback(context, self._callback, ctypes.cast(self._buffer, ctypes.c_void_p))

    def set(self) -> None:
        self._buffer[0] = b"\x01"

    def clear(self) -> None:
        self._buffer[0] = b"\x00"

    def is_set(self) -> bool:
        return self._buffer.raw[0] != 0


@contextlib.contextmanager
def abort_on_interrupt(flag: AbortFlag) -> Iterator[None]:
    """While active, Ctrl-C sets `flag`, at once even inside a long `llama_decode`, and raises nothing.

    Whoever computes must look at the flag; at the end KeyboardInterrupt is raised, also in place of the error that the
    abortion led to. Python runs its signal handlers only between byte codes, so that a long prompt could not be
    stopped, and inside llama.cpp's callbacks too, where an exception would be lost. A second Ctrl-C is raised as usual.
    Does nothing outside the main thread, which never gets signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)

    def watch() -> None:
        while number := os.read(read_end, 1):
            if number[0] == signal.SIGINT:
                flag.set()

    n_signals = 0

    def handle(_number: int, _frame: object) -> None:
        nonlocal n_signals
        n_signals += 1
        flag.set()
        if n_signals > 1:
            raise KeyboardInterrupt

    watcher = threading.Thread(target=watch, name="hybrimoe-interrupt", daemon=True)
    previous_fd = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    previous_handler = signal.signal(signal.SIGINT, handle)
    watcher.start()
    try:
        try:
            yield
        except Exception:
            if flag.is_set():
                raise KeyboardInterrupt from None
            raise
        if flag.is_set():
            raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, previous_handler)
        signal.set_wakeup_fd(previous_fd)
        os.close(write_end)
        watcher.join()
        os.close(read_end)
        flag.clear()
