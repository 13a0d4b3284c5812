"""Two lines for the user where llama.cpp, a driver or the kernel would end the process without an understandable word.

Both ends are final by design: ggml aborts when a device is lost, and the kernel raises SIGBUS when a page of the mapped
model file is gone. For programs that own their process only.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from pathlib import Path
from typing import Any

from hybrimoe.errors import HybrimoeError, ModelError, render

__all__ = ["explain_ends"]

# ggml puts the source file's path and line in front.
_SOURCE = re.compile(r"^\S*?([\w.-]+:\d+: )")


def explain_ends(model: Path, *, with_plugin: bool) -> None:
    """From now on an abort inside ggml and a cut model file end the process with an error's two lines and its code."""
    _explain_aborts()
    if with_plugin:
        from hybrimoe.native.plugin import load_plugin

        error = ModelError(
            f"'{model.name}' was cut, or its disk failed, while it was in use",
            "start again with a whole file; replace models by renaming, not by writing over them",
        )
        load_plugin().set_last_words("\n" + render(error) + "\n", error.exit_code)


@functools.cache
def _explain_aborts() -> Any:
    """Sets ggml's one abort callback; cached, because it must never be collected."""
    from hybrimoe.native.plugin import ggml_library

    def end(message: bytes | None) -> None:
        # In whatever thread it happened; nothing of llama.cpp may be called any more.
        os.write(2, f"\n{render(_abort_error((message or b'').decode('utf-8', 'replace')))}\n".encode())
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
