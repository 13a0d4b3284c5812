"""A header that llama.cpp would die of ends a child, never this process; a header that passed is not tried again."""

from __future__ import annotations

import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFReader

from hybrimoe.errors import ModelError, PluginError
from hybrimoe.gguf_model import inspect
from hybrimoe.proof import header_hash, prove

TinyModel = Callable[..., Path]


def with_number(path: Path, key: str, value: int, target: Path) -> Path:
    """A copy of a GGUF file with another value for a 32-bit key."""
    field = GGUFReader(path).fields[key]
    data = bytearray(path.read_bytes())
    at = field.offset + 8 + len(key) + 4  # length of the name, the name, the value's type
    data[at : at + 4] = struct.pack("<I", value)
    target.write_bytes(data)
    return target


def test_an_assertion_of_llama_cpp_is_an_error(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = with_number(tiny_model("deepseek2", "Q4_0"), "deepseek2.attention.key_length_mla", 1, tmp_path / "bad.gguf")
    model = inspect(path).require_moe()
    for _ in range(2):  # nothing is remembered of it
        with pytest.raises(
            ModelError, match=r"'bad.gguf' makes llama.cpp end the process: deepseek2.cpp:\d+: GGML_ASS"
        ):
            prove(model, tmp_path / "proofs")
    assert not (tmp_path / "proofs").exists()


@pytest.mark.parametrize("command", ["run BAD hello", "profile BAD", "trace record BAD -o t.trace", "bench BAD"])
def test_every_command_that_loads_asks_first(
    command: str, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "deepseek2.attention.key_length_mla"
    path = with_number(tiny_model("deepseek2", "Q4_0"), key, 1, tmp_path / "bad.gguf")
    for name in ("CONFIG", "STATE", "DATA", "CACHE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name))
    words = command.replace("BAD", str(path)).split()
    done = subprocess.run(
        [sys.executable, "-m", "hybrimoe.cli.main", *words], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (3, "")
    error, hint = done.stderr.strip().splitlines()
    assert error.startswith("error: 'bad.gguf' makes llama.cpp end the process: deepseek2.cpp:")
    assert hint.startswith("hint: ")
    assert not list(tmp_path.glob("*.trace")) and not list(tmp_path.glob("*.html"))


def test_a_llama_cpp_for_another_cpu_is_not_the_models_fault(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child stumbles over the instruction first."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nkill -{signal.SIGILL.name[3:]} $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(PluginError, match=r"llama\.cpp was compiled for another CPU"):
        prove(inspect(tiny_model("mixtral", "Q4_0")), tmp_path / "proofs")
    assert not (tmp_path / "proofs").exists()


def test_a_proof_is_remembered_by_content(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model("mixtral", "Q4_0")
    folder = tmp_path / "state" / "proofs"
    assert prove(inspect(source), folder) is True
    assert prove(inspect(source), folder) is False
    copy = tmp_path / "another name.gguf"
    copy.write_bytes(source.read_bytes())
    assert prove(inspect(copy), folder) is False
    changed = with_number(source, "llama.context_length", 77, tmp_path / "changed.gguf")
    assert header_hash(inspect(changed)) != header_hash(inspect(source))
    assert prove(inspect(changed), folder) is True
    assert len(list(folder.iterdir())) == 2
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in folder.iterdir())


def test_what_llama_cpp_refuses_is_left_to_the_real_load(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = with_number(tiny_model("mixtral", "Q4_0"), "llama.attention.head_count", 3, tmp_path / "refused.gguf")
    prove(inspect(path), tmp_path / "proofs")
    assert not (tmp_path / "proofs").exists()


def test_no_place_for_proofs_is_no_error(tiny_model: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert prove(inspect(tiny_model("mixtral", "Q4_0")), tmp_path / "file" / "proofs") is True
