"""The GPU benchmark tool: memory arithmetic, searches, limits, statistics, stages and resumption, and one short run.

Most runs replace the measured processes by ones that answer at once; no speed is judged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bench_gpu
import gpu_bench_report
import pytest
from gpu_bench_plan import (
    STOCK_VARIANTS,
    OursOptions,
    TimeBudget,
    expert_bytes_on_gpu,
    least_n_cpu_moe,
    least_step_us,
    make_stages,
    search_least,
    stock_on_gpu,
)

from hybrimoe.bench.process import WorkerFailedError, WorkerProcess
from hybrimoe.errors import PluginError, UsageError
from hybrimoe.gguf_model import inspect

# --- memory -----------------------------------------------------------------------------------------------------------


def test_layers_that_fit_into_the_cache(tiny_model: Callable[..., Path]) -> None:
    model = inspect(tiny_model("deepseek2", "Q4_0"))  # its first layer has no experts
    n_moe = len(model.moe_layers)
    assert expert_bytes_on_gpu(model, None) == 0
    assert expert_bytes_on_gpu(model, 0) == expert_bytes_on_gpu(model, 1) == model.expert_bytes
    assert expert_bytes_on_gpu(model, model.n_layers) == 0
    per_layer = model.moe_layers[-1].expert_bytes
    assert least_n_cpu_moe(model, model.expert_bytes) == 0
    assert least_n_cpu_moe(model, per_layer) == model.n_layers - 1
    assert least_n_cpu_moe(model, per_layer - 1) == model.n_layers
    assert least_n_cpu_moe(model, 0) == model.n_layers
    assert n_moe == model.n_layers - 1


def test_names_of_rows() -> None:
    assert stock_on_gpu(STOCK_VARIANTS[2], 5).name == "stock -ncmoe 5 --load-mode none"
    row = OursOptions(("CUDA0",), 1 << 30, "/r", 2e9).row("ours lru", cache_policy="lru")
    assert row.settings == {
        "devices": ["CUDA0"],
        "expert_cache": {"bytes": 1 << 30},
        "max_batch_tokens": 512,
        "log_to_stderr": False,
        "route_trace": "/r",
        "throttle_link_bytes_per_s": 2e9,
        "cache_policy": "lru",
    }


# --- searches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peak", range(3, 31))
def test_search_finds_the_peak_near_its_start(peak: int) -> None:
    runs: list[int] = []

    def speed(n: int) -> float:
        runs.append(n)
        return 100.0 - 2.0 * abs(n - peak)

    best, speeds = search_least(3, 30, speed, max_runs=100)
    assert best == peak
    assert len(runs) == len(set(runs)) == len(speeds)
    assert 30 in speeds, "all experts on the CPU is always among the candidates"


def test_search_needs_few_runs_where_the_start_is_best() -> None:
    best, speeds = search_least(5, 48, lambda n: 50.0 - n)
    assert best == 5
    assert sorted(speeds) == [5, 6, 48]


def test_search_passes_over_what_does_not_run() -> None:
    best, _ = search_least(0, 20, lambda n: None if n < 4 else 50.0 - n, max_runs=20)
    assert 4 <= best <= 7  # steps double until something runs
    with pytest.raises(ValueError, match="nothing ran"):
        search_least(0, 20, lambda n: None)


def test_search_ignores_gains_within_noise() -> None:
    best, speeds = search_least(2, 40, lambda n: 100.0 + 0.001 * n if n < 40 else 1.0)
    assert best in (2, 3)
    assert len(speeds) <= 8


def test_search_keeps_to_its_runs() -> None:
    runs: list[int] = []
    search_least(0, 1000, lambda n: runs.append(n) or float(n), max_runs=6)
    assert len(runs) == 6


# --- the limit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [
        ((8, 0, 10.0, 1.0, math.inf), 80.0),  # nothing cached, no link: the CPU does all
        ((8, 8, 10.0, 1.0, math.inf), 80 / 11),  # all cached: shared as 1:10
        ((8, 4, 10.0, 1.0, math.inf), 40.0),  # four misses on the CPU take longer than four hits
        ((8, 0, 10.0, 0.0, 10.0), 40.0),  # half is copied while the CPU computes the other half
        ((8, 2, math.inf, 1.0, 5.0), 30.0),  # no CPU: six copies
        ((0, 0, 1.0, 1.0, 1.0), 0.0),
    ],
)
def test_least_time_of_a_layer(arguments: tuple[float, float, float, float, float], limit: float) -> None:
    assert least_step_us(*arguments) == pytest.approx(limit, rel=1e-6)


def test_no_plan_of_whole_experts_beats_the_limit() -> None:
    import itertools
    import random

    rng = random.Random(0)
    for _ in range(300):
        n, hits = rng.randint(1, 8), rng.randint(0, 8)
        hits = min(hits, n)
        cpu, gpu, copy = (rng.uniform(0.1, 5) for _ in range(3))
        limit = least_step_us(n, hits, cpu, gpu, copy)
        for on_cpu, copied in itertools.product(range(n + 1), repeat=2):
            if n - on_cpu <= hits + copied:
                assert max(on_cpu * cpu, (n - on_cpu) * gpu, copied * copy) >= limit - 1e-9


# --- figures ----------------------------------------------------------------------------------------------------------


def test_figures_of_counters() -> None:
    counters = {
        "n_steps": 10,
        "n_hits": 60,
        "n_misses": 20,
        "n_experts_cpu": 20,
        "n_experts_gpu": 60,
        "router_us": 10.0,
        "experts_us": 200.0,
        "merge_us": 10.0,
        "plan_us": 15.0,
        "wait_us": 5.0,
        "h2d_bytes": 0,
    }
    device = {"gpu_expert_us": 1.0, "copy_expert_us": 1e9, "step_us": 2.0}
    state = {"cpu_expert_us": 10.0, "devices": [device], "guard": {"floor_us": 300.0}}
    reply = {"us": 1000.0, "counters": counters, "state": state, "copy_busy_us": 100.0}
    found = gpu_bench_report.figures(reply, 5.0, 1e6, is_decode=True)
    assert found["hit_rate"] == 0.75
    assert found["cpu_busy"] == pytest.approx(0.18)
    assert found["gpu_busy"] == pytest.approx((60 * 1.0 + 10 * 2.0) / 1000)
    assert found["link_busy"] == pytest.approx(0.1)
    # 8 experts a step, 6 of them hits; 10 us on the CPU and 1 us on the GPU: 20 us are the least, 22 were taken.
    assert found["limit_share"] == pytest.approx(200 / 220)
    assert found["host_share"] == pytest.approx(20 * 5.0 / 1e-3 / 1e6)
    assert found["plan_us"] == 1.5
    # The floor is of experts alone: what is no block's time is added, (1000 - 220) us for 4 tokens.
    assert gpu_bench_report.stock_estimate_us(reply, 4) == pytest.approx(300 + 195)
    in_prefill = gpu_bench_report.figures(reply, 5.0, 1e6, is_decode=False)
    assert in_prefill["limit_share"] is None and in_prefill["gpu_busy"] is None


def test_figures_without_counters() -> None:
    found = gpu_bench_report.figures({"us": 1000.0}, 5.0, None, is_decode=True)
    assert all(value is None for value in found.values())
    assert gpu_bench_report.stock_estimate_us({"us": 1000.0}, 4) is None


def stage_of(rows: Mapping[str, list[float | None]]) -> dict[str, Any]:
    n = len(next(iter(rows.values())))
    return {
        "rows": {name: {"kind": "ours" if name.startswith("ours") else "stock"} for name in rows},
        "rounds": [
            {
                "quiet": {"is_quiet": True},
                "rows": {name: {"decode 10": {"us": 10 / v[i] * 1e6}} for name, v in rows.items() if v[i]},
            }
            for i in range(n)
        ],
        "is_worst_case": False,
        "done": True,
    }


def test_ratios_are_formed_within_rounds_against_the_best_stock_row() -> None:
    stage = stage_of({"stock a": [10.0, 20.0, 40.0], "stock b": [30.0, 15.0, 16.0], "ours": [20.0, 40.0, 20.0]})
    of_test = gpu_bench_report.summarise_stage(stage, 1.0, None)["decode 10"]
    assert of_test["best_stock"] == "stock a"  # medians 20 and 16
    assert of_test["rows"]["ours"]["to_best_stock"]["median"] == pytest.approx(2.0)  # of 2, 2, 0.5
    assert of_test["rows"]["stock a"]["to_best_stock"] is None


def test_a_row_that_failed_in_a_round_has_no_ratio_there() -> None:
    stage = stage_of({"stock a": [10.0, 20.0], "ours": [30.0, None]})
    of_test = gpu_bench_report.summarise_stage(stage, 1.0, None)["decode 10"]
    assert of_test["rows"]["ours"]["to_best_stock"]["n"] == 1


def test_tables_tell_goals_and_failures() -> None:
    stage = stage_of({"stock a": [10.0, 10.0], "ours": [20.0, 20.0]})
    facts = {"ours": {"device_bytes_used": 5 << 20}, "stock a": {"device_bytes_used": 3 << 20}}
    stage |= {"failures": {"ours lru": "out of memory"}, "facts": facts}
    stage["rounds"][1]["rows"]["ours"]["decode 10"]["events"] = ["slots: 4", "guard: full -> frozen: too slow"]
    stage["summary"] = gpu_bench_report.summarise_stage(stage, 1.0, None)
    report = {"stages": {"compare m 25%": stage}}
    for markdown in (False, True):
        text = "\n".join(gpu_bench_report.tables(report, markdown=markdown))
        assert "goal 1.50: reached (2.00)" in text
        assert "ours lru: out of memory" in text
        assert "stock a (best stock)" in text
        assert "ours: guard: full -> frozen: too slow" in text and "slots: 4" not in text
        assert "2 MiB more GPU memory" in text
    assert "|---|" in text


# --- stages -----------------------------------------------------------------------------------------------------------


def test_stages_stand_in_order_of_worth() -> None:
    kinds = ["compare", "throttled", "uniform", "policies"]
    stages = make_stages(["a", "mixtral"], [0.25, 0.5], kinds, policy_fractions=[0.25], worst_fraction=0.1)
    assert [stage.key for stage in stages] == [
        "variants a",
        "opponents a 25%",
        "compare a 25%",
        "opponents a 50%",
        "compare a 50%",
        "opponents a 10%",
        "compare a 10% throttled",
        "compare a 10% uniform",
        "policies a 25%",
        "variants mixtral",
        "opponents mixtral 25%",
        "compare mixtral 25%",
        "opponents mixtral 50%",
        "compare mixtral 50%",
    ]
    assert [stage.is_worst_case for stage in stages if stage.what == "compare"] == [
        False,
        False,
        True,
        True,
        True,
        True,
    ]
    only = make_stages(["/x/a.gguf"], [0.25], ["policies"], policy_fractions=[0.5], worst_fraction=0.1)
    assert [stage.key for stage in only] == ["variants a", "opponents a 50%", "policies a 50%"]


def test_time_budget() -> None:
    now = [100.0]
    budget = TimeBudget(60.0, lambda: now[0])
    assert budget.allows(60.0)
    now[0] = 130.0
    assert budget.used_s == 30.0
    assert budget.allows(30.0) and not budget.allows(30.1)


# --- runs with processes that answer at once --------------------------------------------------------------------------


class FakeWorker:
    """Answers like a worker; speeds by row. Counts what was asked."""

    asked: list[str]

    def __init__(self, row: Any, log: list[str]) -> None:
        self.row = row
        self.asked = log
        self.ready = {"ready": True, "device_bytes_used": 5 << 20}

    def ask(self, test: str, n: int) -> dict[str, Any]:
        self.asked.append(f"{self.row.name}: {test} {n}")
        if self.row.settings.get("cache_policy") == "lfu":
            raise WorkerFailedError(self.row.name, "out of memory")
        us = {"stock": 1000.0, "ours": 500.0}[self.row.kind] * n - (self.row.n_cpu_moe is not None) * 100.0 * n
        if not self.row.host:
            us *= 0.9
        return {"us": us, "counters": {"n_hits": 3, "n_misses": 1}} if self.row.kind == "ours" else {"us": us}

    def close(self) -> None:
        self.asked.append(f"{self.row.name}: close")


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs without processes; returns the log of what rows were asked."""
    log: list[str] = []
    gpu = bench_gpu.Device("Fake0", "a card", 1, 8 << 30, 8 << 30)
    monkeypatch.setattr(bench_gpu, "list_devices", lambda backends: [gpu])
    monkeypatch.setattr(bench_gpu.Bench, "start", lambda self, row, model: FakeWorker(row, log))
    monkeypatch.setattr(bench_gpu, "host_read_bytes_per_s", lambda n_threads: 1e10)
    monkeypatch.setattr(bench_gpu, "wait_for_quiet", lambda options: {"is_quiet": True})
    return log


