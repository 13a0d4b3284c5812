"""Loading ggml backends as modules: what is refused, and how it is said. tests/gpu loads a real one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hybrimoe.errors import PluginError, render
from hybrimoe.native.backend_modules import backend_module_paths, device_memory, device_names, load_backend_modules


def test_paths_come_from_the_environment() -> None:
    text = os.pathsep.join(["/a/libggml-vulkan.so", "", "b.so"])
    assert backend_module_paths({"HYBRIMOE_BACKENDS": text}) == (Path("/a/libggml-vulkan.so"), Path("b.so"))
    assert backend_module_paths({"HYBRIMOE_BACKENDS": " "}) == ()
    assert backend_module_paths({}) == ()


def test_nothing_to_load() -> None:
    before = device_names()
    assert load_backend_modules([]) == ()
    assert device_names() == before
    assert "CPU" in before


def test_memory_of_a_device() -> None:
    free, total = device_memory("CPU")
    assert 0 < free <= total
    with pytest.raises(PluginError, match="no device 'CUDA7'"):
        device_memory("CUDA7")


def refusal(path: Path) -> str:
    before = device_names()
    with pytest.raises(PluginError) as caught:
        load_backend_modules([path])
    assert caught.value.exit_code == 5
    assert device_names() == before
    text = render(caught.value)
    assert len(text.splitlines()) == 2
    return text


def test_missing_module(tmp_path: Path) -> None:
    assert "is missing" in refusal(tmp_path / "libggml-vulkan.so")


def test_damaged_module(tmp_path: Path) -> None:
    path = tmp_path / "libggml-vulkan.so"
    path.write_bytes(b"\x7fELF is not enough")
    assert "cannot be loaded" in refusal(path)


def compiled(folder: Path, source: str) -> Path:
    (folder / "module.c").write_text(source)
    library = folder / "libggml-fake.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, folder / "module.c"], check=True)
    return library


def test_library_that_is_no_backend(tmp_path: Path) -> None:
    assert "ggml refused" in refusal(compiled(tmp_path, "int nothing_of_ggml;"))


def test_backend_without_driver(tmp_path: Path) -> None:
    # ggml's Vulkan backend returns no registry where there is no driver.
    assert "driver" in refusal(compiled(tmp_path, "void * ggml_backend_init(void) { return 0; }"))


def test_module_of_another_ggml_api(tmp_path: Path) -> None:
    # The first member of ggml_backend_reg is its API version.
    source = "static int registry[64] = { 99 }; void * ggml_backend_init(void) { return registry; }"
    assert "another ggml release" in refusal(compiled(tmp_path, source))


def test_module_that_lacks_a_library(tmp_path: Path) -> None:
    (tmp_path / "needed.c").write_text("int needed(void) { return 1; }")
    needed = tmp_path / "libnot_on_this_machine.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", needed, tmp_path / "needed.c"], check=True)
    (tmp_path / "module.c").write_text("int needed(void); void * ggml_backend_init(void) { needed(); return 0; }")
    library = tmp_path / "libggml-fake.so"
    command = ["cc", "-shared", "-fPIC", "-o", library, tmp_path / "module.c", f"-L{tmp_path}", "-lnot_on_this_machine"]
    subprocess.run(command, check=True)
    needed.unlink()
    assert "libnot_on_this_machine.so" in refusal(library)


def test_device_that_is_there_already(plugin: object, tmp_path: Path) -> None:
    """A copy of the plug-in is another library with a device of the same name."""
    from hybrimoe.native.plugin import library_path

    copy = tmp_path / "libggml-copy.so"
    copy.write_bytes(library_path().read_bytes())
    script = (
        "import sys\n"
        "from hybrimoe.errors import PluginError\n"
        "from hybrimoe.native.backend_modules import device_names, load_backend_modules\n"
        "names = load_backend_modules([sys.argv[1]])\n"
        "assert names == ('HybriMoE',), names\n"
        "assert load_backend_modules([sys.argv[1]]) == ()\n"
        "try:\n"
        "    load_backend_modules([sys.argv[2]])\n"
        "except PluginError as error:\n"
        "    print(error)\n"
        "print(device_names().count('HybriMoE'))\n"
    )
    command = [sys.executable, "-c", script, str(library_path()), str(copy)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    message, count = result.stdout.splitlines()
    assert "HybriMoE, which this llama.cpp has already" in message
    assert count == "1"
