"""Two lines for the user where llama.cpp, a driver or the kernel would end the process without an understandable word.

All these ends are final: ggml aborts when a device is lost, and the kernel raises SIGBUS when a page of the mapped
model file is gone, SIGILL when llama.cpp was compiled for a CPU that can do more. For programs that own their process
only.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from pathlib import Path
from typing import Any

from hybrimoe.errors import HybrimoeError, ModelError, PluginError, render

__all__ = ["explain_ends", "explain_wrong_cpu", "wrong_cpu"]

# ggml puts the source file's path and line in front.
_SOURCE = re.compile(r"^\S*?([\w.-]+:\d+: )")


def explain_ends(model: Path, *, with_plugin: bool) -> None:
    """From now on an abort inside ggml and, with the plug-in, a cut model file end the process with an error's two
    lines and its code."""
    _explain_aborts()
    if with_plugin:
        from hybrimoe.native.plugin import Ending, set_last_words

        error = ModelError(
            f"'{model.name}' was cut, or its disk failed, while it was in use",
            "start again with a whole file; replace models by renaming, not by writing over them",
        )
        set_last_words(Ending.FILE_IS_GONE, _words(error), error.exit_code)


def explain_wrong_cpu() -> None:
    """The same for a llama.cpp that is not for this CPU, whose first call may be the last. Needs the plug-in's library,
    and raises PluginError where it cannot be opened."""
    from hybrimoe.native.plugin import Ending, set_last_words

    error = wrong_cpu()
    set_last_words(Ending.ILLEGAL_INSTRUCTION, _words(error), error.exit_code)


def _words(error: HybrimoeError) -> str:
    # The cursor may stand in the middle of an answer.
    return f"\n{render(error)}\n"


def wrong_cpu() -> PluginError:
    """What an illegal instruction means: our own code asks the CPU what it has, llama.cpp's is compiled for one."""
    import llama_cpp

    return PluginError(
        "llama.cpp was compiled for another CPU: it uses an instruction that this one lacks",
        f"pip install --force-reinstall --no-cache-dir --no-deps llama-cpp-python=={llama_cpp.__version__}",
    )


@functools.cache
def _explain_aborts() -> Any:
    """Sets ggml's one abort callback; cached, because it must never be collected."""
    from hybrimoe.native.plugin import ggml_library

    def end(message: bytes | None) -> None:
        # In whatever thread it happened; nothing of llama.cpp may be called any more.
        os.write(2, _words(_abort_error((message or b"").decode("utf-8", "replace"))).encode())
        os._exit(HybrimoeError.exit_code)

    on_abort = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(end)
    ggml = ggml_library()
    # ggml_abort_callback_t ggml_set_abort_callback(ggml_abort_callback_t callback)
    ggml.ggml_set_abort_callback.argtypes = [ctypes.c_void_p]
    ggml.ggml_set_abort_callback.restype = ctypes.c_void_p
    ggml.ggml_set_abort_callback(ctypes.cast(on_abort, ctypes.c_void_p))
    return on_abort


def _abort_error(message: str) -> HybrimoeError:
    """ggml's message, with what it logged before: a driver's error names the device and the cause there."""
    from hybrimoe.llama_log import llama_log

    cause = llama_log().device_error()
    text = _SOURCE.sub(r"\1", message.strip())
    return HybrimoeError(
        f"llama.cpp gave up: {text}" + (f" ({cause})" if cause and cause not in text else ""),
        "start again; if it happens again: --device none leaves the GPU out, and 'hybrimoe doctor' looks at the rest",
    )
