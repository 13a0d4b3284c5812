"""Help pages and arguments of llama.cpp's programs."""

from __future__ import annotations

import pytest

from hosts.stand_ins import BENCH_HELP, SERVER_HELP, error_of
from hybrimoe.hosts import arguments as flags
from hybrimoe.hosts.arguments import Arguments
from hybrimoe.hosts.help_page import parse_devices, parse_help

SERVER, BENCH = parse_help(SERVER_HELP), parse_help(BENCH_HELP)


@pytest.mark.parametrize(
    ("flag", "server", "bench"),
    [
        ("-m", 1, 1),
        ("--model", 1, 1),
        ("--usage", 0, None),
        ("-hfr", 1, 1),
        ("-ot", 1, 1),
        ("--override-tensor", 1, 1),
        ("-otd", 1, None),
        ("--spec-draft-model", 1, None),
        ("-cmoe", 0, None),
        ("--cpu-moe-draft", 0, None),
        ("-ncmoe", 1, 1),
        ("-fit", 1, None),
        ("-fitt", None, 1),
        ("--no-perf", 0, None),
        ("--perf", 0, None),
        ("--progress", None, 0),
        ("--control-vector-layer-range", 2, None),
        ("-dr", 1, None),
        # Lines of explanations begin like flags, and are none.
        ("--hf-repo", 1, 1),
        ("--threads", 1, 1),
    ],
)
def test_help_pages_tell_flags_and_how_many_values_they_take(flag: str, server: int | None, bench: int | None) -> None:
    assert SERVER.n_values.get(flag) == server
    assert BENCH.n_values.get(flag) == bench


def test_explanations_are_no_flags() -> None:
    page = "-a,    --aa N                           text\n" + 40 * " " + "--not-a-flag X goes on\n"
    assert parse_help(page).n_values == {"-a": 1, "--aa": 1}


def test_device_lists() -> None:
    text = (
        "ggml: found 1\nAvailable devices:\n  CUDA0: A B (8192 MiB, 8000 MiB free)\n  Vulkan1: C (1 MiB, 1 MiB free)\n"
    )
    assert parse_devices(text) == ["CUDA0", "Vulkan1"]
    assert parse_devices("Available devices:\n  (none)\n") == []
    assert parse_devices("") == []


def read(*words: str, grammar=SERVER, **environment: str) -> Arguments:  # type: ignore[no-untyped-def]
    return Arguments.read(words, grammar, environment)


@pytest.mark.parametrize(
    ("words", "environment", "flag", "value"),
    [
        (("-m", "a.gguf"), {}, flags.MODEL, "a.gguf"),
        (("--model", "a.gguf", "-m", "b.gguf"), {}, flags.MODEL, "b.gguf"),
        (("-p", "-m", "-c", "8"), {}, flags.MODEL, None),
        (("-p", "-m"), {"LLAMA_ARG_MODEL": "e.gguf"}, flags.MODEL, "e.gguf"),
        (("-m", "a.gguf"), {"LLAMA_ARG_MODEL": "e.gguf"}, flags.MODEL, "a.gguf"),
        (("-m",), {}, flags.MODEL, None),
        (("--ctx_size", "7"), {}, flags.CTX_SIZE, "7"),
        (("--control-vector-layer-range", "-m", "x", "-hfr", "a/b"), {}, flags.HUB_REPO, "a/b"),
        (("--control-vector-layer-range", "1", "-m"), {}, flags.MODEL, None),
        (("--spec_draft_model", "d.gguf"), {}, flags.DRAFT_MODEL, "d.gguf"),
        ((), {"LLAMA_ARG_MODEL_DRAFT": "d.gguf"}, flags.DRAFT_MODEL, "d.gguf"),
    ],
)
def test_values(words: tuple[str, ...], environment: dict[str, str], flag: flags.Flag, value: str | None) -> None:
    arguments = read(*words, **environment)
    assert arguments.value(flag) == value
    assert arguments.words == words


@pytest.mark.parametrize(
    ("words", "environment", "is_on"),
    [
        (("-cmoe",), {}, True),
        (("--cpu_moe",), {}, True),
        (("-p", "-cmoe"), {}, False),
        ((), {"LLAMA_ARG_CPU_MOE": "1"}, True),
        ((), {"LLAMA_ARG_CPU_MOE": "off"}, False),
    ],
)
def test_switches(words: tuple[str, ...], environment: dict[str, str], is_on: bool) -> None:
    assert read(*words, **environment).is_on(flags.CPU_MOE) is is_on


def test_changes_keep_everything_else_as_it_was_typed() -> None:
    arguments = read("--n_cpu_moe", "3", "stray", "--override_tensor", "a=CPU", "-p", "-cmoe", "-ot", "b=CPU", "-cmoe")
    assert arguments.without(flags.N_CPU_MOE, flags.CPU_MOE).words == (
        "stray", "--override_tensor", "a=CPU", "-p", "-cmoe", "-ot", "b=CPU",
    )  # fmt: skip
    assert arguments.with_values(flags.OVERRIDE, lambda v: f"{v},x", only_last=True).values(flags.OVERRIDE) == [
        "a=CPU",
        "b=CPU,x",
    ]
    assert arguments.with_values(flags.OVERRIDE, lambda v: f"{v},x", only_last=False).values(flags.OVERRIDE) == [
        "a=CPU,x",
        "b=CPU,x",
    ]
    assert arguments.adding("-fit", "off").words[-2:] == ("-fit", "off")


def test_numbers() -> None:
    assert read("-ub", "64").number(flags.UBATCH, 512) == 64
    assert read().number(flags.UBATCH, 512) == 512
    error = error_of(lambda: read("-ub", "many").number(flags.UBATCH, 512))
    assert error.exit_code == 2 and "-ub" in error.message and "many" in error.message
    error = error_of(lambda: read(LLAMA_ARG_UBATCH="many").number(flags.UBATCH, 512))
    assert "LLAMA_ARG_UBATCH" in error.message
