"""Damaged inputs of every kind through the program: an answer, or two lines and the documented exit code.

Six of each kind in the quick suite; the first twenty of each, with every command, are slow.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz.forked_cli import Ended, ForkedCli
from fuzz.targets import Seeds, Target

N_INPUTS, N_QUICK_INPUTS = 20, 6
NAMES = (
    "gguf", "trace", "route-csv", "layer-csv", "list-csv", "moe-beyond-csv", "npz", "calibration", "config", "machine",
)  # fmt: skip


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedCli]:
    home = tmp_path_factory.mktemp("home")
    names = {f"XDG_{name}_HOME": str(home / name.lower()) for name in ("CONFIG", "STATE", "DATA", "CACHE")}
    started = ForkedCli({**names, "COLUMNS": "200"})
    yield started
    started.close()


def check(ended: Ended, what: str, codes: tuple[int, ...]) -> None:
    assert ended.code is not None, f"{what}: it hangs"
    assert ended.code >= 0, f"{what}: ended by signal {-ended.code}: {ended.err}"
    assert "Traceback" not in ended.err and "unexpected" not in ended.err, f"{what}: {ended.err}"
    if ended.code == 0:
        return
    assert ended.code in codes, f"{what}: exit code {ended.code}: {ended.err}"
    # Before them may stand what was done until then: warnings, progress.
    lines = ended.err.strip().splitlines()
    at = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    assert len(at) == 1 and len(lines) - at[0] <= 2, f"{what}: {ended.err}"
    assert at[0] == len(lines) - 1 or lines[-1].startswith("hint: "), f"{what}: {ended.err}"


def inputs(target: Target, n: int, folder: Path) -> Iterator[tuple[int, Path]]:
    for seed in range(n):
        path = folder / f"input-{seed}{target.suffix}"
        target.mutate(random.Random(1_000_000 + seed)).write(path)
        yield seed, path


def command(target: Target, line: tuple[str, ...], path: Path, model: Path) -> list[str]:
    places = {"FILE": str(path), "MODEL": str(model), "OUT": str(path.with_name("out"))}
    filled = []
    for word in line:
        for name, value in places.items():
            word = word.replace(name, value)
        filled.append(word)
    return filled


# A run loads the model's header in a child first: a second each.
CODES = {"gguf": (3, 4), "config": (2,)}


def run_one(program: ForkedCli, target: Target, line: tuple[str, ...], seed: int, path: Path, seeds: Seeds) -> None:
    more = {}
    if target.name == "config":  # it has no flag: the file is found by its name
        folder = path.parent / f"config-{seed}" / "hybrimoe"
        folder.mkdir(parents=True)
        path.replace(folder / "config.toml")
        more["XDG_CONFIG_HOME"] = str(folder.parent)
    ended = program.run(*command(target, line, path, seeds.models[0]), **more)
    check(ended, f"{target.name}, seed {1_000_000 + seed}, {line}", CODES.get(target.name, target.exit_codes))


@pytest.mark.parametrize("name", NAMES)
def test_program(targets: dict[str, Target], seeds: Seeds, program: ForkedCli, name: str, tmp_path: Path) -> None:
    target = targets[name]
    for seed, path in inputs(target, N_QUICK_INPUTS, tmp_path):
        line = target.cli[seed % len(target.cli)]
        run_one(program, target, line, seed, path, seeds)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_program_with_every_command(
    targets: dict[str, Target], seeds: Seeds, name: str, tmp_path: Path, program: ForkedCli
) -> None:
    """As above, more of them, with every command for every input."""
    target = targets[name]
    for seed, path in inputs(target, N_INPUTS, tmp_path):
        for line in target.cli:
            run_one(program, target, line, seed, path, seeds)


def test_a_hang_and_a_crash_would_be_seen(program: ForkedCli, tmp_path: Path) -> None:
    """The checks themselves."""
    with pytest.raises(AssertionError, match="signal 11"):
        check(Ended(-11, "", ""), "a crash", (3,))
    with pytest.raises(AssertionError, match="hangs"):
        check(Ended(None, "", ""), "a hang", (3,))
    with pytest.raises(AssertionError):
        check(Ended(3, "", "error: a\nhint: b\nmore\n"), "three lines", (3,))
    missing = program.run("models", "show", str(tmp_path / "none.gguf"))
    check(missing, "a missing file", (3,))
    assert missing.code == 3 and sys.version_info >= (3, 10)
