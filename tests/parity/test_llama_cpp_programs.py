"""The same plug-in file in llama.cpp's own programs, through GGML_BACKEND_PATH and -ot."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hybrimoe.native.plugin import library_path

pytestmark = pytest.mark.slow

# Every type that ggml's CPU backend multiplies and that a GGUF file may hold experts in.
# fmt: off
NATIVE_TYPES = [
    "f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "iq1_s",
    "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_nl", "iq4_xs", "mxfp4", "nvfp4", "tq1_0", "tq2_0",
    "q1_0", "q2_0",
]
# fmt: on
EXPERTS = r"ffn_(gate_inp\.|.*_exps)=HybriMoE"


def run(program: Path, *arguments: str, plugin: bool = True) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "HYBRIMOE_CPU": "ggml"}
    environment.pop("GGML_BACKEND_PATH", None)
    if plugin:
        environment["GGML_BACKEND_PATH"] = str(library_path())
    result = subprocess.run(
        [str(program), *arguments], env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=900
    )
    assert result.returncode == 0, result.stderr.decode("utf-8", "replace")[-3000:]
    return result


@pytest.mark.parametrize("kind", NATIVE_TYPES)
def test_backend_operator_tests(llama_cpp_bin: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """llama.cpp's operator tests for MUL_MAT_ID: of the cases of each type those that do not take minutes."""
    cases = rf"^type_a={kind},.*n_used=[124],b=0,m=512,n=(1|5|32),k=256"
    result = run(llama_cpp_bin / "test-backend-ops", "test", "-b", "HybriMoE", "-o", "MUL_MAT_ID", "-p", cases)
    output = result.stdout.decode()
    counts = re.search(r"(\d+)/(\d+) tests passed", output)
    assert counts is not None, output[-3000:]
    n_passed, n_run = int(counts[1]), int(counts[2])
    with capsys.disabled():
        print(f"\n{kind}: {n_passed} of {n_run} MUL_MAT_ID cases passed", end=" ")
    assert n_passed == n_run > 0
    assert "FAIL" not in output


def test_backend_claims_nothing_but_experts(llama_cpp_bin: Path) -> None:
    result = run(llama_cpp_bin / "test-backend-ops", "support", "-b", "HybriMoE", "--output", "csv")
    rows = [row for row in csv.DictReader(io.StringIO(result.stdout.decode())) if row["supported"] == "1"]
    claimed = {row["op_name"] for row in rows}
    # The last node of the CONV_1D_DW cases is a reshape: views compute nothing, any backend takes them.
    assert {name for name in claimed if not name.startswith("MUL_MAT_ID")} <= {"CONV_1D_DW"}
    kinds = {row["op_params"].split(",")[0].removeprefix("type_a=") for row in rows if row["op_name"] == "MUL_MAT_ID"}
    assert set(NATIVE_TYPES) <= kinds


@pytest.mark.parametrize("arch", ["qwen3moe", "deepseek2", "gpt-oss"])
def test_completion_gives_the_same_text(llama_cpp_bin: Path, tiny_model: Callable[..., Path], arch: str) -> None:
    common = ["-m", str(tiny_model(arch, "Q4_0")), "-p", "The quick brown fox", "-n", "64", "--temp", "0"]
    common += ["-no-cnv", "--no-display-prompt", "--no-repack", "-c", "256", "-t", "2", "-v"]
    program = llama_cpp_bin / "llama-completion"
    plain = run(program, *common, plugin=False)
    ours = run(program, *common, "-ot", EXPERTS)
    # llama-completion prints on its log's thread and now and then ends without the last few tokens: compare the rest.
    n_compared = min(len(plain.stdout.rstrip()), len(ours.stdout.rstrip()))
    assert n_compared > 40
    assert ours.stdout[:n_compared] == plain.stdout[:n_compared]
    assert b"HybriMoE model buffer size" in ours.stderr
    assert b"HybriMoE model buffer size" not in plain.stderr


def test_llama_bench_runs(llama_cpp_bin: Path, tiny_model: Callable[..., Path]) -> None:
    model = str(tiny_model("qwen3moe", "Q4_0"))
    arguments = [
        "-m",
        model,
        "-p",
        "32",
        "-n",
        "8",
        "-r",
        "1",
        "-t",
        "2",
        "-o",
        "json",
        "--repack",
        "0",
        "-ot",
        EXPERTS,
    ]
    rows = json.loads(run(llama_cpp_bin / "llama-bench", *arguments).stdout)
    assert [(row["n_prompt"], row["n_gen"]) for row in rows] == [(32, 0), (0, 8)]
    assert all(row["avg_ts"] > 0 for row in rows)
    assert all("HybriMoE" in row["tensor_buft_overrides"] for row in rows)
