"""Ends that nobody can prevent: two lines and an exit code in place of a core dump or silence."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from hybrimoe.llama_log import LlamaLog

TinyModel = Callable[..., Path]

_TRUNCATED = """
import os, sys
from pathlib import Path
from hybrimoe.engine import Engine, EngineOptions
from hybrimoe.last_words import explain_ends
path = Path(sys.argv[1])
with Engine(path, EngineOptions(n_ctx=256, warmup=False, repack=False)) as engine:
    explain_ends(path, with_plugin=True)
    os.truncate(path, 4096)
    engine.eval(engine.text_prompt("one two three"))
print("survived")
"""
_ABORTED = """
import ctypes
from pathlib import Path
from hybrimoe.last_words import explain_ends
from hybrimoe.llama_log import llama_log
from hybrimoe.native.plugin import ggml_library
log = llama_log()
log.write(4, b"ggml_cuda_compute_forward: MUL_MAT_ID failed\\n")
log.write(4, b"CUDA error: unspecified launch failure\\n")
log.write(4, b"  current device: 0, in function ggml_cuda_op at /build/ggml-cuda.cu:2000\\n")
log.write(4, b"  err\\n")
explain_ends(Path("m.gguf"), with_plugin=False)
ggml_library().ggml_abort(b"/build/ggml-cuda.cu", 99, b"CUDA error")
print("survived")
"""


def ended(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_model_file_that_is_cut_while_in_use(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    shutil.copy(tiny_model("mixtral", "Q4_0"), path)
    done = ended(_TRUNCATED, str(path))
    assert (done.returncode, done.stdout) == (3, "")
    lines = done.stderr.strip().splitlines()
    assert lines[0] == "error: 'cut.gguf' was cut, or its disk failed, while it was in use"
    assert len(lines) == 2 and lines[1].startswith("hint: ")


def test_an_abort_inside_ggml_names_device_and_cause() -> None:
    done = ended(_ABORTED)
    assert (done.returncode, done.stdout) == (1, "")
    lines = done.stderr.strip().splitlines()
    assert lines[0] == (
        "error: llama.cpp gave up: ggml-cuda.cu:99: CUDA error (CUDA error: unspecified launch failure; "
        "current device: 0)"
    )
    assert len(lines) == 2 and lines[1].startswith("hint: ")


def test_no_device_error_without_a_line_about_one() -> None:
    log = LlamaLog()
    assert log.device_error() == ""
    log.write(4, b"f: something is missing\n")
    assert log.device_error() == ""
