"""The package's one plug-in file in programs that others compiled: the same answers, whoever computes the experts.

Probabilities are compared as they are printed: one wrong expert changes them where the token may stay.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .conftest import EXPERTS, Host, ask, greedy

pytestmark = pytest.mark.hosts

ARCHITECTURES = [
    "mixtral", "nogate", "qwen3moe", "qwen2moe", "olmoe", "deepseek2", "deepseek2-merged", "deepseek-lite", "gpt-oss",
    "llama4", "top1", "nemotron-h",
]  # fmt: skip
PROMPTS = ("The quick brown fox", "a", "Once upon a time there was a river. " * 12)
COMMON = ("-c", "512", "-t", "2", "--no-repack", "-np", "1", "-v")
STAND_IN = {"devices": ["CPU"], "expert_cache": 4, "guard": False, "schedule": "gpu-only"}


@pytest.fixture(params=["distribution", pytest.param("pin_host", marks=pytest.mark.slow)])
def host(request: pytest.FixtureRequest) -> Host:
    found: Host = request.getfixturevalue(request.param)
    return found


def answers(
    host: Host, model: Path, log: Path, settings: dict[str, object] | None, *more: str
) -> list[list[tuple[int, float]]]:
    """Greedy answers of a server of `host`; `settings` None: without the plug-in."""
    environment = host.environment(settings is not None, settings, HYBRIMOE_CPU="ggml")
    ours = () if settings is None else ("-ot", EXPERTS)
    with host.server(model, *COMMON, *ours, *more, environment=environment, log=log) as port:
        return greedy(port, PROMPTS)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_answers_are_those_of_the_program_alone(
    host: Host, tiny_model: Callable[..., Path], tmp_path: Path, arch: str
) -> None:
    model, log = tiny_model(arch, "Q8_0"), tmp_path / "log"
    plain = answers(host, model, tmp_path / "plain", None)
    assert answers(host, model, log, {}) == plain
    assert "HybriMoE model buffer size" in log.read_text(errors="replace")
    assert answers(host, model, log, STAND_IN) == plain


@pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss", "deepseek2-merged"])
def test_a_device_that_takes_whole_graphs(
    host: Host, tiny_model: Callable[..., Path], tmp_path: Path, arch: str
) -> None:
    """The sum of what the CPU computes is added apart, so the last digits may be others; in F32 they stay the last."""
    model, log = tiny_model(arch, "F32"), tmp_path / "log"
    environment = host.environment(True, {**STAND_IN, "front": "graph"}, HYBRIMOE_CPU="ggml")
    attention = ("-fa", "off")  # "auto" may be on with one device and off with another
    more = (*attention, "-dev", "HybriMoE_CPU", "-ngl", "99", "-ot", "ffn_.*_exps[.]weight=HybriMoE_Graph")
    with host.server(model, *COMMON, *more, environment=environment, log=log) as port:
        got = greedy(port, PROMPTS)
    assert "CPU caches" in log.read_text(errors="replace")
    for mine, theirs in zip(got, answers(host, model, tmp_path / "plain", None, *attention), strict=True):
        assert [token for token, _ in mine] == [token for token, _ in theirs]
        assert [p for _, p in mine] == pytest.approx([p for _, p in theirs], abs=1e-3)


def test_parallel_clients(host: Host, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Four at once on two slots: each is answered, with as many tokens as it wanted."""
    model = tiny_model("qwen3moe", "Q8_0")
    arguments = ("-c", "1024", "-t", "2", "--no-repack", "-np", "2", "-ot", EXPERTS)
    environment = host.environment(True, STAND_IN, HYBRIMOE_CPU="ggml")
    with (
        host.server(model, *arguments, environment=environment, log=tmp_path / "log") as port,
        ThreadPoolExecutor(4) as pool,
    ):
        bodies = [{"prompt": f"{i} " + PROMPTS[2], "n_predict": 32, "ignore_eos": True} for i in range(4)]
        found = list(pool.map(lambda body: ask(port, "POST", "/completion", body), bodies))
    assert [(status, answer["tokens_predicted"]) for status, answer in found] == [(200, 32)] * 4


def perplexity(host: Host, model: Path, text: Path, settings: dict[str, object] | None, cpu: str) -> str:
    environment = host.environment(settings is not None, settings, HYBRIMOE_CPU=cpu)
    ours = () if settings is None else ("-ot", EXPERTS)
    arguments = (
        "-m",
        str(model),
        "-f",
        str(text),
        "-c",
        "256",
        "--chunks",
        "2",
        "-t",
        "2",
        "--no-repack",
        "-fit",
        "off",
    )
    done = host.run("llama-perplexity", *arguments, *ours, environment=environment)
    found = re.search(r"Final estimate: PPL = ([\d.]+)", done.stdout + done.stderr)
    assert done.returncode == 0 and found, done.stderr[-3000:]
    return found[1]


@pytest.mark.slow
def test_perplexity_of_the_demo(pin_host: Host, demo_model: Path, tmp_path: Path) -> None:
    """With ggml's kernels all printed digits are equal, with our own half a percent at most is between."""
    root, text = Path(__file__).resolve().parent.parent.parent, tmp_path / "text.txt"
    text.write_text((root / "README.md").read_text() + (root / "docs" / "server.md").read_text())
    plain = perplexity(pin_host, demo_model, text, None, "ggml")
    assert perplexity(pin_host, demo_model, text, {}, "ggml") == plain
    assert float(perplexity(pin_host, demo_model, text, {}, "auto")) == pytest.approx(float(plain), rel=5e-3)


def test_one_file_for_both(distribution: Host) -> None:
    """The distribution's ggml speaks another backend API than the pinned one that the package is compiled with."""
    done = distribution.run(
        "llama-server", "--list-devices", environment=distribution.environment(True, HYBRIMOE_PROBE="1")
    )
    assert '"backend_api":3' in done.stdout + done.stderr
    assert '"fits":true' in done.stdout + done.stderr
