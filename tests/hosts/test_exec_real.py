"""`hybrimoe exec` with real programs of a distribution (skipped where they cannot be had)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hosts.conftest import Host
from hosts.stand_ins import Outcome
from hybrimoe.hosts.launch import OURS


@pytest.mark.parametrize(("flags", "says"), [((), ""), (("--device", "CPU", "-ec", "4"), "experts")])
def test_llama_bench_runs_experts_in_the_plug_in(
    spawn: Callable[..., Outcome],
    clean: Path,
    distribution: Host,
    tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    says: str,
) -> None:
    monkeypatch.chdir(distribution.folder)  # its modules are looked for there
    bench = [*distribution.start("llama-bench"), "-m", str(tiny_model("mixtral", "Q8_0"))]
    done = spawn("exec", *flags, "--", *bench, "-p", "4", "-n", "2", "-r", "1", "-o", "json")
    assert done.code == 0, done
    rows = json.loads(done.out)
    assert len(rows) == 2
    assert all("HybriMoE" in row["backends"] and row["tensor_buft_overrides"] == OURS for row in rows)
    assert says in done.err


def test_an_override_to_the_cpu_keeps_no_experts_from_the_plug_in(
    spawn: Callable[..., Outcome],
    clean: Path,
    distribution: Host,
    tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(distribution.folder)
    bench = [*distribution.start("llama-bench"), "-m", str(tiny_model("mixtral", "Q8_0")), "-ot", "exps=CPU"]
    done = spawn("exec", "--", *bench, "-p", "0", "-n", "1", "-r", "1")
    assert done.code == 0 and "changes nothing for experts of 2 of 2 layers" in done.err, done
    assert "HybriMoE runs 2 MoE layers" in done.err
