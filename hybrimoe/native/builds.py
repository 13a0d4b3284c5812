"""Plug-ins that are compiled for another llama.cpp than the pinned one, and which programs they fit.

The package's own plug-in fits every ggml with the same interface (native/backend/running_ggml/probe.h); one for another
interface is compiled from the package's sources. Builds are kept in the user's data folder. A program is always given
the package's plug-in: where that does not fit, it looks for a build that does by itself.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hybrimoe.errors import HybrimoeError, PluginError, UsageError
from hybrimoe.native.plugin import LIBRARY_NAME, library_path

__all__ = ["Build", "Fit", "build_plugin", "builds", "builds_folder", "known_programs", "packaged", "which_fits"]

# Programs of llama.cpp that load plug-ins and list devices.
_PROGRAMS = ("llama-server", "llama-cli", "llama-completion", "llama-bench", "llama-perplexity", "llama")
_FACTS = "plugin.json"
_PROBE_TIMEOUT_S = 60.0
_HEADERS = ("ggml*.h", "gguf.h")
_STEP = re.compile(r"^\[ *(?:(\d+)/(\d+)|(\d+)%)\]")


@dataclass(frozen=True)
class Build:
    """A compiled plug-in: its file, the version of hybrimoe and the ggml that it was compiled with (`source`: whose
    headers), and a short hash of the interface that it expects of a ggml."""

    path: Path
    version: str
    ggml: str
    interface: str
    source: str

    def to_dict(self) -> dict[str, str]:
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True)
class Fit:
    """What the plug-in found in a program. `other_build`: the file of the build that is used there; empty: the
    package's. `reason`: why the package's own does not fit."""

    fits: bool
    ggml: str = ""
    backend_api: int = 0
    other_build: str = ""
    reason: str = ""


def builds_folder() -> Path:
    """Where builds are kept: HYBRIMOE_PLUGINS, or `hybrimoe/plugins` in the user's data folder, as the plug-in has it
    (native/backend/running_ggml/other_builds.h)."""
    if given := os.environ.get("HYBRIMOE_PLUGINS"):
        return Path(given)
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "hybrimoe" / "plugins"


def packaged() -> Build:
    """The package's own plug-in. Raises PluginError when it is missing or damaged."""
    return _read(library_path(), "packaged")


def builds() -> list[Build]:
    """Those in the user's folder, newest first, as far as they are readable."""
    found = []
    for facts in sorted(builds_folder().glob(f"*/{_FACTS}"), key=_mtime, reverse=True):
        try:
            data = json.loads(facts.read_text())
            texts = {name: str(data[name]) for name in ("version", "ggml", "interface", "source")}
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if (facts.parent / LIBRARY_NAME).is_file():
            found.append(Build(path=facts.parent / LIBRARY_NAME, **texts))
    return found


def build_plugin(llama_cpp: Path, on_share: Callable[[float], None] = lambda share: None) -> Build:
    """Compiles the plug-in for the ggml whose headers are in `llama_cpp`: a source tree of llama.cpp or ggml, or a
    folder that one was installed into. Public headers are enough.

    Returns the package's own when that expects the same interface: then nothing is kept. `on_share` is told how much
    is done, 0 to 1. Raises UsageError for a folder without headers, PluginError without a compiler and when it does not
    compile, OSError.
    """
    headers = _find_headers(llama_cpp)
    cmake = _tool("cmake", "pip install cmake")
    source = _installed_source()
    folder = builds_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
        include, build = Path(scratch) / "include", Path(scratch) / "build"
        version = _version_of(headers)
        _collect_headers(headers, source / "third_party", version, include)
        compiler = _Compiler(cmake, build, folder / "build.log", on_share)
        compiler.configure(source, include)
        interface = _short(compiler.run_made("ggml-interface"))
        own = packaged()
        if interface == own.interface:
            return own
        made = compiler.make("ggml-hybrimoe", LIBRARY_NAME)
        target = folder / f"ggml-{version}-{interface}"
        built = Build(target / LIBRARY_NAME, own.version, version, interface, str(llama_cpp.resolve()))
        _keep(made, built, Path(scratch))
        return built


