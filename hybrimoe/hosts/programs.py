"""Which program a command line starts: a known one of llama.cpp's, perhaps behind a wrapper, or something else."""

from __future__ import annotations

import mmap
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from hybrimoe.errors import HybrimoeError, PluginError, UsageError
from hybrimoe.hosts.elf import MAGIC, Elf, read_elf

__all__ = ["Kind", "Program", "check_can_load", "check_startable", "find_program", "seen_environment"]

EXAMPLE = "hybrimoe exec -- llama-server -m model.gguf"


@dataclass(frozen=True)
class Kind:
    """A program whose arguments we read. `variables`: it reads LLAMA_ARG_*; `routes`: without a model it starts others
    for the models that it is asked for; `several`: it takes several models and lists of values; `full_context`: without
    -c its context is what the model was trained with."""

    name: str
    variables: bool = True
    routes: bool = False
    several: bool = False
    full_context: bool = False


_SERVER = Kind("llama-server", routes=True, full_context=True)
_CLI, _COMPLETION = Kind("llama-cli", full_context=True), Kind("llama-completion", full_context=True)
_BENCH, _PERPLEXITY = Kind("llama-bench", variables=False, several=True), Kind("llama-perplexity")
_KINDS = {kind.name: kind for kind in (_SERVER, _CLI, _COMPLETION, _BENCH, _PERPLEXITY)}
# Words after the one program `llama` (app/llama.cpp).
_LLAMA = {
    "serve": _SERVER, "server": _SERVER, "cli": _CLI, "client": _CLI, "completion": _COMPLETION,
    "complete": _COMPLETION, "bench": _BENCH, "perplexity": _PERPLEXITY,
}  # fmt: skip
# What starts a program elsewhere or for another user keeps our environment from it.
_BARRIERS = frozenset({
    "docker", "podman", "nerdctl", "kubectl", "ssh", "sudo", "doas", "su", "runuser", "systemd-run", "flatpak", "snap",
    "distrobox", "toolbox", "machinectl", "lxc", "chroot",
})  # fmt: skip
# These start what they are given as the shell would find it, in their own environment.
_WRAPPERS = frozenset({
    "env", "nice", "ionice", "taskset", "numactl", "chrt", "nohup", "setsid", "stdbuf", "timeout", "time", "prlimit",
    "strace", "ltrace", "perf", "gdb", "catchsegv",
})  # fmt: skip
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
# What a dynamically linked program of llama.cpp's needs; one of them brings ggml.
_OF_LLAMA = re.compile(r"lib(llama|ggml|mtmd)\b.*")


@dataclass(frozen=True)
class Program:
    """`head` are the words up to the program's name (wrappers first), `arguments` those after it; `n_own` words of the
    head are the program's (two of `llama serve`), the others a wrapper's.

    `kind` is None for a program that we do not know: then `head` is its name and `arguments` are its own business.
    """

    head: tuple[str, ...]
    arguments: tuple[str, ...]
    kind: Kind | None
    n_own: int = 1

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return self.kind.name if self.kind else Path(self.head[0]).name

    @property
    def own(self) -> tuple[str, ...]:
        return self.head[-self.n_own :]

    @property
    def asked(self) -> tuple[str, ...]:
        """The words to ask the program with: without usual wrappers, which would measure or trace the question."""
        for i, word in enumerate(self.head[: -self.n_own]):
            is_usual = Path(word).name in _WRAPPERS
            is_other = i == 0 or (os.sep in word and Path(word).is_file() and os.access(word, os.X_OK))
            if is_other and not is_usual:
                return self.head[i:]
        return self.own

    @property
    def assignments(self) -> tuple[str, ...]:
        """The words NAME=VALUE of an `env` before the program."""
        before = self.head[: -self.n_own] if self.kind else self.head
        names = [Path(word).name for word in before]
        if "env" not in names:
            return ()
        words = before[names.index("env") + 1 :] if self.kind else self.arguments
        if self.kind is None:
            words = tuple(takewhile(lambda word: "=" in word or word.startswith("-"), words))
        return tuple(word for word in words if _ASSIGNMENT.fullmatch(word))


def find_program(command: Sequence[str]) -> Program:
    """The first word that is the name of a known program, or the command as it stands.

    Raises UsageError for an empty command, and where a word before the program keeps our environment from it.
    """
    if not command or not command[0]:
        raise UsageError("there is no program to start", EXAMPLE)
    for i, word in enumerate(command):
        name = Path(word).name
        kind, n = _KINDS.get(name), i + 1
        if name == "llama" and n < len(command):
            kind, n = _LLAMA.get(command[n]), n + 1
        if kind is not None:
            found = Program(tuple(command[:n]), tuple(command[n:]), kind, n - i)
            break
    else:
        found = Program(tuple(command[:1]), tuple(command[1:]), None)
    first = Path(command[0]).name
    if first == "hybrimoe":
        raise UsageError("hybrimoe has the plug-in itself", f"leave 'exec' out: {' '.join(command[:2])} ...")
    if first in _BARRIERS:
        raise UsageError(
            f"'{first}' does not hand its environment on, and the plug-in is found through it",
            f"start hybrimoe inside: {first} ... hybrimoe exec -- {found.name} ...",
        )
    before = found.head[: -found.n_own] if found.kind else command
    if "env" in (Path(word).name for word in before[:-1]) and {"-", "-i", "--ignore-environment"} & set(before):
        raise UsageError(
            "'env -i' empties the environment, and the plug-in is found through it", f"env -i ... {EXAMPLE}"
        )
    return found


