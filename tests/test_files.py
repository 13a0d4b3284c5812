"""What users name may be a pipe that nobody writes to, or a device: every reader says so at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hybrimoe import files
from hybrimoe.errors import HybrimoeError, UsageError, render

COMMAND = [sys.executable, "-m", "hybrimoe.cli.main"]


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "pipe.gguf"
    os.mkfifo(path)
    return path


@pytest.fixture(autouse=True)
def _ends(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """A reader or writer that waits is woken, so that its test fails instead of hanging."""
    ended = threading.Event()

    def wake() -> None:
        if ended.wait(20):
            return
        for path in tmp_path.iterdir():
            if path.is_fifo():
                os.close(os.open(path, os.O_RDWR))

    watch = threading.Thread(target=wake, daemon=True)
    watch.start()
    yield
    late = not watch.is_alive()
    ended.set()
    watch.join()
    assert not late, "something waited for a pipe"


def _prompt(path: Path) -> Any:
    from hybrimoe.cli.prompt import read_text

    return read_text(str(path))


def _calibration(path: Path) -> Any:
    from hybrimoe.calibration import load

    return load(path)


def _config(path: Path) -> Any:
    from hybrimoe.config import Sources, resolve

    return resolve([], {}, Sources(file=path))


def _machine(path: Path) -> Any:
    from hybrimoe.machine.files import read_machine

    return read_machine(path)


def _opened_machine(path: Path) -> Any:
    from hybrimoe.machine.files import open_machine

    return open_machine(str(path))


def _trace(path: Path) -> Any:
    from hybrimoe.trace.format import read

    return read(path)


def _imported(path: Path) -> Any:
    from hybrimoe.trace.importers import ImportOptions, import_files

    return import_files([path], ImportOptions(), "auto")


def _imported_csv(path: Path) -> Any:
    from hybrimoe.trace.importers import ImportOptions, import_files

    return import_files([path], ImportOptions(), "route-csv")


def _imported_npz(path: Path) -> Any:
    from hybrimoe.trace.importers import ImportOptions, import_files

    return import_files([path], ImportOptions(), "npz")


def _model(path: Path) -> Any:
    from hybrimoe.gguf_model import inspect

    return inspect(path)


def _profile_text(path: Path) -> Any:
    from hybrimoe.profiling.run import read_texts

    return read_texts(path)


def _bench_source(path: Path) -> Any:
    from hybrimoe.bench.tokens import token_stream

    return token_stream(str(path), 4, lambda text: [1], 10)


def _bench_rows(path: Path) -> Any:
    from hybrimoe.bench.compare import read_rows

    return read_rows(path)


READERS: dict[str, tuple[Callable[[Path], Any], int]] = {
    "prompt": (_prompt, 2),
    "calibration": (_calibration, 1),
    "config": (_config, 1),
    "machine": (_machine, 1),
    "machine by any name": (_opened_machine, 1),
    "trace": (_trace, 1),
    "import": (_imported, 1),
    "import of CSV": (_imported_csv, 1),
    "import of npz": (_imported_npz, 1),
    "model": (_model, 3),
    "text of profile": (_profile_text, 1),
    "text of bench": (_bench_source, 1),
    "rows of bench": (_bench_rows, 1),
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("what", ["pipe", "device"])
def test_a_reader_waits_for_nobody(kind: str, what: str, fifo: Path) -> None:
    read, code = READERS[kind]
    path = fifo if what == "pipe" else Path("/dev/zero")
    with pytest.raises(HybrimoeError) as caught:
        read(path)
    assert caught.value.exit_code == code
    assert str(path) in caught.value.message
    assert what in caught.value.message or "regular file" in caught.value.message
    assert len(render(caught.value).splitlines()) <= 2


@pytest.mark.parametrize("kind", READERS)
def test_a_link_to_a_pipe_is_one(kind: str, fifo: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(fifo)
    read, code = READERS[kind]
    with pytest.raises(HybrimoeError) as caught:
        read(link)
    assert caught.value.exit_code == code


def test_an_api_key_in_a_pipe(fifo: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "serve", "--api-key-file", str(fifo), "--port", "0", str(tmp_path / "none.gguf")],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith(f"error: cannot read '{fifo}': it is a pipe, not a file")


def test_a_config_file_that_is_a_pipe(tmp_path: Path) -> None:
    folder = tmp_path / "hybrimoe"
    folder.mkdir()
    os.mkfifo(folder / "config.toml")
    done = subprocess.run(
        [*COMMAND, "run", "hello"], capture_output=True, text=True, timeout=15,
        env={**os.environ, "XDG_CONFIG_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1 and "it is a pipe, not a file" in done.stderr, done


def test_streams_that_a_shell_hands_over(tmp_path: Path) -> None:
    """`-f <(...)`, `-f /dev/stdin` from a pipe and from a file, and a pipe whose writer has gone."""
    script = "import sys; from hybrimoe.cli.prompt import read_text; print(read_text(sys.argv[1]), end='')"
    (tmp_path / "text").write_text("from a file")
    os.mkfifo(tmp_path / "named")
    for shell in (
        'exec "$0" -c "$1" <(printf "from a file")',
        'printf "from a file" | "$0" -c "$1" /dev/stdin',
        '"$0" -c "$1" /dev/stdin < "$2"/text',
        'exec 9<> "$2"/named; printf "from a file" >&9; exec 8< "$2"/named 9>&-; "$0" -c "$1" /dev/fd/8',
    ):
        done = subprocess.run(
            ["bash", "-c", shell, sys.executable, script, str(tmp_path)], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout) == (0, "from a file"), (shell, done)


def test_the_null_device_is_an_empty_text() -> None:
    assert files.read_bytes("/dev/null") == b""


def test_a_stream_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_MOST_STREAM_BYTES", 1 << 20)
    with Path("/dev/zero").open("rb") as endless, pytest.raises(OSError, match="more than 1 MiB"):
        files.read_bytes(f"/dev/fd/{endless.fileno()}")


def test_text_has_one_kind_of_line_breaks(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"a\r\nb\rc\n")
    assert files.read_text(tmp_path / "text") == "a\nb\nc\n"


def test_writing_to_a_pipe_that_nobody_reads(fifo: Path) -> None:
    from hybrimoe.trace.files import save
    from hybrimoe.trace.format import ModelIdentity
    from hybrimoe.trace.writer import TraceWriter

    with pytest.raises(HybrimoeError, match="nobody reads from this pipe"):
        save(fifo, b"text")
    with pytest.raises(HybrimoeError, match="nobody reads from this pipe"):
        TraceWriter(fifo, ModelIdentity("m", n_layers=1, n_expert=4, top_k=2, layers=(0,)))
    assert fifo.is_fifo()


def test_writing_to_a_pipe_that_is_read(fifo: Path) -> None:
    from hybrimoe.trace.files import save

    with subprocess.Popen(["cat", str(fifo)], stdout=subprocess.PIPE) as reader:
        for _ in range(200):
            try:
                save(fifo, b"text")
                break
            except HybrimoeError:  # the reader has not come yet
                time.sleep(0.05)
        assert reader.communicate(timeout=60)[0] == b"text"


def test_nothing_is_renamed_over_a_pipe(fifo: Path) -> None:
    from hybrimoe.calibration import Calibration
    from hybrimoe.cli.session import write_atomically

    with pytest.raises(HybrimoeError, match="it is a pipe"):
        write_atomically(fifo, "text")
    with pytest.raises(HybrimoeError, match="it is a pipe"):
        Calibration({}, fifo).save(fifo)
    assert fifo.is_fifo() and list(fifo.parent.iterdir()) == [fifo]


def test_a_text_for_bench_must_be_a_file(fifo: Path) -> None:
    from hybrimoe.bench.tokens import check_source

    with pytest.raises(UsageError):
        check_source(str(fifo))


def test_a_history_that_is_a_pipe_costs_the_history(fifo: Path) -> None:
    from prompt_toolkit.history import InMemoryHistory

    from hybrimoe.cli.terminal import _history

    assert type(_history(fifo)) is InMemoryHistory
    assert fifo.is_fifo()
