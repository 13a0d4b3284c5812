"""`--reproducible` beside what it leaves nothing to decide: an error wherever either of the two comes from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybrimoe.cli.flags import EXPERT_OPTIONS
from hybrimoe.errors import UsageError
from hybrimoe.expert_options import UNUSED_WHEN_REPRODUCIBLE, ExpertOptions

Call = Callable[..., Any]
VARIABLE = "HYBRIMOE_REPRODUCIBLE"
# Values other than the defaults.
UNUSED = {
    "cache-policy": "lru",
    "schedule": "cpu-only",
    "prefetch": "none",
    "admission": "always",
    "guard": "off",
    "calibration": "costs.json",
}


@pytest.fixture
def write_config(home: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        file = home / "config" / "hybrimoe" / "config.toml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    return write


def assert_conflict(outcome: Any, first: str, second: str) -> None:
    outcome.assert_two_lines(2)
    lines = outcome.err.splitlines()
    assert len(lines) == 2 and lines[0].startswith(f"error: {first} and {second} exclude each other: ")


def is_reproducible(call: Call, *arguments: str) -> bool:
    outcome = call("run", *arguments, "--print-config")
    assert outcome.code == 0, outcome
    return "reproducible = true" in outcome.out


def test_every_unused_option_is_tried() -> None:
    known = {f"--{option.key}" for option in EXPERT_OPTIONS}
    assert {f"--{key}" for key in UNUSED} | {"--keep-residency"} == known & set(UNUSED_WHEN_REPRODUCIBLE.values())


@pytest.mark.parametrize("command", ["chat", "run", "serve", "bench", "profile"])
def test_alone_it_contradicts_no_default(call: Call, command: str) -> None:
    outcome = call(command, "--reproducible", "--print-config")
    assert outcome.code == 0 and "reproducible = true" in outcome.out


@pytest.mark.parametrize("key", UNUSED)
def test_flags(call: Call, key: str) -> None:
    assert_conflict(call("run", "--reproducible", f"--{key}", UNUSED[key]), "--reproducible", f"--{key}")
    assert_conflict(call("bench", f"--{key}", UNUSED[key], "--reproducible"), "--reproducible", f"--{key}")


def test_a_typed_default_is_a_contradiction_too(call: Call) -> None:
    for flags in (("--guard", "on"), ("--cache-policy", "mrs"), ("--keep-residency",)):
        assert_conflict(call("run", "--reproducible", *flags), "--reproducible", flags[0])
    assert is_reproducible(call, "--reproducible", "--no-keep-residency")


@pytest.mark.parametrize("key", UNUSED)
def test_config_file(call: Call, write_config: Callable[[str], Path], key: str) -> None:
    line = f'{key} = "{UNUSED[key]}"\n'
    file = write_config(line + "reproducible = true\n")
    source = f"(config file {file})"
    assert_conflict(call("run"), f"--reproducible {source}", f"--{key} {source}")
    assert not is_reproducible(call, "--no-reproducible")
    write_config(line)
    assert_conflict(call("serve", "--reproducible"), "--reproducible", f"--{key} {source}")
    write_config("reproducible = true\n")
    assert_conflict(call("chat", f"--{key}", UNUSED[key]), f"--reproducible {source}", f"--{key}")


@pytest.mark.parametrize("residency", ["true", "false"])
def test_residency_in_the_config_file_is_no_contradiction(
    call: Call, write_config: Callable[[str], Path], residency: str
) -> None:
    write_config(f"keep-residency = {residency}\nreproducible = true\n")
    assert is_reproducible(call)
    assert_conflict(
        call("run", "--reproducible", "--keep-residency", "--admission", "pays"), "--reproducible", "--admission"
    )


def test_what_print_config_prints_is_accepted(call: Call, write_config: Callable[[str], Path]) -> None:
    write_config(call("run", "--reproducible", "--print-config").out)
    assert is_reproducible(call)


def test_environment(call: Call, write_config: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    source = f"--reproducible (environment {VARIABLE})"
    assert is_reproducible(call) and not is_reproducible(call, "--no-reproducible", "--guard", "off")
    assert_conflict(call("run", "--schedule", "cpu-only"), source, "--schedule")
    assert_conflict(call("bench", "--calibration", "c.json"), source, "--calibration")
    assert_conflict(call("run", "--keep-residency"), source, "--keep-residency")
    file = write_config('prefetch = "none"\n')
    assert_conflict(call("run"), source, f"--prefetch (config file {file})")
    monkeypatch.setenv(VARIABLE, "0")
    assert not is_reproducible(call)
    monkeypatch.setenv(VARIABLE, "perhaps")
    outcome = call("run")
    outcome.assert_two_lines(2)
    assert outcome.err.startswith(f"error: {VARIABLE}: 'perhaps'")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prefetch", "path"),
        ("guard", False),
        ("live_costs", False),
        ("calibration", Path("costs.json")),
        ("costs", {"cpu_us": 1}),
        ("state_dir", Path("state")),
    ],
)
def test_options_of_the_package(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"--reproducible and {UNUSED_WHEN_REPRODUCIBLE[name]} exclude each other"):
        ExpertOptions(reproducible=True, **{name: value})._check_reproducible()
    ExpertOptions(reproducible=False, **{name: value})._check_reproducible()
    ExpertOptions(reproducible=True)._check_reproducible()
