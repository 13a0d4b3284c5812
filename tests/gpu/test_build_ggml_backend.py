"""The builder of ggml backends as modules: what it asks CMake for, and what it says when something is missing."""

from __future__ import annotations

from pathlib import Path

import build_ggml_backend
import pytest


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        build_ggml_backend.main(list(arguments))
    assert caught.value.code in (1, 2)
    text = capsys.readouterr()
    assert text.out == ""
    return text.err


def is_two_lines(text: str) -> bool:
    first, second = text.splitlines()
    return first.startswith("error: ") and second.startswith("hint: ")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def program(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_nothing_is_built_when_only_asked(empty_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert is_two_lines(failure(capsys, "vulkan", "--no-build"))
    assert not empty_cache.exists()


def test_a_built_module_is_found_and_copied(
    empty_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = build_ggml_backend.module_path("vulkan", build_ggml_backend.vulkan_options())
    assert module.is_relative_to(empty_cache)
    module.parent.mkdir(parents=True)
    module.write_bytes(b"a module")
    build_ggml_backend.main(["vulkan"])
    assert capsys.readouterr().out.strip() == str(module)
    build_ggml_backend.main(["vulkan", "--out", str(tmp_path / "out")])
    copy = Path(capsys.readouterr().out.strip())
    assert copy.parent == tmp_path / "out" and copy.read_bytes() == b"a module"
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_missing_tools_are_named(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    text = failure(capsys, "vulkan")
    assert is_two_lines(text) and "glslc" in text and "apt-get install" in text
    text = failure(capsys, "cuda", "--architectures", "86")
    assert is_two_lines(text) and "nvcc" in text
    assert not empty_cache.exists()


def test_cuda_without_a_card_needs_architectures(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program(tmp_path / "cuda" / "bin", "nvcc")
    monkeypatch.setenv("PATH", str(tmp_path / "cuda" / "bin"))
    text = failure(capsys, "cuda")
    assert is_two_lines(text) and "--architectures" in text


def test_cuda_options_follow_the_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit = tmp_path / "cuda"
    program(toolkit / "bin", "nvcc")
    program(toolkit / "lib64", "libcublas.so.13")
    monkeypatch.setenv("PATH", str(toolkit / "bin"))
    options = build_ggml_backend.cuda_options("86;89", flash_attention=True)
    assert "-DCMAKE_CUDA_ARCHITECTURES=86;89" in options
    assert "-DGGML_CUDA_FA=ON" in options
    assert "-DGGML_CUDA_NO_VMM=ON" in options, "there is no driver library to link against"
    program(toolkit / "lib64" / "stubs", "libcuda.so")
    assert "-DGGML_CUDA_NO_VMM=ON" not in build_ggml_backend.cuda_options("86", flash_attention=False)


def test_cublas_of_the_python_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "nvidia" / "cu13"
    library = program(package / "lib", "libcublas.so.13")
    program(package / "lib", "libcublasLt.so.13")
    program(package / "include", "cublas_v2.h")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    options = build_ggml_backend.python_cublas()
    assert f"-DCUDA_cublas_LIBRARY={library}" in options
    assert f"-DCMAKE_CUDA_FLAGS=-I{package / 'include'}" in options


def test_key_is_of_options_not_of_the_checkout() -> None:
    key = build_ggml_backend.key_of
    here = [f"-DCMAKE_CXX_FLAGS=-I{build_ggml_backend.ROOT}/native/x"]
    assert key(here) == key(["-DCMAKE_CXX_FLAGS=-I/native/x"])
    assert key(["-DA=1", "-DB=2"]) != key(["-DA=1", "-DB=3"])


@pytest.mark.parametrize("arguments", [[], ["metal"], ["vulkan", "--jobs", "0"], ["vulkan", "--architectures", "86"]])
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "error: " in failure(capsys, *arguments)
