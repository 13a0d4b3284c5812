"""The program as users run it: processes, pipes, signals, terminals."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

COMMAND = [sys.executable, "-m", "hybrimoe.cli.main"]
Spawn = Callable[..., Any]
# An answer that takes long enough to be interrupted: no end of turn is likely among random weights.
# The seed: a random answer may end before its first letter.
LONG = ("-n", "100000", "-c", "0", "--seed", "1")
DEADLINE_S = 90


@pytest.fixture
def start(home: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """`start("run", ...)` starts the program with pipes; it is ended after the test."""
    started: list[subprocess.Popen[bytes]] = []

    def run(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        process = subprocess.Popen([*COMMAND, *arguments], **options)
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_the_answer_is_on_stdout_and_the_footer_on_stderr(spawn: Spawn, model: str) -> None:
    outcome = spawn("run", model, "hello", "-n", "6", "--temp", "0")
    assert outcome.code == 0, outcome
    assert outcome.out.endswith("\n") and "t/s" not in outcome.out
    assert "[ Prompt " in outcome.err and " t/s | Generation " in outcome.err
    assert "\x1b" not in outcome.out + outcome.err, "no control sequences without a terminal"
    assert "warning" not in outcome.err, "every expert ran in the plug-in"


def test_json_is_one_object(spawn: Spawn, model: str) -> None:
    outcome = spawn("run", model, "hello", "-n", "6", "--temp", "0", "--json")
    data = json.loads(outcome.out)
    assert outcome.out.count("\n") == 1 and outcome.err == ""
    assert data["answer"] and data["prompt"] == "hello"
    assert data["plugin"] == {"active": True, "verified": True, "message": ""}
    assert data["usage"]["completion_tokens"] == 6 and data["finish_reason"] == "length"
    assert data["experts"]["totals"]["n_blocks"] == 6 * data["experts"]["n_moe_layers"]
    assert data["experts"]["totals"]["n_blocks_delegated"] == 0


def test_the_plugin_changes_no_word(spawn: Spawn, model: str) -> None:
    """Greedy text equals that of a process that never loaded the plug-in."""
    arguments = ("run", model, "The quick brown fox", "-n", "24", "--temp", "0", "--json")
    ours, plain = json.loads(spawn(*arguments).out), json.loads(spawn(*arguments, "--no-plugin").out)
    assert ours["answer"] == plain["answer"]
    assert plain["plugin"]["active"] is False and plain["experts"]["layers"] == []


def test_the_prompt_comes_from_stdin_file_or_flag_alike(spawn: Spawn, model: str, home: Path) -> None:
    file = home / "prompt.txt"
    file.write_text("sein Größtes\n")
    common = ("-n", "5", "--temp", "0", "--no-show-timings")
    answers = {
        spawn("run", model, "sein Größtes", *common).out,
        spawn("run", "-m", model, "-", *common, stdin="sein Größtes\n".encode()).out,
        spawn("run", model, *common, stdin="sein Größtes".encode()).out,
        spawn("run", model, "-f", str(file), *common).out,
        spawn("run", model, "-p", "sein Größtes", *common).out,
    }
    assert len(answers) == 1


def test_plain_completion_differs_from_chat(spawn: Spawn, model: str) -> None:
    chat = json.loads(spawn("run", model, "hello", "-n", "1", "--json").out)
    plain = json.loads(spawn("run", model, "hello", "-n", "1", "--json", "-no-cnv").out)
    assert plain["usage"]["prompt_tokens"] < chat["usage"]["prompt_tokens"]


def test_expert_stats_are_a_table(spawn: Spawn, model: str) -> None:
    err = spawn("run", model, "hello", "-n", "3", "--expert-stats").err
    assert "delegated" in err and "experts CPU" in err and "all" in err
    # Without a calibration nothing is predicted on the CPU alone; with an accelerator every plan predicts.
    assert "predicted times: unknown" in err or "median error of a layer" in err
    flags = ("--device", "CPU", "--expert-cache", "2", "--guard", "off")
    err = spawn("run", model, "hello", "-n", "8", "--expert-stats", *flags).err
    rows = [line.split() for line in err.splitlines() if line.startswith("token ")]
    assert "predicted us" in err and len(rows) == 1 and float(rows[0][2]) > 0 and float(rows[0][3]) > 0


def test_bad_stdin(spawn: Spawn, model: str) -> None:
    spawn("run", model, stdin=b"abc\xff").assert_two_lines(2)
    spawn("run", model, stdin=b"").assert_two_lines(2)
    outcome = spawn("chat", model, "-n", "1", stdin=b"hi\n\xff\n")
    assert outcome.code == 2 and "line 2 of stdin" in outcome.err


def test_bad_models(call: Spawn, model: str, dense_header: Path, home: Path) -> None:
    good = Path(model)
    truncated = home / "truncated.gguf"
    truncated.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    header_only = home / "cut.gguf"
    header_only.write_bytes(good.read_bytes()[:100])
    magic = home / "magic.gguf"
    magic.write_bytes(b"GGML" + good.read_bytes()[4:2000])
    empty = home / "empty.gguf"
    empty.touch()
    part = home / "m-00002-of-00003.gguf"
    for path in (home / "absent.gguf", truncated, header_only, magic, empty, dense_header, home):
        outcome = call("run", "-m", str(path), "hi")
        outcome.assert_two_lines(3)
        assert path.name in outcome.err
    part.write_bytes(b"GGUF")
    call("chat", str(part)).assert_two_lines(3)
    assert "has no experts" in call("run", str(dense_header), "hi").err


def test_unreadable_model(spawn: Spawn, model: str, home: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    copy = home / "secret.gguf"
    shutil.copy(model, copy)
    copy.chmod(0)
    outcome = spawn("run", str(copy), "hi")
    assert outcome.code in (1, 3) and outcome.err.startswith("error: ")


def test_contexts_that_cannot_be(call: Spawn, model: str) -> None:
    outcome = call("run", model, "hi", "-c", "100000000")
    outcome.assert_two_lines(2)
    assert "-c" in outcome.err.splitlines()[1]


def test_a_prompt_longer_than_the_context(call: Spawn, model: str) -> None:
    outcome = call("run", model, "word " * 2000, "-c", "256")
    assert outcome.code == 2 and "the context holds 256" in outcome.err


def test_a_missing_plugin_is_exit_code_5(spawn: Spawn, model: str, home: Path) -> None:
    outcome = spawn("run", model, "hi", HYBRIMOE_PLUGIN=str(home / "absent.so"))
    outcome.assert_two_lines(5)
    broken = home / "broken.so"
    broken.write_bytes(b"no library")
    spawn("run", model, "hi", HYBRIMOE_PLUGIN=str(broken)).assert_two_lines(5)
    assert spawn("run", model, "hi", "-n", "1", "--no-plugin", HYBRIMOE_PLUGIN=str(broken)).code == 0


def test_a_reader_that_leaves_is_a_clean_end(start: Any, model: str) -> None:
    process = start("run", model, "hello", *LONG)
    assert process.stdout.read(10)
    process.stdout.close()
    assert process.wait(DEADLINE_S) == 0
    err = process.stderr.read().decode()
    assert "Traceback" not in err and "Broken" not in err and "error" not in err


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_a_stream_closed_from_the_start(home: Path, model: str, stream: int) -> None:
    done = subprocess.run(
        [*COMMAND, "chat" if stream == 0 else "run", "-m", model, *(["-p", "hello", "-n", "3"] if stream else [])],
        stdin=subprocess.DEVNULL if stream else None,
        capture_output=True,
        preexec_fn=lambda: os.close(stream),
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0
    assert b"error" not in done.stderr and b"[ Prompt" not in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_an_error(home: Path, model: str) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*COMMAND, "run", model, "hello", "-n", "3"],
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=DEADLINE_S,
        )
    assert done.returncode == 1
    assert b"error: " in done.stderr and b"Traceback" not in done.stderr


def test_interrupting_run_keeps_what_was_said(start: Any, model: str) -> None:
    process = start("run", model, "hello", *LONG)
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert out.endswith(b"\n") and b"Traceback" not in err and b"Exception ignored" not in err


@pytest.mark.parametrize(
    "delay_s", [0.05, pytest.param(0.3, marks=pytest.mark.slow), 0.6, pytest.param(0.9, marks=pytest.mark.slow), 1.2]
)
def test_interrupting_at_any_time(start: Any, model: str, delay_s: float) -> None:
    process = start("run", model, "hello", *LONG)
    time.sleep(delay_s)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=DEADLINE_S)
    # Before the program's first line runs, Python itself ends, in its own way.
    if process.returncode == 130 or b"hybrimoe" in err:
        assert process.returncode == 130
        assert b"Traceback" not in err and b"Exception ignored" not in err


INTERRUPTED_IMPORT = """
import os, signal, sys
target = sys.argv.pop(1)
class Finder:
    def find_spec(self, name, path=None, to=None):
        if name == target:
            os.kill(os.getpid(), signal.SIGINT)
