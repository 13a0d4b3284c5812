"""Flags, positionals, environment and config file, without loading a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hybrimoe import __version__
from hybrimoe.cli import app as program
from hybrimoe.cli.flags import ALL_OPTIONS, RUN_COMMAND_OPTIONS
from hybrimoe.config import parse_size
from hybrimoe.errors import ModelError

Call = Callable[..., Any]


@pytest.fixture
def resolved(call: Call) -> Callable[..., dict[str, tuple[Any, str]]]:
    """`resolved("run", flags...)`: key -> (value, source) from --print-config."""

    def run(*arguments: str) -> dict[str, tuple[Any, str]]:
        outcome = call(*arguments, "--print-config")
        assert outcome.code == 0, outcome
        settings = {}
        for line in outcome.out.splitlines():
            if not line.startswith("#"):
                key, _, rest = line.partition(" = ")
                value, _, source = rest.rpartition("  # ")
                settings[key] = (json.loads(value), source)
        return settings

    return run


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (("-ngl", "99"), "n-gpu-layers", 99),
        (("-ngl", "all"), "n-gpu-layers", -2),
        (("-ngl", "auto"), "n-gpu-layers", -1),
        (("--gpu-layers", "7"), "n-gpu-layers", 7),
        (("-ub", "256"), "ubatch-size", 256),
        (("-b", "1024"), "batch-size", 1024),
        (("-t", "3"), "threads", 3),
        (("-t3",), "threads", 3),
        (("-tb", "4"), "threads-batch", 4),
        (("-n", "-1"), "n-predict", -1),
        (("-n", "5"), "n-predict", 5),
        (("--predict", "6"), "n-predict", 6),
        (("--n-predict=7",), "n-predict", 7),
        (("-c", "4096"), "ctx-size", 4096),
        (("-fa", "on"), "flash-attn", "on"),
        (("-fa", "1"), "flash-attn", "on"),
        (("-fa", "auto"), "flash-attn", "auto"),
        (("-ctk", "Q8_0"), "cache-type-k", "q8_0"),
        (("-cmoe",), "cpu-moe", True),
        (("--no-cpu-moe",), "cpu-moe", False),
        (("-ncmoe", "3"), "n-cpu-moe", 3),
        (("-ot", "a=CPU", "-ot", "b=CPU"), "override-tensor", ["a=CPU", "b=CPU"]),
        (("-sys", "be brief"), "system-prompt", "be brief"),
        (("--temp", "0"), "temp", 0),
        (("--temperature", "-1"), "temp", -1),
        (("--top-k", "0"), "top-k", 0),
        (("-s", "-1"), "seed", -1),
        (("--seed", "4294967295"), "seed", 4294967295),
        (("-no-cnv",), "conversation", False),
        (("--no-conversation",), "conversation", False),
        (("--no-plugin",), "plugin", False),
        (("--no-warmup",), "warmup", False),
        (("--no-escape",), "escape", False),
        (("-v",), "verbose", True),
        (("-m", "x.gguf"), "model", "x.gguf"),
    ],
)
def test_flags_of_llama_cpp(resolved: Any, arguments: tuple[str, ...], key: str, value: Any) -> None:
    assert resolved("run", *arguments)[key] == (value, "flag")


@pytest.mark.parametrize(
    "arguments",
    [
        ("-t", "x"),
        ("-c", "-5"),
        ("-c", "1.5"),
        ("-b", "0"),
        ("-ub", ""),
        ("--temp", "hot"),
        ("--temp", "nan"),
        ("--top-p", "1.5"),
        ("--repeat-penalty", "0"),
        ("-fa", "maybe"),
        ("-ctk", "q3_k"),
        ("-lm", "magic"),
        ("-ngl", "some"),
        ("-s", "-2"),
        ("-s", "4294967296"),
        ("-n", "-3"),
        ("-ncmoe", "-1"),
        ("-n",),
        ("--bogus",),
        ("-hf", "repo"),
        ("-hf", "user/repo:"),
        ("--hf-repo", "a/b/c"),
        ("--expert-cache", "300%"),
        ("--expert-cache", "-1"),
        ("--expert-cache", "much"),
        ("--schedule", "x"),
        ("--cache-policy", "belady"),
        ("--cache-policy", "ema:beta=1"),
        ("--prefetch", ""),
        ("--guard", "maybe"),
        ("--fit-target", "some"),
        ("--temp=",),
    ],
)
def test_wrong_values_and_flags_that_do_nothing_yet(call: Call, arguments: tuple[str, ...]) -> None:
    call("run", *arguments, "hello").assert_two_lines(2)


def test_a_wrong_value_names_flag_and_value(call: Call) -> None:
    err = call("run", "-t", "many", "hello").err
    assert "--threads" in err and "many" in err


def test_priority_flag_environment_file_default(resolved: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = home / "config" / "hybrimoe" / "config.toml"
    file.parent.mkdir(parents=True)
    file.write_text('threads = 3\nctx-size = 512\ntemp = 0.5\nwarmup = false\nflash-attn = "off"\n')
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "1024")
    monkeypatch.setenv("LLAMA_ARG_TEMPERATURE", "0.6")
    settings = resolved("run", "--temp", "0.7")
    assert settings["temp"] == (0.7, "flag")
    assert settings["ctx-size"] == (1024, "environment LLAMA_ARG_CTX_SIZE")
    assert settings["threads"] == (3, f"config file {file}")
    assert settings["warmup"] == (False, f"config file {file}")
    assert settings["flash-attn"] == ("off", f"config file {file}")
    assert settings["top-k"] == (40, "default")


def test_print_config_is_a_config_file(resolved: Any, call: Call, home: Path) -> None:
    text = call("run", "-t", "2", "-ot", "a=CPU", "-sys", 'say "hi"\n', "--print-config").out
    file = home / "config" / "hybrimoe" / "config.toml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    settings = resolved("run")
    assert settings["threads"][0] == 2
    assert settings["override-tensor"][0] == ["a=CPU"]
    assert settings["system-prompt"][0] == 'say "hi"\n'


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("thread = 3", "'thread'"),
        ("ctx_size = 3", "did you mean 'ctx-size'"),
        ("threads = 'x'", "'x'"),
        ("threads = true", "threads"),
        ("warmup = 1", "warmup"),
        ("threads = [1]", "threads"),
        ("prompt = 'x'", "'prompt'"),
        ("threads = ", "TOML"),
        ("[run]\nthreads = 3", "'run'"),
    ],
)
def test_a_wrong_config_file_is_named(call: Call, home: Path, text: str, part: str) -> None:
    file = home / "config" / "hybrimoe" / "config.toml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    outcome = call("run", "hello")
    outcome.assert_two_lines(2)
    assert str(file) in outcome.err and part in outcome.err


def test_a_config_file_that_is_no_text(call: Call, home: Path) -> None:
    file = home / "config" / "hybrimoe" / "config.toml"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"\xff\xfe")
    call("chat").assert_two_lines(2)


def test_environment_of_switches(resolved: Any, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ARG_CPU_MOE", "on")
    monkeypatch.setenv("LLAMA_ARG_NO_REPACK", "")
    settings = resolved("run")
    assert settings["cpu-moe"][0] is True
    assert settings["repack"] == (False, "environment LLAMA_ARG_NO_REPACK")
    monkeypatch.setenv("LLAMA_ARG_CPU_MOE", "perhaps")
    outcome = call("run", "hello")
    outcome.assert_two_lines(2)
    assert "LLAMA_ARG_CPU_MOE" in outcome.err


def test_an_empty_variable_counts_as_unset(resolved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ARG_THREADS", "")
    monkeypatch.setenv("LLAMA_ARG_TOP_K", "")
    assert resolved("run")["top-k"] == (40, "default")


@pytest.mark.parametrize("command", ["run", "chat"])
def test_every_switch_has_its_negative_form(call: Call, command: str) -> None:
    for option in ALL_OPTIONS:
        if option.is_switch:
            assert f"--no-{option.key}" in option.no_flags


def test_option_names_are_unique() -> None:
    names = [flag for option in ALL_OPTIONS for flag in (*option.flags, *option.no_flags)]
    assert len(names) == len(set(names))


# Positionals: which is the model, which is the prompt


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, home: Path) -> dict[str, Any]:
    """Replaces loading; gets the model's path and the prompt."""
    from hybrimoe.cli import loading, run
    from hybrimoe.models import store

    seen: dict[str, Any] = {}
    store.models_dir().mkdir(parents=True)
    (store.models_dir() / "known.gguf").touch()

    @contextmanager
    def open_engine(_settings: Any, path: Path, _command: str) -> Iterator[Any]:
        seen["path"] = path
        raise ModelError("stop here")
        yield

    monkeypatch.setattr(loading, "build_demo", lambda: Path("the-demo"))
    monkeypatch.setattr(run, "open_engine", open_engine)
    original = run.one_prompt

    def one_prompt(settings: Any, positional: Any) -> str:
        seen["prompt"] = original(settings, positional)
        return str(seen["prompt"])

    monkeypatch.setattr(run, "one_prompt", one_prompt)
    return seen