@pytest.fixture
def arguments(tmp_path: Path, tiny_model: Callable[..., Path]) -> list[str]:
    model = tiny_model("qwen3moe", "Q4_0")
    options = ["--models", str(model), "--fractions", "0.5", "--policy-fractions", "0.5", "--decode", "4"]
    options += ["--prefill", "8", "--rounds", "2", "--json", str(tmp_path / "out.json")]
    return [
        *options,
        "--models-dir",
        str(tmp_path / "models"),
        "--policies",
        "mrs,lfu,schedule=cpu-only",
        "--threads",
        "1",
    ]


def test_whole_flow(faked: list[str], arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_gpu.main(arguments) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    name = Path(arguments[1]).stem
    assert list(report["stages"]) == [
        f"variants {name}",
        f"opponents {name} 50%",
        f"compare {name} 50%",
        f"compare {name} 50% throttled",
        f"compare {name} 50% uniform",
        f"policies {name} 50%",
    ]
    assert all(stage["done"] for stage in report["stages"].values())
    assert report["stages"][f"variants {name}"]["choice"] == {
        "decode": "stock -cmoe --no-host",
        "prefill": "stock -cmoe --no-host",
    }
    compare = report["stages"][f"compare {name} 50%"]
    n_layers = inspect(arguments[1]).n_layers
    on_gpu = f"stock -ncmoe {n_layers // 2} --no-host"
    assert list(compare["rows"]) == ["stock -cmoe --no-host", on_gpu, "ours", "ours --guard off"]
    assert compare["rows"]["ours --guard off"]["settings"]["guard"] is False
    of_decode = compare["summary"]["decode 4"]
    assert of_decode["best_stock"] == on_gpu
    assert of_decode["rows"]["ours"]["to_best_stock"]["median"] == pytest.approx(0.9 * 900 / 500)
    assert of_decode["rows"]["ours"]["figures"]["hit_rate"] == 0.75
    throttled = report["stages"][f"compare {name} 50% throttled"]
    assert throttled["rows"]["ours"]["settings"]["throttle_link_bytes_per_s"] == 2e9
    policies = report["stages"][f"policies {name} 50%"]
    assert policies["failures"] == {"ours lfu": "out of memory"}
    assert len(policies["rounds"]) == 2
    assert policies["rows"]["ours schedule=cpu-only"]["settings"]["schedule"] == "cpu-only"
    assert policies["rows"]["ours mrs"]["settings"]["cache_policy"] == "mrs"
    output = capsys.readouterr().out
    assert "a card" in output and "ours lfu: out of memory" in output
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]
    # The first row of the second round is the last of the first: rounds alternate.
    asked = [line for line in faked if line.endswith("decode 4")]
    names = [row.name for row in STOCK_VARIANTS]
    assert asked[:6] == [f"{name}: decode 4" for name in [*names, *reversed(names)]]