def _keep(library: Path, built: Build, scratch: Path) -> None:
    """Puts a library where `built` says, in place of what is there. Raises PluginError when it cannot be loaded."""
    _read(library, built.source)
    ready, target = scratch / "ready", built.path.parent
    ready.mkdir()
    shutil.copy(library, ready / LIBRARY_NAME)
    facts = {name: value for name, value in built.to_dict().items() if name != "path"}
    (ready / _FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    if target.exists():
        target.rename(scratch / "replaced")  # goes with `scratch`; a host that has it loaded keeps its file
    ready.rename(target)


def _short(interface: str) -> str:
    return hashlib.sha256(interface.strip().encode()).hexdigest()[:8]


def _read(path: Path, source: str) -> Build:
    try:
        library = ctypes.CDLL(str(path))
        texts = []
        for name in ("hybrimoe_version", "hybrimoe_ggml_version", "hybrimoe_ggml_interface"):
            function = getattr(library, name)
            function.restype = ctypes.c_char_p
            texts.append(function().decode())
    except (OSError, AttributeError) as error:
        raise PluginError(f"the plug-in {path} cannot be loaded: {error}", "reinstall the package") from None
    return Build(path, texts[0], texts[1], _short(texts[2]), source)


def _installed_source() -> Path:
    import hybrimoe

    for folder in hybrimoe.__path__:
        if (Path(folder) / "plugin_source" / "CMakeLists.txt").is_file():
            return Path(folder) / "plugin_source"
    raise PluginError("the plug-in's sources are not installed", "reinstall the package")


def _find_headers(folder: Path) -> Path:
    for below in ("ggml/include", "include", "usr/include", "."):
        if (folder / below / "ggml.h").is_file() and (folder / below / "ggml-backend.h").is_file():
            return folder / below
    raise UsageError(
        f"'{folder}' holds no headers of ggml",
        "give a source tree of llama.cpp, or the folder it was installed into (Debian: apt install libggml-dev, /usr)",
    )


def _version_of(headers: Path) -> str:
    """A remark only. From 1.1 on ggml.h says it; else the build files do."""
    texts = [headers / "ggml.h", headers.parent / "CMakeLists.txt"]
    for libraries in ("lib*/cmake", "lib*/*/cmake"):
        texts += headers.parent.glob(f"{libraries}/ggml/ggml-config-version.cmake")
    for path in texts:
        text = path.read_text(errors="replace") if path.is_file() else ""
        numbers = [re.search(rf"GGML_VERSION_{part}\s+\(?(\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
        if all(numbers):
            return ".".join(number[1] for number in numbers if number)
        if found := re.search(r'set\(PACKAGE_VERSION "([\w.]+)"\)', text):
            return found[1]
    return "unknown"


def _collect_headers(headers: Path, third_party: Path, version: str, include: Path) -> None:
    """One folder of what is needed: a compiler that is given /usr/include as a system folder finds nothing there."""
    include.mkdir(parents=True)
    for pattern in _HEADERS:
        for path in headers.glob(pattern):
            shutil.copy(path, include / path.name)
    shutil.copytree(third_party / "nlohmann", include / "nlohmann")
    (include / "ggml-release.h").write_text(f'#pragma once\n#define HYBRIMOE_GGML_VERSION "{version}"\n')


def _tool(name: str, how: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise PluginError(f"{name} is needed to compile the plug-in", how)
    return found


class _Compiler:
    """cmake in the folder `build`; when a step fails, all that was said goes to `log`."""

    def __init__(self, cmake: str, build: Path, log: Path, on_share: Callable[[float], None]) -> None:
        self._cmake = cmake
        self._build = build
        self._log = log
        self._on_share = on_share

    def configure(self, source: Path, include: Path) -> None:
        if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
            raise PluginError("a C++ compiler is needed to compile the plug-in", "apt install g++")
        command = [self._cmake, "-S", str(source), "-B", str(self._build), "-DCMAKE_BUILD_TYPE=Release"]
        command += [f"-DHYBRIMOE_GGML_INCLUDE={include}", f"-DSKBUILD_PROJECT_VERSION={packaged().version}"]
        self._run(command)

    def make(self, target: str, name: str) -> Path:
        """Builds a target; returns its file. Raises PluginError with the compiler's first error."""
        self._run([self._cmake, "--build", str(self._build), "--target", target, "-j", str(os.cpu_count() or 2)])
        return next(self._build.glob(f"**/{name}"))

    def run_made(self, target: str) -> str:
        """What a program that is built here prints."""
        program = self.make(target, target)
        return subprocess.run([str(program)], stdout=subprocess.PIPE, text=True, check=True).stdout

    def _run(self, command: list[str]) -> None:
        said: list[str] = []
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            for line in process.stdout or ():
                said.append(line)
                if step := _STEP.match(line):
                    self._on_share(int(step[3]) / 100 if step[3] else int(step[1]) / int(step[2]))
        if process.returncode != 0:
            self._log.write_text("".join(said))
            first = next((line.strip() for line in said if " error: " in line or "CMake Error" in line), "see the log")
            raise PluginError(f"the plug-in does not compile with these headers: {first}", f"less '{self._log}'")


def known_programs() -> Iterator[Path]:
    """llama.cpp's programs in the user's PATH."""
    for name in _PROGRAMS:
        if found := shutil.which(name):
            yield Path(found)


def which_fits(command: Sequence[str]) -> Fit | None:
    """Asks a program of llama.cpp (with its first arguments, where it is started by another) which plug-in fits; None
    if it loads none, as static builds do. It lists its devices for that; no model is loaded.

    Raises HybrimoeError when it cannot be started.
    """
    environment = {**os.environ, "GGML_BACKEND_PATH": str(library_path()), "HYBRIMOE_PROBE": "1"}
    try:
        done = subprocess.run(
            [*command, "--list-devices"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_PROBE_TIMEOUT_S,
        )
    except OSError as error:
        raise HybrimoeError(f"cannot start {command[0]}: {error.strerror or error}") from None
    except subprocess.TimeoutExpired:
        raise HybrimoeError(f"{command[0]} --list-devices does not end", "is it a program of llama.cpp?") from None
    return _told(done.stdout.decode(errors="replace").splitlines())


def _told(lines: Iterable[str]) -> Fit | None:
    for line in lines:
        if '"hybrimoe_probe"' in line:
            try:
                data = json.loads(line)
                return Fit(data["fits"], data["ggml"], data["backend_api"], data["other_build"], data["reason"])
            except (ValueError, KeyError, TypeError):
                continue
    return None


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