@pytest.mark.parametrize(
    ("arguments", "path", "prompt"),
    [
        (("hello",), "the-demo", "hello"),
        (("known", "hello"), "known.gguf", "hello"),
        (("known", "-p", "hello"), "known.gguf", "hello"),
        (("-m", "known", "hello"), "known.gguf", "hello"),
        (("-m", "known", "known"), "known.gguf", "known"),
        (("file.bin", "hello"), "file.bin", "hello"),
        (("file.bin", "-p", "hello"), "file.bin", "hello"),
        (("-p", "hello"), "the-demo", "hello"),
        (("demo", "hello"), "the-demo", "hello"),
        (("-n", "3", "hello", "--temp", "0"), "the-demo", "hello"),
        (("--", "-not a flag"), "the-demo", "-not a flag"),
        (("folder",), "the-demo", "folder"),
        (("x" * 5000,), "the-demo", "x" * 5000),
    ],
)
def test_positionals(
    call: Call,
    loaded: dict[str, Any],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    path: str,
    prompt: str,
) -> None:
    monkeypatch.chdir(home)
    (home / "file.bin").write_text("x")
    (home / "folder").mkdir()
    call("run", *arguments)
    assert loaded["path"].name == path
    assert loaded["prompt"] == prompt


def test_a_missing_gguf_is_a_model_not_a_prompt(call: Call, home: Path) -> None:
    outcome = call("run", "absent.gguf", "-p", "hi")
    outcome.assert_two_lines(3)
    assert "absent.gguf" in outcome.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("a", "b", "c"),
        ("-m", "known", "a", "b"),
        ("hello", "-p", "again"),
        ("-p", "a", "-f", "b"),
        ("-", "-p", "a"),
        ("",),
        ("   ",),
        ("-p", ""),
        ("-p", r"\n"),
        ("-sys", "a", "-sysf", "b", "hi"),
        ("-f", "/does/not/exist"),
        ("-f", "/"),
    ],
)
def test_contradicting_or_empty_prompts(call: Call, loaded: dict[str, Any], arguments: tuple[str, ...]) -> None:
    call("run", *arguments).assert_two_lines(2)
    assert "path" not in loaded


