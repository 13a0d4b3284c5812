"""What a command line starts, and what cannot be started."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from hosts.stand_ins import environment, error_of
from hybrimoe.hosts.elf import read_elf
from hybrimoe.hosts.programs import check_can_load, check_startable, find_program, seen_environment

X86, ARM = 62, 183


def elf(
    machine: int = X86, needed: tuple[str, ...] = (), runpath: str = "", text: bytes = b"", bits: int = 64
) -> bytes:
    """A file with a header, one segment and a dynamic section: as much as the loader needs to name libraries."""
    names = b"\0" + b"".join(name.encode() + b"\0" for name in (*needed, runpath))
    offsets, at = [], 1
    for name in (*needed, runpath):
        offsets.append(at)
        at += len(name) + 1
    word = "Q" if bits == 64 else "I"
    header_bytes, entry_bytes = (64, 56) if bits == 64 else (52, 32)
    names_at = header_bytes + 2 * entry_bytes
    dynamic_at = names_at + len(names)
    base = 0x10000
    entries = [(1, offset) for offset in offsets[:-1]]
    entries += [(29, offsets[-1])] if runpath else []
    entries += [(5, base + names_at), (0, 0)]
    dynamic = b"".join(struct.pack(f"<{word}{word}", *entry) for entry in entries)
    n_bytes = dynamic_at + len(dynamic) + len(text)
    head = b"\x7fELF" + bytes([2 if bits == 64 else 1, 1, 1]) + bytes(9)
    head += struct.pack(f"<HHI{word}{word}{word}IHHHHHH", 3, machine, 1, 0, header_bytes, 0, 0, header_bytes,
                        entry_bytes, 2 if needed else 0, 0, 0, 0)  # fmt: skip

    def segment(kind: int, offset: int, n: int) -> bytes:
        if bits == 64:
            return struct.pack("<IIQQQQQQ", kind, 4, offset, base + offset, 0, n, n, 8)
        return struct.pack("<IIIIIIII", kind, offset, base + offset, 0, n, n, 4, 4)

    return head + segment(1, 0, n_bytes) + segment(2, dynamic_at, len(dynamic)) + names + dynamic + text


def program(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("command", "kind", "head"),
    [
        ("llama-server -m x", "llama-server", "llama-server"),
        ("/opt/bin/llama-cli -m x", "llama-cli", "/opt/bin/llama-cli"),
        ("env X=1 llama-completion -m x", "llama-completion", "env X=1 llama-completion"),
        ("nice -n 5 llama-bench -m x", "llama-bench", "nice -n 5 llama-bench"),
        ("/somewhere/run llama-perplexity -m x", "llama-perplexity", "/somewhere/run llama-perplexity"),
        ("nice env A=b /x/llama-server -m x", "llama-server", "nice env A=b /x/llama-server"),
        ("llama serve -m x", "llama-server", "llama serve"),
        ("nice llama cli -m x", "llama-cli", "nice llama cli"),
        ("llama quantize x", None, "llama"),
        ("llama", None, "llama"),
        ("./start.sh -m x", None, "./start.sh"),
        ("bash -c 'llama-server -m x'", None, "bash"),
        ("llama-server-old -m x", None, "llama-server-old"),
    ],
)
def test_known_programs_are_seen_through_wrappers(command: str, kind: str | None, head: str) -> None:
    import shlex

    words = shlex.split(command)
    found = find_program(words)
    assert (found.kind.name if found.kind else None) == kind
    assert list(found.head) == head.split()
    assert [*found.head, *found.arguments] == words


@pytest.mark.parametrize(
    ("command", "word"),
    [([], "no program"), ([""], "no program"), (["hybrimoe", "serve", "x"], "itself"),
     (["docker", "run", "llama-server"], "docker"),
     (["sudo", "-E", "llama-server", "-m", "x"], "sudo"), (["env", "-i", "llama-server"], "env -i"),
     (["nice", "env", "-", "A=1", "llama-server"], "env -i"), (["env", "-i", "sh", "start.sh"], "env -i")],
)  # fmt: skip
def test_commands_that_cannot_carry_the_plug_in(command: list[str], word: str) -> None:
    error = error_of(lambda: find_program(command))
    assert error.exit_code == 2 and word in error.message


def test_assignments_before_a_program_count() -> None:
    seen = seen_environment(find_program(["env", "-u", "B", "A=1=2", "llama-cli", "C=3"]), {"A": "0", "D": "4"})
    assert seen == {"A": "1=2", "D": "4"}
    assert seen_environment(find_program(["nice", "env", "A=1", "/x/llama-cli"]), {}) == {"A": "1"}
    assert seen_environment(find_program(["env", "A=1", "sh", "-c", "B=2"]), {}) == {"A": "1"}
    assert seen_environment(find_program(["llama-cli", "-p", "A=1"]), {}) == {}


@pytest.mark.parametrize(
    ("make", "code", "says"),
    [
        (lambda path: None, 2, "there is no program"),
        (lambda path: path.mkdir(), 2, "is a folder"),
        (lambda path: path.write_bytes(elf()), 1, "is not executable"),
        (lambda path: program(path, b"echo hello\n"), 2, "is no program of this system"),
        (lambda path: program(path, b""), 2, "is no program of this system"),
    ],
)
def test_what_is_no_program(tmp_path: Path, make, code: int, says: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "llama-server"
    make(path)
    error = error_of(lambda: check_startable(find_program([str(path)]), environment()))
    assert error.exit_code == code and says in error.message


def test_names_are_looked_up_in_path(tmp_path: Path) -> None:
    program(tmp_path / "llama-cli", b"#!/bin/sh\n")
    assert check_startable(find_program(["llama-cli"]), {"PATH": str(tmp_path)}) == tmp_path / "llama-cli"
    error = error_of(lambda: check_startable(find_program(["llama-cli"]), {"PATH": str(tmp_path / "no")}))
    assert "in PATH" in error.message
    error = error_of(lambda: check_startable(find_program(["model.gguf"]), {"PATH": ""}))
    assert "is a model" in error.message and "llama-server -m model.gguf" in error.hint
    assert "--" in error_of(lambda: check_startable(find_program(["-x"]), {"PATH": ""})).hint


def test_wrappers_that_are_asked(tmp_path: Path) -> None:
    run = program(tmp_path / "run", b"#!/bin/sh\n")
    for head, asked in (
        (["nice", "-n", "3", "env", "A=/bin/sh", "llama-cli"], ["llama-cli"]),
        (["nice", "-n", "3", run, "llama-cli"], [run, "llama-cli"]),
        ([run, "-x", "llama", "serve"], [run, "-x", "llama", "serve"]),
        (["taskset", "-c", "0", "llama", "serve"], ["llama", "serve"]),
        (["start", "llama-cli"], ["start", "llama-cli"]),
    ):
        assert find_program([*head, "-m", "x"]).asked == tuple(asked)


def test_a_missing_program_behind_a_wrapper(tmp_path: Path) -> None:
    program(tmp_path / "nice", b"#!/bin/sh\n")
    error = error_of(lambda: check_startable(find_program(["nice", "llama-cli"]), {"PATH": str(tmp_path)}))
    assert error.exit_code == 2 and "'llama-cli' in PATH" in error.message


GGML = b"... ggml_backend_load_all ..."


def check(tmp_path: Path, content: bytes, command: list[str] | None = None, machine: int = X86) -> None:
    plugin = tmp_path / "libggml-hybrimoe.so"
    plugin.write_bytes(elf(machine=machine))
    path = program(tmp_path / "bin" / "llama-server", content)
    words = command or [path]
    check_can_load(find_program(words), environment(PATH=str(tmp_path / "bin")), plugin)


def test_shared_builds_pass(tmp_path: Path) -> None:
    check(tmp_path, elf(needed=("libggml.so.0", "libc.so.6")))
    # A library that the loader may find where we do not look.
    check(tmp_path, elf(needed=("libllama.so.0", "libc.so.6"), text=GGML))
    check(tmp_path, b"#!/bin/sh\n")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libllama-server-impl.so").write_bytes(elf(needed=("libllama.so.0",), runpath="$ORIGIN"))
    (tmp_path / "lib" / "libllama.so.0").write_bytes(elf(needed=("libggml-base.so.0",)))
    check(tmp_path, elf(needed=("libllama-server-impl.so",), runpath="/nowhere:$ORIGIN/../lib"))


def test_something_small_that_starts_the_program_passes(tmp_path: Path) -> None:
    check(tmp_path, elf(needed=("libc.so.6",)))


@pytest.mark.parametrize("needed", [(), ("libc.so.6", "libstdc++.so.6")])
def test_static_builds_are_refused(tmp_path: Path, needed: tuple[str, ...]) -> None:
    error = error_of(lambda: check(tmp_path, elf(needed=needed, text=GGML)))
    assert error.exit_code == 5 and "static" in error.message and "BUILD_SHARED_LIBS" in error.hint


def test_a_library_with_ggml_inside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "libllama.so").write_bytes(elf(needed=("libc.so.6",), text=GGML))
    content = elf(needed=("libllama.so",), runpath="$ORIGIN")
    assert "static" in error_of(lambda: check(tmp_path, content)).message
    # Behind a wrapper that looks in PATH as well, but not behind one that may look anywhere.
    wrapped = ["nice", "llama-server"]
    assert "static" in error_of(lambda: check(tmp_path, content, wrapped)).message
    check(tmp_path, content, ["/somewhere/run", "llama-server"])


def test_other_machines_are_refused(tmp_path: Path) -> None:
    content = elf(machine=ARM, needed=("libggml.so.0",))
    error = error_of(lambda: check(tmp_path, content))
    assert error.exit_code == 5 and "AArch64" in error.message and "x86-64" in error.message
    check(tmp_path, content, machine=ARM)
    assert "32 bit" in error_of(lambda: check(tmp_path, elf(bits=32, needed=("libggml.so.0",)))).message


def test_reading_elf_files(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for bits in (32, 64):
        path.write_bytes(elf(needed=("liba.so", "libb.so.1"), runpath="/a:$ORIGIN", bits=bits))
        found = read_elf(path)
        assert found is not None and found.needed == ("liba.so", "libb.so.1") and found.bits == bits
        assert found.library_paths == ("/a", "$ORIGIN")
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        read_elf(path)  # whatever is missing: no error
    path.write_bytes(b"#!/bin/sh\n")
    assert read_elf(path) is None