def seen_environment(program: Program, environment: Mapping[str, str]) -> dict[str, str]:
    """What the program will see: `environment` with the assignments of an `env NAME=VALUE` before it."""
    given = (_ASSIGNMENT.fullmatch(word) for word in program.assignments)
    return {**environment, **{match[1]: match[2] for match in given if match}}


def check_startable(program: Program, environment: Mapping[str, str]) -> Path:
    """The file of the first word. Raises UsageError (missing, a folder, no program), HybrimoeError (no permission)."""
    path = _startable(program.head[0], environment)
    if program.asked == program.own != program.head:
        _startable(program.own[0], environment)
    return path


def _startable(word: str, environment: Mapping[str, str]) -> Path:
    if word.endswith(".gguf"):
        raise UsageError(f"'{word}' is a model, not a program", f"hybrimoe exec -- llama-server -m {word}")
    path = _find(word, environment)
    if path is None:
        where = "" if os.sep in word else " in PATH"
        raise UsageError(f"there is no program '{word}'{where}", _missing_hint(word))
    if path.is_dir():
        raise UsageError(f"'{word}' is a folder, not a program", EXAMPLE)
    if not os.access(path, os.X_OK):
        raise HybrimoeError(f"'{word}' is not executable", f"chmod +x {path}")
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError:
        return path  # it may be run, but not read
    if not start.startswith((b"#!", MAGIC)):
        raise UsageError(
            f"'{word}' is no program of this system: neither an ELF file nor a script that names its interpreter",
            "the first line of a script is, for example, #!/bin/sh",
        )
    return path


def check_can_load(program: Program, environment: Mapping[str, str], plugin: Path) -> None:
    """Raises PluginError when the program cannot load the plug-in: of another machine, or with ggml built in."""
    word = program.own[0]
    if os.sep not in word and program.asked != program.own:
        return  # who knows where it looks
    path = _find(word, environment)
    # What is no ELF file is a script, or nothing that we can judge.
    elf = _read(path) if path is not None and path.is_file() else None
    if elf is None or path is None:
        return
    ours = _read(plugin)
    if ours is not None and not elf.same_machine(ours):
        raise PluginError(
            f"'{word}' is a program for {elf.architecture}, the plug-in is for {ours.architecture}",
            "install HybriMoE with a Python of the same architecture as the program",
        )
    if program.kind and _has_ggml_inside(path, elf, environment):
        raise PluginError(
            f"'{word}' has ggml built in (a static build): it cannot load a plug-in",
            "use a build with shared libraries: cmake -DBUILD_SHARED_LIBS=ON, or a distribution's package",
        )


def _missing_hint(word: str) -> str:
    if word.startswith("-"):
        return f"flags of hybrimoe end at '--', then comes the program: {EXAMPLE}"
    return f"give its path: hybrimoe exec -- /path/to/{Path(word).name} ..."


def _find(word: str, environment: Mapping[str, str]) -> Path | None:
    if os.sep in word:
        return Path(word) if Path(word).exists() else None
    found = shutil.which(word, path=environment.get("PATH", os.defpath))
    return None if found is None else Path(found)


def _read(path: Path) -> Elf | None:
    try:
        return read_elf(path)
    except OSError:
        return None


def _has_ggml_inside(path: Path, elf: Elf, environment: Mapping[str, str]) -> bool:
    """Whether ggml is in the program or in a library of llama.cpp's that it needs, and none of these needs libggml."""
    seen: set[str] = set()
    waiting = [(path, elf)]
    inside = False
    while waiting:
        at, one = waiting.pop()
        inside = inside or _mentions_ggml(at)
        for name in one.needed:
            if name.startswith("libggml"):
                return False
            if name in seen or not _OF_LLAMA.fullmatch(name):
                continue
            seen.add(name)
            library = _find_library(name, at, one, environment)
            found = None if library is None else _read(library)
            if library is None or found is None:
                return False  # the loader may know more than we do
            waiting.append((library, found))
    return inside


def _mentions_ggml(path: Path) -> bool:
    """Whether the file has text of ggml's: a program that only starts another one has none."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(b"ggml_backend") >= 0
    except (OSError, ValueError):
        return False


def _find_library(name: str, needed_by: Path, elf: Elf, environment: Mapping[str, str]) -> Path | None:
    origin = str(needed_by.resolve().parent)
    folders = [*environment.get("LD_LIBRARY_PATH", "").split(":"), *elf.library_paths]
    usual = [
        "/usr/local/lib",
        "/usr/lib",
        "/lib",
        "/usr/lib64",
        "/lib64",
        *map(str, Path("/usr/lib").glob("*-linux-*")),
    ]
    for folder in (*folders, *usual):
        path = Path(folder.replace("${ORIGIN}", origin).replace("$ORIGIN", origin)) / name
        if folder and path.is_file():
            return path
    return None
