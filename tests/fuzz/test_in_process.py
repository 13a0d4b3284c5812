"""A thousand damaged inputs of every kind, seeded: success or an error with its exit code; nothing else."""

from __future__ import annotations

import collections
import random
from pathlib import Path

import pytest

from fuzz import trace_file
from fuzz.limits import Memory, time_limit
from fuzz.targets import Seeds, Target

N_INPUTS = 1000
# Generous: tests share the machine. What is looked for takes minutes or for ever.
MOST_S = 20.0
NAMES = (
    "gguf", "gguf-split", "trace", "route-csv", "layer-csv", "list-csv", "moe-beyond-csv", "npz", "calibration",
    "config", "machine", "machine-changes", "costs", "chat",
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
def test_damaged_inputs(targets: dict[str, Target], name: str, scratch: Path) -> None:
    target = targets[name]
    path = scratch / f"input{target.suffix}"
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


def test_a_step_of_no_known_kind(seeds: Seeds, tmp_path: Path) -> None:
    """Found by atheris: the kind of a recorded step was put into a byte unseen."""
    import zlib

    import numpy as np

    from hybrimoe.trace.errors import TraceError
    from hybrimoe.trace.events import Note
    from hybrimoe.trace.format import read

    parts = trace_file.parse(seeds.traces[1].read_bytes())
    block = next(b for b in parts.blocks if b.values["kind"] == "events")
    arrays = {entry[0]: entry for entry in block.arrays}
    kinds = np.frombuffer(zlib.decompress(arrays["type"][3]), np.uint8)
    a = np.where(kinds == Note.STEP, 513, 0).astype("<i4")
    arrays["a"][3] = zlib.compress(np.ascontiguousarray(a.view(np.uint8).reshape(-1, 4).T).tobytes())
    path = tmp_path / "a.trace"
    path.write_bytes(parts.to_bytes())
    with pytest.raises(TraceError, match="no known kind"):
        read(path)