from hybrimoe.cli.main import main
sys.meta_path.insert(0, Finder())
sys.exit(main())
"""


@pytest.mark.parametrize("module", ["hybrimoe.cli.app", "typer", "hybrimoe.errors", "hybrimoe.cli.bench", "llama_cpp"])
def test_interrupting_an_import(home: Path, module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_IMPORT, module, "--version"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_nothing_of_ours_is_imported_before_an_interrupt_is_handled() -> None:
    code = "import sys, hybrimoe.cli.main; print(*(name for name in sys.modules if name.startswith('hybrimoe')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.stdout.split() == ["hybrimoe", "hybrimoe.cli", "hybrimoe.cli.main"]


def test_chat_answers_every_line_of_a_pipe(spawn: Spawn, model: str) -> None:
    lines = b"one\n\n/set temp 0\ntwo\n/nope\nthree\n"
    outcome = spawn("chat", model, "-n", "4", stdin=lines)
    assert outcome.code == 0
    assert outcome.err.count("[ Prompt ") == 3
    assert "error: unknown command /nope" in outcome.err
    assert "temp = 0" in outcome.out


def test_chat_commands_in_a_pipe(spawn: Spawn, model: str, home: Path) -> None:
    saved = home / "chat.json"
    notes = home / "notes.txt"
    notes.write_text("notes for the model")
    script = (
        f"/read {notes}\nhello\n/regen\n/stats\n/experts\n/show\n/save {saved}\n/clear\n/load {saved}\n/exit\nnever\n"
    )
    outcome = spawn("chat", model, "-n", "4", stdin=script.encode())
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("[ Prompt ") == 2
    assert "experts run" in outcome.out and "CPU 100%" in outcome.out
    assert "plug-in" in outcome.out and "per expert" in outcome.out
    messages = json.loads(saved.read_text())["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"]
    assert messages[0]["content"].startswith("notes for the model") and messages[0]["content"].endswith("hello")
    assert "loaded 2 messages" in outcome.out


def test_chat_outlives_its_context(spawn: Spawn, model: str) -> None:
    lines = ("some words that fill the context quickly " * 2 + "\n") * 8
    outcome = spawn("chat", model, "-c", "256", "-n", "16", stdin=(lines + "word " * 1000 + "\nbye\n").encode())
    assert outcome.code == 0, outcome.err
    assert "oldest messages are forgotten" in outcome.err
    assert "error: this message takes" in outcome.err
    assert outcome.err.count("[ Prompt ") == 9


def test_chat_from_a_pipe_is_interrupted_by_the_second_signal(start: Any, model: str) -> None:
    process = start("chat", model, *LONG)
    process.stdin.write(b"one\ntwo\nthree\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    wait_for(process.stderr, b"[ Prompt ")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130 and b"Traceback" not in err


def wait_for(stream: Any, text: bytes) -> bytes:
    """Reads until `text` has come."""
    seen = b""
    deadline = time.monotonic() + DEADLINE_S
    while text not in seen:
        assert time.monotonic() < deadline, seen
        ready, _, _ = select.select([stream], [], [], 1)
        if ready:
            data = os.read(stream if isinstance(stream, int) else stream.fileno(), 4096)
            assert data, seen
            seen += data
    return seen


class Typist:
    """The program on a terminal of its own."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.master, slave = pty.openpty()

        def take_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            preexec_fn=take_terminal,
            env={**os.environ, "TERM": "xterm", **environment},
        )
        os.close(slave)
        self.seen = b""
        self._position = 0

    def wait_for(self, text: bytes) -> None:
        """Waits until `text` has come after what was last waited for."""
        deadline = time.monotonic() + DEADLINE_S
        while (found := self.seen.find(text, self._position)) < 0:
            assert time.monotonic() < deadline, self.seen
            self._read()
        self._position = found + len(text)

    def wait_for_prompt(self) -> None:
        # prompt_toolkit asks where the cursor is once it is ready for input.
        self.wait_for(b"\x1b[6n")
        os.write(self.master, b"\x1b[1;1R")

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def _read(self) -> bool:
        ready, _, _ = select.select([self.master], [], [], 0.2)
        if not ready:
            return self.process.poll() is None
        try:
            data = os.read(self.master, 4096)
        except OSError:
            return False
        self.seen += data
        return bool(data)

    def end(self) -> int:
        deadline = time.monotonic() + DEADLINE_S
        while self._read():
            assert time.monotonic() < deadline, self.seen
        code = self.process.wait(DEADLINE_S)
        os.close(self.master)
        return code


