"""The file that keeps which experts were resident: written at the end, used at the next start, refused when unfit."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hybrid_checks import check_used, events, settings_of, total
from sides import Reply, Side

N_SLOTS = 5
# Copies that never pay: residency stays as it was at the start.
FROZEN = {"admission": "pays", "costs": {"cpu_us": 10, "gpu_us": 1, "copy_us": 100000}}
COLD = list(range(N_SLOTS))


@pytest.fixture
def path(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("qwen3moe", "Q4_0")


def resident(reply: Reply) -> list[list[int]]:
    """Experts on an accelerator, by layer."""
    return [[e for e, device in enumerate(one) if device >= 0] for one in reply.facts["residency"].values()]


def run(side: Side, path: Path, state: Path, decode: int = 12, **changes: Any) -> Reply:
    settings = settings_of(**{"expert_cache": N_SLOTS, "cache_policy": "lru", "state_path": str(state), **changes})
    return side.ask("logits", path, prefill=[1], decode=decode, settings=settings)


def content(state: Path) -> Any:
    return json.loads(state.read_text())


def test_next_start_is_warm(hybrid: Side, path: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    first = run(hybrid, path, state)
    check_used(first)
    assert not events(first, "cold"), "a missing file is no problem"
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"], "nothing is left beside it"
    kept = content(state)["resident"]
    assert [len(set(experts)) for experts in kept] == [N_SLOTS] * 2
    assert any(sorted(experts) != COLD for experts in kept)

    second = run(hybrid, path, state, **FROZEN)
    assert resident(second) == [sorted(experts) for experts in kept]
    assert total(second, "n_copies") == 0
    assert not events(second, "cold")
    assert [sorted(experts) for experts in content(state)["resident"]] == resident(second)


def test_smaller_cache_takes_the_best(hybrid: Side, path: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    run(hybrid, path, state)
    kept = content(state)["resident"]
    got = run(hybrid, path, state, expert_cache=2, **FROZEN)
    assert resident(got) == [sorted(experts[:2]) for experts in kept]


def test_larger_cache_keeps_them_all(hybrid: Side, path: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    run(hybrid, path, state)
    kept = content(state)["resident"]
    got = run(hybrid, path, state, expert_cache=9, **FROZEN)
    assert all(set(experts) < set(now) for experts, now in zip(kept, resident(got), strict=True))
    assert [len(now) for now in resident(got)] == [9, 9]


def test_two_accelerators_share_it(hybrid: Side, path: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    run(hybrid, path, state)
    kept = content(state)["resident"]
    got = run(hybrid, path, state, devices=["CPU", "CPU"], **FROZEN)
    assert all(set(experts) <= set(now) for experts, now in zip(kept, resident(got), strict=True))


BROKEN = {
    "empty": b"",
    "noise": b"\x00\xff\xfe noise",
    "cut off": b'{"version": 1, "layers": [[16, ',
    "another root": b"[1, 2, 3]",
    "null": b"null",
    "no keys": b"{}",
    "deep": b"[" * 100000,
}
CHANGES: dict[str, dict[str, Any]] = {
    "another version": {"version": 2},
    "another model": {"layers": [[16, 1], [16, 1]]},
    "fewer layers": {"resident": [[0]]},
    "no such expert": {"resident": [[0], [16]]},
    "negative expert": {"resident": [[-1], [0]]},
    "twice": {"resident": [[3, 3], [0]]},
    "text": {"resident": "all"},
    "nested": {"resident": [[[0]], [0]]},
    "huge number": {"resident": [[2**40], [0]]},
}


@pytest.mark.parametrize("kind", [*BROKEN, *CHANGES])
def test_unfit_file_is_refused(hybrid: Side, path: Path, tmp_path: Path, kind: str) -> None:
    """One event names the file; the start is cold; the end writes a good file in its place."""
    state = tmp_path / "state.json"
    if kind in BROKEN:
        state.write_bytes(BROKEN[kind])
    else:
        run(hybrid, path, state, decode=3)
        state.write_text(json.dumps({**content(state), **CHANGES[kind]}))
    got = run(hybrid, path, state, decode=4, **FROZEN)
    (event,) = events(got, "cold expert cache")
    assert str(state) in event
    assert resident(got) == [COLD, COLD]
    assert [sorted(experts) for experts in content(state)["resident"]] == [COLD, COLD]


def test_file_of_another_model(hybrid: Side, path: Path, tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    state = tmp_path / "state.json"
    run(hybrid, tiny_model("mixtral", "Q4_0"), state)
    got = run(hybrid, path, state, **FROZEN)
    assert events(got, "another version or model")
    assert resident(got) == [COLD, COLD]


def test_where_nothing_can_be_written(hybrid: Side, path: Path, tmp_path: Path) -> None:
    """No folder, and a folder of that name: the answer does not depend on it, and nothing half-written stays."""
    for state in (tmp_path / "missing" / "state.json", tmp_path):
        check_used(run(hybrid, path, state))
    assert list(tmp_path.iterdir()) == []


def test_short_runs_keep_what_was_there(hybrid: Side, path: Path, tmp_path: Path) -> None:
    """A context that never came past its first pass has no cache, so it has nothing to write."""
    state = tmp_path / "state.json"
    run(hybrid, path, state)
    before = state.read_bytes()
    got = run(hybrid, path, state, decode=0)
    assert got.facts["state"]["phase"] == "learning"
    assert state.read_bytes() == before