def test_routing_decides_which_goals_apply(faked: list[str], arguments: list[str], tmp_path: Path) -> None:
    import numpy as np
    import route_trace

    name, stage = Path(arguments[1]).stem, "compare"
    trace = tmp_path / "recorded.npz"
    np.savez(trace, experts=np.random.default_rng(0).integers(0, 16, (9, 2, 4)).astype(np.uint8))
    assert bench_gpu.main([*arguments, "--stages", "compare", "--route-trace", f"{arguments[1]}={trace}"]) == 0
    entry = json.loads((tmp_path / "out.json").read_text())["stages"][f"{stage} {name} 50%"]
    assert not entry["is_worst_case"] and "recorded.npz" in entry["routing"]
    raw = entry["rows"]["ours"]["settings"]["route_trace"]
    assert len(route_trace.read_raw(Path(raw))) == 9
    assert bench_gpu.main([*arguments, "--stages", "compare", "--fresh"]) == 0
    entry = json.loads((tmp_path / "out.json").read_text())["stages"][f"{stage} {name} 50%"]
    assert entry["is_worst_case"] and "uniform" in entry["routing"]


def test_a_stopped_run_goes_on(
    faked: list[str],
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounds = iter(range(1000))
    allowed = [5]
    monkeypatch.setattr(TimeBudget, "allows", lambda self, expected_s: next(rounds) < allowed[0])
    assert bench_gpu.main(arguments) == 0
    assert "the same command goes on" in capsys.readouterr().err
    first = json.loads((tmp_path / "out.json").read_text())
    assert not all(stage["done"] for stage in first["stages"].values()) or len(first["stages"]) < 6
    n_asked = len(faked)
    allowed[0] = 1000
    assert bench_gpu.main(arguments) == 0
    whole = json.loads((tmp_path / "out.json").read_text())
    assert len(whole["stages"]) == 6 and all(stage["done"] for stage in whole["stages"].values())
    for key, stage in first["stages"].items():
        assert whole["stages"][key]["rounds"][: len(stage["rounds"])] == stage["rounds"], "nothing is measured twice"
    assert whole["provenance"] == first["provenance"] and len(whole["resumed"]) == 1
    n_whole = len(faked)
    assert n_whole > n_asked
    assert bench_gpu.main(arguments) == 0
    assert len(faked) == n_whole, "a finished run measures nothing more"
    assert bench_gpu.main([*arguments, "--rounds", "3", "--stages", "compare"]) == 0
    more = json.loads((tmp_path / "out.json").read_text())
    assert len(more["stages"][f"compare {Path(arguments[1]).stem} 50%"]["rounds"]) == 3


def test_other_options_do_not_mix(
    faked: list[str], arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_gpu.main([*arguments, "--stages", "policies"]) == 0
    kept = (tmp_path / "out.json").read_bytes()
    capsys.readouterr()
    assert bench_gpu.main([*arguments, "--threads", "2"]) == 2
    error = capsys.readouterr().err
    assert "other options" in error and len(error.splitlines()) == 2
    assert (tmp_path / "out.json").read_bytes() == kept
    assert bench_gpu.main([*arguments, "--only-print", "--markdown"]) == 0
    assert "| ours mrs |" in capsys.readouterr().out
    (tmp_path / "out.json").write_text("{")
    assert bench_gpu.main(arguments) == 2
    (tmp_path / "out.json").unlink()
    assert bench_gpu.main([*arguments, "--only-print"]) == 2
    assert not (tmp_path / "out.json").exists()


# --- the other llama.cpp ----------------------------------------------------------------------------------------------


def fake_llama_bench(folder: Path, body: str) -> Path:
    import sys

    path = folder / "llama-bench"
    path.write_text(
        f"#!{sys.executable}\nimport json, sys\na = sys.argv[1:]\nof = lambda f: a[a.index(f) + 1]\n{body}\n"
    )
    path.chmod(0o755)
    return path


def test_baseline_is_swept_and_compared(faked: list[str], arguments: list[str], tmp_path: Path) -> None:
    body = (
        "speed = 50 + 100 * (float(of('--moe-cache-cpu-share')) == 0.5)\n"
        "assert int(of('--moe-cache-mib')) >= 0 and of('-ncmoe') == '999'\n"
        "tests = [(int(n), 0) for n in of('-p').split(',') if n != '0']\n"
        "tests += [(0, int(n)) for n in of('-n').split(',') if n != '0']\n"
        "print(json.dumps([{'n_prompt': p, 'n_gen': n, 'avg_ts': speed} for p, n in tests]))"
    )
    program = fake_llama_bench(tmp_path, body)
    assert bench_gpu.main([*arguments, "--stages", "compare", "--baseline-bin", str(program)]) == 0
    stages = json.loads((tmp_path / "out.json").read_text())["stages"]
    name = Path(arguments[1]).stem
    assert stages[f"opponents {name} 50%"]["choice"]["cpu_share"] == 0.5
    row = stages[f"compare {name} 50%"]["summary"]["decode 4"]["rows"]["baseline"]
    assert row["tokens_per_s"]["median"] == pytest.approx(150)


def test_baseline_that_fails_is_left_out(faked: list[str], arguments: list[str], tmp_path: Path) -> None:
    program = fake_llama_bench(tmp_path, "sys.exit('unknown argument')")
    assert bench_gpu.main([*arguments, "--stages", "compare", "--baseline-bin", str(program)]) == 0
    stages = json.loads((tmp_path / "out.json").read_text())["stages"]
    name = Path(arguments[1]).stem
    assert "unknown argument" in stages[f"opponents {name} 50%"]["failures"]["baseline"]
    assert "baseline" not in stages[f"compare {name} 50%"]["rows"]


def test_output_of_another_program_is_refused() -> None:
    for text in ("", "[]", "{}", '[{"n_gen": 0, "n_prompt": 8}]', '[{"n_gen": 4, "n_prompt": 0, "avg_ts": 0}]'):
        with pytest.raises(WorkerFailedError):
            bench_gpu.baseline_replies(text, [("decode", 4)])


# --- processes --------------------------------------------------------------------------------------------------------


def python_worker(script: str, give_up_s: float = 60.0) -> WorkerProcess:
    import os
    import sys

    return WorkerProcess("row", [sys.executable, "-c", script], os.environ, give_up_s)


ECHO = "import sys\nprint('{\"ready\": true}', flush=True)\nfor line in sys.stdin: print(line, end='', flush=True)"


def test_a_worker_answers() -> None:
    with python_worker(ECHO) as worker:
        assert worker.ready == {"ready": True}
        assert worker.ask(test="decode", n=4) == {"test": "decode", "n": 4}


def test_a_worker_that_ends() -> None:
    with pytest.raises(WorkerFailedError, match="status 3"):
        python_worker("raise SystemExit(3)")
    worker = python_worker("print('{}', flush=True)")
    with pytest.raises(WorkerFailedError, match="status 0"):
        worker.ask(test="decode", n=4)
    worker.close()


def test_a_worker_that_reports_an_error() -> None:
    with pytest.raises(WorkerFailedError, match="too large"):
        python_worker('print(\'{"error": "too large"}\', flush=True)')


def test_a_worker_that_hangs_is_ended() -> None:
    with pytest.raises(WorkerFailedError, match="status -9"):
        python_worker("import time\ntime.sleep(60)", give_up_s=1.0)


# --- devices and arguments --------------------------------------------------------------------------------------------


def test_device_choice() -> None:
    cpu = bench_gpu.Device("CPU", "a processor", 0, 1, 1)
    card = bench_gpu.Device("CUDA0", "a card", 1, 1, 1)
    assert bench_gpu.pick_device([cpu, card], "auto") is card
    assert bench_gpu.pick_device([cpu, card], "CPU") is cpu
    with pytest.raises(PluginError, match="no GPU"):
        bench_gpu.pick_device([cpu], "auto")
    with pytest.raises(UsageError, match="Vulkan3"):
        bench_gpu.pick_device([cpu, card], "Vulkan3")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rounds", "0"],
        ["--fractions", "1.5"],
        ["--fractions", "half"],
        ["--models", "gpt-5"],
        ["--stages", "all"],
        ["--prefill", "0"],
        ["--max-minutes", "0"],
        ["--ubatch", "16"],
        ["--policies", "order=lru"],
        ["--device", "Vulkan9", "--models", "qwen3-30b-a3b"],
        ["--baseline-bin", "missing", "--device", "CPU"],
        ["--route-trace", "missing.npz", "--device", "CPU"],
    ],
)
def test_bad_input(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = bench_gpu.main([*arguments, "--json", str(tmp_path / "out.json")])
    except SystemExit as error:
        status = error.code
    assert status == 2
    error_text = capsys.readouterr().err
    assert "error: " in error_text and "Traceback" not in error_text
    assert not list(tmp_path.iterdir())


def test_short_real_run(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole tool once, with the CPU as the accelerator and real processes."""
    options = ["--device", "CPU", "--stages", "compare", "--rounds", "1", "--warmup", "4", "--search-decode", "2"]
    options += ["--ubatch", "32", "--wait", "0"]
    assert bench_gpu.main([*arguments, *options]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    compare = report["stages"][f"compare {Path(arguments[1]).stem} 50%"]
    assert not compare["failures"], compare["failures"]
    assert set(compare["summary"]) == {"decode 4", "prefill 8"}
    ours = compare["summary"]["decode 4"]["rows"]["ours"]
    assert ours["tokens_per_s"]["median"] > 0
    assert 0 <= ours["figures"]["hit_rate"] <= 1
    reply = compare["rounds"][0]["rows"]["ours"]["decode 4"]
    assert reply["counters"]["n_experts_gpu"] > 0 or reply["counters"]["n_experts_cpu"] > 0
    origin = report["provenance"]
    assert origin["commit"] and origin["machine"]["cpu"] and origin["device"]["name"] == "CPU"