@pytest.fixture
def typist(home: Path) -> Iterator[Callable[..., Typist]]:
    typists: list[Typist] = []

    def make(*arguments: str, **environment: str) -> Typist:
        typists.append(Typist(*arguments, **environment))
        return typists[-1]

    yield make
    for one in typists:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


def test_chat_on_a_terminal(typist: Any, model: str, home: Path) -> None:
    chat = typist("chat", model, "-n", "4")
    chat.wait_for_prompt()
    chat.type(b"hello\r")
    chat.wait_for(b"t/s ]")
    chat.wait_for_prompt()
    chat.type(b"/show\r")
    chat.wait_for(b"top-k = 40")
    chat.wait_for_prompt()
    chat.type(b"\x04")
    assert chat.end() == 0
    history = home / "state" / "hybrimoe" / "chat_history"
    assert "hello" in history.read_text() and history.stat().st_mode & 0o077 == 0


def test_first_interrupt_stops_the_answer_second_leaves(typist: Any, model: str) -> None:
    chat = typist("chat", model, *LONG)
    chat.wait_for_prompt()
    chat.type(b"hello\r")
    time.sleep(1)
    chat.type(b"\x03")
    chat.wait_for_prompt()
    chat.type(b"\x03")
    assert chat.end() == 130
    assert b"Traceback" not in chat.seen and b"Exception ignored" not in chat.seen