def test_prompt_file_with_invalid_utf8(call: Call, loaded: dict[str, Any], home: Path) -> None:
    file = home / "prompt.txt"
    file.write_bytes(b"abc\xff")
    outcome = call("run", "-f", str(file))
    outcome.assert_two_lines(2)
    assert "byte 3" in outcome.err


def test_prompt_file_keeps_its_text(call: Call, loaded: dict[str, Any], home: Path) -> None:
    file = home / "prompt.txt"
    file.write_bytes("\ufeffa\\n b\nü\n".encode())
    call("run", "-f", str(file))
    assert loaded["prompt"] == "a\\n b\nü"


@pytest.mark.parametrize(
    ("text", "expected"),
    [(r"a\nb", "a\nb"), (r"a\\nb", r"a\nb"), (r"\x41\x4", "A\\x4"), ("tail\\", "tail\\"), (r"\q\t", "\\q\t")],
)
def test_escapes_are_llama_cpps(call: Call, loaded: dict[str, Any], text: str, expected: str) -> None:
    call("run", "-p", text)
    assert loaded["prompt"] == expected
    call("run", "-p", text, "--no-escape")
    assert loaded["prompt"] == text


def test_chat_takes_one_model_and_no_prompt(call: Call) -> None:
    call("chat", "hello there").assert_two_lines(3)
    call("chat", "a.gguf", "hello").assert_two_lines(2)
    call("chat", "-m", "a.gguf", "b.gguf").assert_two_lines(2)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("6GiB", 6 << 30),
        ("512M", 512_000_000),
        ("1.5 GB", 1_500_000_000),
        ("10", 10),
        ("2ki", 2048),
        ("3 TiB", 3 << 40),
    ],
)
def test_sizes(text: str, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 XB", "1.2.3", "6 Gi B"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


def test_help_and_version(call: Call) -> None:
    assert __version__ in call("--version").out
    assert "llama-cpp-python" in call("--version").out
    for arguments in ((), ("-h",), ("run", "--help"), ("chat", "-h"), ("models",), ("doctor", "--help")):
        outcome = call(*arguments)
        assert outcome.code == 0 and "Usage: hybrimoe" in outcome.out, arguments


def test_typer_finds_the_same_program() -> None:
    """The application behind the entry point, through typer's own runner (shell completion uses it)."""
    result = CliRunner().invoke(program.make_app(), ["run", "--help"])
    assert result.exit_code == 0
    for option in RUN_COMMAND_OPTIONS:
        assert option.flags[0] in result.output


def test_unknown_command(call: Call) -> None:
    call("nonsense").assert_two_lines(2)


def test_an_unexpected_error_is_two_lines_too(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise LookupError("of the test")

    monkeypatch.setattr(program, "make_app", fail)
    outcome = call("run", "hello")
    outcome.assert_two_lines(1)
    assert "of the test" in outcome.err
    verbose = call("run", "hello", "-v")
    assert verbose.code == 1 and "Traceback" in verbose.err
