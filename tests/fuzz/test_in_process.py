"""A thousand damaged inputs of every kind, seeded: success or an error with its exit code; nothing else."""

from __future__ import annotations

import collections
import random
from pathlib import Path

import pytest

from fuzz.limits import Memory, time_limit
from fuzz.targets import Target

N_INPUTS = 1000
# Generous: tests share the machine. What is looked for takes minutes or for ever.
MOST_S = 20.0
NAMES = (
    "gguf", "gguf-split", "trace", "route-csv", "layer-csv", "list-csv", "moe-beyond-csv", "npz", "calibration",
    "config", "machine", "costs", "chat",
)  # fmt: skip


def test_every_target_is_tested(targets: dict[str, Target]) -> None:
    assert set(targets) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_seeds_are_sound(targets: dict[str, Target], name: str, tmp_path: Path) -> None:
    """Otherwise mutation would begin with nothing."""
    target = targets[name]
    for number, case in enumerate(target.seeds):
        path = tmp_path / f"seed-{number}{target.suffix}"
        case.write(path)
        target.use(path)


@pytest.mark.parametrize("name", NAMES)
def test_damaged_inputs(targets: dict[str, Target], name: str, tmp_path: Path) -> None:
    target = targets[name]
    path = tmp_path / f"input{target.suffix}"
    for case in target.seeds:  # what is imported and cached by the first use is not the input's
        case.write(path)
        target.use(path)
    outcomes: collections.Counter[int] = collections.Counter()
    for seed in range(N_INPUTS):
        case = target.mutate(random.Random(seed))
        case.write(path)
        try:
            with Memory() as memory, time_limit(MOST_S):
                outcomes[target.run(path)] += 1
        except BaseException as error:
            raise AssertionError(f"{name}, seed {seed}: {type(error).__name__}: {error}") from error
        bound = 2 * case.n_bytes + target.slack_bytes
        assert memory.peak_bytes <= bound, f"{name}, seed {seed}: {memory.peak_bytes} bytes for {case.n_bytes}"
    # Damage that never hurts, or always at the first byte, would test nothing.
    assert outcomes[0] < N_INPUTS * 0.9 and sum(outcomes.values()) - outcomes[0] > N_INPUTS * 0.05, outcomes