def test_interrupt_discards_a_begun_line(typist: Any, model: str) -> None:
    chat = typist("chat", model, "-n", "4")
    chat.wait_for_prompt()
    chat.type(b"half a thought")
    time.sleep(0.3)
    chat.type(b"\x03")
    chat.wait_for(b"\x1b[?2004h")
    chat.type(b"/exit\r")
    assert chat.end() == 0


def test_no_color(typist: Any, model: str) -> None:
    """Colours of the loading bar go; cursor movements of line editing may stay."""
    chat = typist("run", model, "hi", "-n", "2", NO_COLOR="1")
    assert chat.end() == 0
    assert b"\x1b[3" not in chat.seen and b"\x1b[9" not in chat.seen


def test_run_without_a_prompt_on_a_terminal(typist: Any, model: str) -> None:
    chat = typist("run", model)
    assert chat.end() == 2
    assert b"there is no prompt" in chat.seen


def test_a_narrow_encoding_does_not_fail(spawn: Spawn, model: str) -> None:
    outcome = spawn("run", model, "hi", "-n", "12", "-s", "3", PYTHONIOENCODING="ascii:strict", PYTHONUTF8="0")
    assert outcome.code == 0, outcome.err


def test_nothing_heavy_is_imported_for_help() -> None:
    code = "import sys; from hybrimoe.cli.main import main; main(['run', '--print-config'])"
    code += "; print('llama_cpp' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
