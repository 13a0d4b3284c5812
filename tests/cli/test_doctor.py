"""`hybrimoe doctor`: findings and their mends."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybrimoe import doctor
from hybrimoe.machine import host
from hybrimoe.models import store

CARD = host.Gpu("Test Card 9000", "cuda", 16 << 30)


@pytest.fixture
def report(call: Callable[..., Any]) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Exit code and data of `hybrimoe doctor --json`."""

    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        outcome = call("doctor", "--json", *arguments)
        return outcome.code, json.loads(outcome.out)

    return run


@pytest.fixture
def demo(home: Path, model: str) -> None:
    """A tiny model in the demo model's place."""
    put_demo(Path(model))


def put_demo(model: Path) -> None:
    store.models_dir().mkdir(parents=True)
    (store.models_dir() / "demo.gguf").symlink_to(model.absolute())


def findings(data: dict[str, Any], topic: str) -> list[dict[str, Any]]:
    return [f for f in data["findings"] if f["topic"] == topic]


def test_a_sound_installation_is_proved_by_running(report: Any, demo: None) -> None:
    code, data = report()
    assert code == 0 and data["ok"], data["findings"]
    assert data["plugin"]["loaded"] and data["plugin"]["compiled_for_ggml"] == data["versions"]["ggml"]
    assert {"hybrimoe", "llama-cpp-python", "ggml", "plug-in"} <= set(data["versions"])
    assert {"CPU", "HybriMoE"} <= {b["name"] for b in data["backends"]}
    assert data["demo"]["verified"] is True
    assert data["demo"]["n_blocks"] == 8 * data["demo"]["n_moe_layers"]
    assert data["demo"]["n_blocks_delegated"] == 0
    assert data["machine"]["n_cores"] >= 1 and data["machine"]["memory_bytes"] > 1 << 28


def test_the_page_for_people(call: Callable[..., Any], demo: None) -> None:
    outcome = call("doctor")
    assert outcome.code == 0
    assert "all 2 MoE layers in the plug-in" in outcome.out
    assert "\x1b" not in outcome.out


def test_settings_of_the_user_do_not_decide(report: Any, demo: None, home: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "nonsense")
    file = home / "config" / "hybrimoe" / "config.toml"
    file.parent.mkdir(parents=True)
    file.write_text("plugin = false\n")
    code, data = report()
    assert code == 0 and data["demo"]["verified"] is True


def test_no_demo_model_is_a_note(report: Any) -> None:
    code, data = report()
    assert code == 0
    (finding,) = findings(data, "demo")
    assert finding["level"] == "note" and finding["mend"] == "hybrimoe models build demo"
    assert report("--no-run")[1]["demo"] == {}


def test_a_missing_plugin_is_found(report: Any, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    from hybrimoe.native import plugin

    plugin.load_plugin.cache_clear()
    monkeypatch.setenv("HYBRIMOE_PLUGIN", str(home / "absent.so"))
    code, data = report()
    assert code == 5 and not data["ok"]
    (finding,) = findings(data, "plug-in")
    assert finding["level"] == "error" and "absent.so" in finding["message"] and finding["mend"]


@pytest.mark.parametrize(
    ("signal_number", "part", "crashing", "message"),
    [
        (signal.SIGSEGV, "plug-in", "load_plugin()", "the plug-in crashes when it is loaded (SIGSEGV)"),
        (signal.SIGSEGV, "llama.cpp", "llama_backend_init()", "llama.cpp crashes when it is started (SIGSEGV)"),
        (signal.SIGILL, "llama.cpp", "llama_backend_init()", "llama.cpp was compiled for another CPU: it uses an"),
    ],
)
def test_a_crash_is_a_finding_not_a_crash(
    report: Any, demo: None, monkeypatch: pytest.MonkeyPatch, signal_number: int, part: str, crashing: str, message: str
) -> None:
    def crash(command: list[str], _environment: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, -signal_number if crashing in command[-1] else 0, "", "")

    monkeypatch.setattr(doctor, "_child", crash)
    code, data = report()
    assert code == 5
    (finding,) = findings(data, part)
    assert finding["level"] == "error" and finding["message"].startswith(message)


def test_a_plugin_that_is_loaded_but_unused_is_an_error(report: Any, demo: None, monkeypatch: Any) -> None:
    original = doctor._child

    def without(command: list[str], environment: dict[str, str]) -> Any:
        return original([*command, "--no-plugin"] if "run" in command else command, environment)

    monkeypatch.setattr(doctor, "_child", without)
    code, data = report()
    assert code == 5 and findings(data, "demo")[0]["level"] == "error"


def test_a_failing_run_keeps_its_exit_code(report: Any, home: Path) -> None:
    broken = home / "broken.gguf"
    broken.write_bytes(b"GGUF")
    put_demo(broken)
    code, data = report()
    assert code == 3
    assert "demo.gguf" in findings(data, "demo")[0]["message"]


def test_a_card_that_the_build_cannot_use(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import llama_cpp

    monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: False)
    monkeypatch.setattr(host, "gpus", lambda: [CARD])
    monkeypatch.setattr(host, "notable_gpu", lambda: CARD)
    code, data = report("--no-run")
    assert code == 0
    (finding,) = findings(data, "gpu")
    assert finding["level"] == "warning" and CARD.name in finding["message"]
    assert 'CMAKE_ARGS="-DGGML_CUDA=on"' in finding["mend"] and "llama-cpp-python==" in finding["mend"]
    assert data["machine"]["gpus"][0]["name"] == CARD.name


def test_gpu_support_without_a_card(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import llama_cpp

    monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: True)
    (finding,) = findings(report("--no-run")[1], "gpu")
    assert finding["level"] == "warning" and "no card" in finding["message"]


def test_an_unusable_card_is_a_warning_at_start(call: Any, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "notable_gpu", lambda: CARD)
    outcome = call("run", model, "hi", "-n", "1")
    assert outcome.code == 0
    assert f"warning: {CARD.name} is not used" in outcome.err and "GGML_CUDA=on" in outcome.err


def test_a_container_limit_is_a_note(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "memory", lambda: host.Memory(64 << 30, 1 << 30, 2 << 30))
    notes = findings(report("--no-run")[1], "memory")
    assert any("control group" in n["message"] for n in notes)
    assert any("only 1.0 GiB" in n["message"] for n in notes)


def test_old_processors_are_told(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "cpu", lambda: host.Cpu("Old One", 2, 4, ("sse4_2", "avx")))
    data = report("--no-run")[1]
    assert data["machine"]["vector_level"] == "AVX"
    assert findings(data, "cpu")[0]["level"] == "warning"


def test_memory_respects_control_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("2000000\n")
    (tmp_path / "memory.current").write_text("1500000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 300000\nactive_file 100000\n")
    monkeypatch.setattr(host, "_CGROUP", tmp_path)
    memory = host.memory()
    assert memory.limit_bytes == 2_000_000
    assert memory.available_bytes == 900_000
    (tmp_path / "memory.max").write_text("max\n")
    assert host.memory().limit_bytes is None
