"""`hybrimoe exec` from the command line on: what is started, with which arguments, environment and settings."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli.conftest import COMMAND

from hosts.stand_ins import BENCH_HELP, SERVER_HELP, Outcome
from hybrimoe.hosts.launch import OURS
from hybrimoe.native.plugin import library_path

Call = Callable[..., Outcome]
Started = Callable[..., dict[str, Any]]


@pytest.fixture
def moe(tiny_model: Callable[..., Path]) -> str:
    return str(tiny_model("mixtral"))


@pytest.fixture
def dense(tmp_path: Path) -> str:
    """A header that names no experts."""
    from gguf import GGUFWriter

    path = tmp_path / "dense.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return str(path)


@pytest.fixture
def printed(call: Call, clean: Path) -> Started:
    """`printed(words...)`: environment, command and notes of `exec --print words...`."""

    def run(*words: str) -> dict[str, Any]:
        outcome = call("exec", "--print", *words)
        assert outcome.code == 0, outcome
        line = shlex.split(outcome.out)
        found: dict[str, Any] = {"env": {}, "unset": [], "notes": outcome.err.splitlines(), "config": None}
        if line[0] == "env":
            line.pop(0)
            while line[0] == "-u":
                found["unset"].append(line[1])
                line = line[2:]
            while "=" in line[0]:
                name, _, value = line.pop(0).partition("=")
                found["env"][name] = value
        if "HYBRIMOE_CONFIG" in found["env"]:
            found["config"] = json.loads(found["env"]["HYBRIMOE_CONFIG"])
        return {**found, "command": line, "arguments": line[1:]}

    return run


def test_print_is_what_is_started(
    printed: Started, spawn: Call, stand_in: Callable[..., str], moe: str, clean: Path
) -> None:
    server = stand_in("llama-server")
    words = (server, "-m", moe, "-p", 'say "it\'s"\n', "-c", "64")
    shown = printed("--", *words)
    assert shown["command"] == [*words, "-ot", OURS, "-fit", "off"]
    assert shown["env"]["GGML_BACKEND_PATH"] == str(library_path().absolute())
    done = spawn("exec", "--", *words)
    assert done.code == 0, done
    started = json.loads(done.out)
    assert started["argv"] == shown["arguments"]
    assert started["env"] == shown["env"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
def test_a_program_ends_with_its_reader(spawn: Call, stand_in: Callable[..., str], clean: Path) -> None:
    # Python ignores SIGPIPE and SIGXFSZ; what it starts must not.
    script = Path(stand_in("start.sh"))
    script.write_text("#!/bin/sh\ngrep SigIgn /proc/self/status\n")
    ignored = int(spawn("exec", str(script)).out.split()[1], 16)
    assert ignored & (1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1)) == 0


def test_what_could_not_be_started_changes_nothing_here(call: Call, stand_in: Callable[..., str], clean: Path) -> None:
    script = Path(stand_in("start.sh"))
    script.write_text("#!/does/not/exist\n")
    assert call("exec", str(script)).code != 0
    assert signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN


def test_paths_need_not_be_utf_8(clean: Path, stand_in: Callable[..., str], moe: str) -> None:
    path = os.fsencode(clean) + b"/caf\xe9.gguf"
    Path(os.fsdecode(path)).symlink_to(moe)
    command = [*COMMAND, "exec", "--print", "--", stand_in("llama-server"), "-m", path]
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == 0 and path in done.stdout, done


def test_settings_are_those_of_our_own_commands(printed: Started, stand_in: Callable[..., str], moe: str) -> None:
    server = stand_in("llama-server")
    config = printed(server, "-m", moe, "-b", "256", "-ub", "128")["config"]
    assert config["devices"] == "auto" and config["expert_cache"] == "auto" and config["guard"] is True
    assert config["max_batch_tokens"] == 128 and config["n_cpu_layers"] == 0
    assert config["log_to_stderr"] is True
    assert config["state_path"].endswith(".json")
    flags = ("-ec", "25%", "--cache-policy", "lru", "--guard", "off", "--no-keep-residency", "-ncmoe", "2")
    config = printed(*flags, "--", server, "-m", moe)["config"]
    assert config["expert_cache"] == {"fraction": 0.25} and config["cache_policy"] == "lru"
    assert config["guard"] is False and config["state_path"] == "" and config["n_cpu_layers"] == 2
    assert printed("-cmoe", "--", server, "-m", moe)["config"]["devices"] == []


def test_the_config_file_counts(printed: Started, stand_in: Callable[..., str], moe: str, clean: Path) -> None:
    file = clean / "config" / "hybrimoe" / "config.toml"
    file.parent.mkdir(parents=True)
    file.write_text('expert-cache = "7"\nctx-size = 512\n')
    shown = printed(stand_in("llama-server"), "-m", moe)
    assert shown["config"]["expert_cache"] == 7 and "512" not in shown["arguments"]


def test_settings_that_the_user_gave_the_plug_in_stay(
    printed: Started, call: Call, stand_in: Callable[..., str], moe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = stand_in("llama-server")
    monkeypatch.setenv("HYBRIMOE_CONFIG", '{"cpu_kernels": "scalar", "guard": false}')
    config = printed(server, "-m", moe)["config"]
    assert config["cpu_kernels"] == "scalar" and config["guard"] is False and config["prefetch"] == "impact"
    for text in ("{", "[1]", '{"cpu_kernel": "avx2"}', '{"guard": 1}', '{"simple_costs": NaN}'):
        monkeypatch.setenv("HYBRIMOE_CONFIG", text)
        outcome = call("exec", "--print", server, "-m", moe)
        outcome.assert_two_lines(2)
        assert "HYBRIMOE_CONFIG" in outcome.err


@pytest.mark.parametrize(
    ("given", "arguments", "notes"),
    [
        ((), ("-ot", OURS, "-fit", "off"), ()),
        # The user's own overrides come first: the first pattern that matches decides.
        (("-ot", "attn_q=CPU"), ("-ot", f"attn_q=CPU,{OURS}", "-fit", "off"), ()),
        (
            ("--override-tensor", "attn_q=CPU", "-v"),
            ("--override-tensor", f"attn_q=CPU,{OURS}", "-v", "-fit", "off"),
            (),
        ),
        (
            ("-ot", "attn_q=CPU", "-ot", "attn_k=CPU"),
            ("-ot", "attn_q=CPU", "-ot", f"attn_k=CPU,{OURS}", "-fit", "off"),
            (),
        ),
        (("-fit", "off"), ("-fit", "off", "-ot", OURS), ()),
        (("--fit", "on"), ("-ot", OURS, "-fit", "off"), ("--fit on",)),
        (("-fit", "maybe"), ("-fit", "maybe", "-ot", OURS), ()),
        (("-cmoe",), ("-ot", OURS, "-fit", "off"), ("-cmoe",)),
        (("--n_cpu_moe", "1"), ("-ot", OURS, "-fit", "off"), ("--n-cpu-moe 1 is told",)),
        (("-ncmoe", "-3"), ("-ot", OURS, "-fit", "off"), ("-ncmoe -3 is left out",)),
        (("--moe-cache-mib", "0"), ("--moe-cache-mib", "0", "-ot", OURS, "-fit", "off"), ()),
    ],
)
def test_arguments(
    printed: Started,
    stand_in: Callable[..., str],
    moe: str,
    given: tuple[str, ...],
    arguments: tuple[str, ...],
    notes: tuple[str, ...],
) -> None:
    shown = printed(stand_in("llama-completion"), "-m", moe, *given)
    assert shown["arguments"] == ["-m", moe, *arguments]
    assert len(shown["notes"]) == len(notes)
    for line, word in zip(shown["notes"], notes, strict=True):
        assert line.startswith(f"note: {word}")


def test_experts_that_the_program_was_told_to_keep_on_the_cpu(
    printed: Started, stand_in: Callable[..., str], moe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = stand_in("llama-server")
    assert printed(server, "-m", moe, "-cmoe")["config"]["devices"] == []
    assert printed(server, "-m", moe, "-ncmoe", "3")["config"]["n_cpu_layers"] == 3
    monkeypatch.setenv("LLAMA_ARG_N_CPU_MOE", "2")
    monkeypatch.setenv("LLAMA_ARG_FIT", "on")
    shown = printed(server, "-m", moe)
    assert shown["config"]["n_cpu_layers"] == 2
    assert set(shown["unset"]) == {"LLAMA_ARG_N_CPU_MOE", "LLAMA_ARG_FIT"} and len(shown["notes"]) == 2
    # An assignment before the program would set it again.
    shown = printed("env", "LLAMA_ARG_N_CPU_MOE=4", "X=1", server, "-m", moe)
    assert shown["config"]["n_cpu_layers"] == 4 and "X=1" in shown["command"]
    assert "LLAMA_ARG_N_CPU_MOE=4" not in shown["command"]


def test_overrides_in_a_variable_come_first_too(
    printed: Started, stand_in: Callable[..., str], moe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_ARG_OVERRIDE_TENSOR", "a=CPU")
    shown = printed(stand_in("llama-server"), "-m", moe)
    assert shown["arguments"][2:4] == ["-ot", f"a=CPU,{OURS}"]
    assert shown["unset"] == ["LLAMA_ARG_OVERRIDE_TENSOR"]
    # Both given: llama.cpp reads the variable first.
    shown = printed(stand_in("llama-server"), "-m", moe, "-ot", "b=CPU")
    assert shown["arguments"][2:4] == ["-ot", f"b=CPU,{OURS}"] and shown["unset"] == []


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ("exps=CUDA0", ("keeps experts of 2 of 2 layers from",)),
        (r"blk\.0\..*_exps\.=CUDA0", ("keeps experts of 1 of 2 layers from",)),
        # The CPU's memory is the plug-in's.
        ("exps=CPU", ("=CPU changes nothing for experts of 2 of 2 layers",)),
        # The first pattern that matches decides.
        (r"blk\.0\.=CPU,exps=CUDA0", ("keeps experts of 1 of 2", "nothing for experts of 1 of 2")),
        ("exps=HybriMoE,exps=CUDA0", ()),
        ("attn_q=CPU", ()),
        ("(=CPU", ()),
    ],
)
def test_overrides_of_experts_are_told(
    printed: Started,
    stand_in: Callable[..., str],
    moe: str,
    monkeypatch: pytest.MonkeyPatch,
    rules: str,
    says: tuple[str, ...],
) -> None:
    given = f"output=CPU,{rules}"
    shown = printed(stand_in("llama-server"), "-m", moe, "-ot", given)["notes"]
    bench = printed(stand_in("llama-bench", BENCH_HELP), "-m", moe, "-ot", given.replace(",", ";"))["notes"]
    monkeypatch.setenv("LLAMA_ARG_OVERRIDE_TENSOR", given)
    by_variable = printed(stand_in("llama-server"), "-m", moe)["notes"]
    for notes in (shown, bench, by_variable):
        assert len(notes) == len(says) and all(text in note for text, note in zip(says, notes, strict=True)), notes


def test_llama_bench(printed: Started, stand_in: Callable[..., str], moe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = stand_in("llama-bench", BENCH_HELP)
    monkeypatch.setenv("LLAMA_ARG_N_CPU_MOE", "2")  # it reads no such variable
    shown = printed(bench, "-m", moe, "-ub", "128,1024", "-fitt", "100", "-t", "1")
    assert shown["arguments"] == ["-m", moe, "-ub", "128,1024", "-t", "1", "-ot", OURS]
    assert shown["config"]["n_cpu_layers"] == 0 and shown["config"]["max_batch_tokens"] == 1024
    assert shown["unset"] == [] and len(shown["notes"]) == 1
    # Sets of overrides are separated by commas, overrides by semicolons: ours belong into every set.
    shown = printed(bench, "-m", moe, "-ot", "a=CPU;b=CPU,c=CPU", "-ot", ",d=CPU;")
    assert shown["arguments"][2:] == [
        "-ot", f"a=CPU;b=CPU;{OURS},c=CPU;{OURS}", "-ot", f"{OURS},d=CPU;{OURS}",
    ]  # fmt: skip


def test_several_models_share_no_models_settings(
    printed: Started, call: Call, stand_in: Callable[..., str], tiny_model: Callable[..., Path], moe: str, dense: str
) -> None:
    bench, other = stand_in("llama-bench", BENCH_HELP), str(tiny_model("qwen3moe"))
    config = printed(bench, "-m", f"{moe},{other}")["config"]
    assert config["costs"] is None and config["state_path"] == ""
    assert printed(bench, "-m", f"{moe},{moe}", "-m", moe)["config"]["state_path"]
    assert printed(bench, "-m", moe, "-m", dense)["config"]["state_path"]
    outcome = call("exec", "--print", "--calibration", "x.json", "--", bench, "-m", f"{moe},{other}")
    outcome.assert_two_lines(2)
    assert "2 models" in outcome.err
    call("exec", bench, "-m", moe, "-ncmoe", "1,2").assert_two_lines(2)


def test_a_draft_with_experts(
    printed: Started, stand_in: Callable[..., str], tiny_model: Callable[..., Path], moe: str, dense: str
) -> None:
    server, draft = stand_in("llama-server"), str(tiny_model("qwen3moe"))
    shown = printed(server, "-m", moe, "-md", draft)
    assert shown["arguments"][4:] == ["-ot", OURS, "-otd", OURS, "-fit", "off"]
    assert shown["config"]["state_path"] == ""
    shown = printed(server, "-m", moe, "-md", draft, "-otd", "a=CPU")
    assert shown["arguments"][4:6] == ["-otd", f"a=CPU,{OURS}"]
    # The CPU's memory is the plug-in's.
    shown = printed(server, "-m", moe, "-md", draft, "-cmoed")
    assert "-otd" in shown["arguments"] and shown["config"]["state_path"] == ""
    assert len(shown["notes"]) == 1 and "-cmoed changes nothing" in shown["notes"][0]
    without = "\n".join(line for line in SERVER_HELP.splitlines() if "-otd," not in line)
    shown = printed(stand_in("llama-cli", without), "-m", moe, "-md", draft)
    assert "-otd" not in shown["arguments"] and shown["config"]["state_path"] == ""
    shown = printed(server, "-m", moe, "-md", dense)
    assert "-otd" not in shown["arguments"] and shown["config"]["state_path"]
    shown = printed(server, "-m", dense, "-md", draft)
    assert "-ot" not in shown["arguments"] and "-otd" in shown["arguments"]
    # The model's own head for guessing ahead is a second instance.
    assert printed(server, "-m", moe, "--spec-type", "draft-mtp")["config"]["state_path"] == ""


def test_devices_are_the_programs(printed: Started, call: Call, stand_in: Callable[..., str], moe: str) -> None:
    server = stand_in("llama-server", devices=("CUDA0", "CUDA1"))
    assert printed("--device", "CUDA1", "--", server, "-m", moe)["config"]["devices"] == ["CUDA1"]
    assert printed(server, "-m", moe, "-dev", "CUDA0,CUDA1")["config"]["devices"] == ["CUDA0", "CUDA1"]
    assert printed(server, "-m", moe, "-dev", "none")["config"]["devices"] == []
    assert printed("--device", "CPU", "--", server, "-m", moe)["config"]["devices"] == ["CPU"]
    outcome = call("exec", "--device", "Vulkan0", "--", server, "-m", moe)
    outcome.assert_two_lines(2)
    assert "CUDA0, CUDA1" in outcome.err
    bench = stand_in("llama-bench", BENCH_HELP, devices=("CUDA0", "CUDA1"))
    assert printed(bench, "-m", moe, "-dev", "CUDA0/CUDA1")["config"]["devices"] == ["CUDA0", "CUDA1"]
    assert printed(bench, "-m", moe, "-dev", "CUDA0,CUDA1")["config"]["devices"] == "auto"


@pytest.mark.parametrize(
    ("flags", "theirs", "devices"),
    [
        ((), ("Card0",), ["Card0"]),
        ((), ("Card1",), None),
        ((), ("Card0", "Card1"), None),
        ((), (), None),
        (("--device", "Card0"), ("Card0", "Card1"), ["Card0"]),
    ],
)
def test_costs_hold_for_the_devices_that_were_measured(
    printed: Started,
    stand_in: Callable[..., str],
    moe: str,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    theirs: tuple[str, ...],
    devices: list[str] | None,
) -> None:
    from dataclasses import replace

    from hybrimoe.cli import exec, loading

    def measured(options: Any, model: Any) -> Any:
        return replace(options, experts=replace(options.experts, devices=("Card0",), costs={"devices": [1]}))

    monkeypatch.setattr(loading, "with_starting_costs", measured)
    monkeypatch.setattr(exec, "own_accelerators", lambda: ["Card0"])
    config = printed(*flags, "--", stand_in("llama-server", devices=theirs), "-m", moe)["config"]
    assert config["costs"] == ({"devices": [1]} if devices else None)
    assert config["devices"] == (devices or "auto")


def test_models_by_variable_and_from_the_hubs_cache(
    printed: Started, call: Call, stand_in: Callable[..., str], moe: str, clean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = stand_in("llama-server")
    snapshot = clean / "hub" / "models--user--repo" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    (snapshot / "x-Q8_0.gguf").symlink_to(moe)
    monkeypatch.setenv("HF_HUB_CACHE", str(clean / "hub"))
    assert printed(server, "-hf", "user/repo:Q8_0")["arguments"] == [
        "-hf",
        "user/repo:Q8_0",
        "-ot",
        OURS,
        "-fit",
        "off",
    ]
    outcome = call("exec", server, "-hf", "user/repo:Q4_K_M")
    outcome.assert_two_lines(3)
    assert "hybrimoe models pull user/repo:Q4_K_M" in outcome.err
    call("exec", server, "-mu", "https://example.org/x.gguf").assert_two_lines(3)
    call("exec", server, "-dr", "ai/x").assert_two_lines(2)
    monkeypatch.setenv("LLAMA_ARG_MODEL", moe)
    assert printed(server)["arguments"] == ["-ot", OURS, "-fit", "off"]
    monkeypatch.setenv("LLAMA_ARG_MODEL", "missing.gguf")
    call("exec", server).assert_two_lines(3)


def test_scripts_get_the_environment(
    printed: Started, stand_in: Callable[..., str], moe: str, dense: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = stand_in("start.sh")
    shown = printed(script, "-m", "whatever", "-cmoe")
    assert shown["arguments"] == ["-m", "whatever", "-cmoe"]
    assert shown["env"]["LLAMA_ARG_OVERRIDE_TENSOR"] == OURS and shown["env"]["LLAMA_ARG_FIT"] == "off"
    assert shown["config"]["state_path"] == "" and shown["config"]["costs"] is None
    assert len(shown["notes"]) == 1 and "start.sh" in shown["notes"][0]
    monkeypatch.setenv("LLAMA_ARG_OVERRIDE_TENSOR", "a=CPU")
    monkeypatch.setenv("LLAMA_ARG_MODEL", moe)
    shown = printed(script)
    assert shown["env"]["LLAMA_ARG_OVERRIDE_TENSOR"] == f"a=CPU,{OURS}"
    assert shown["config"]["state_path"]
    shown = printed("env", "LLAMA_ARG_OVERRIDE_TENSOR=b=CPU", "X=1", script)
    assert shown["env"]["LLAMA_ARG_OVERRIDE_TENSOR"] == f"b=CPU,{OURS}"
    assert shown["arguments"] == ["X=1", script]
    # A script may change the folder.
    monkeypatch.setenv("LLAMA_ARG_MODEL", "missing.gguf")
    assert printed(script)["config"]["state_path"] == ""
    monkeypatch.setenv("LLAMA_ARG_MODEL", dense)
    assert printed(script)["config"] is None


def test_a_server_without_a_model_hands_the_environment_on(printed: Started, stand_in: Callable[..., str]) -> None:
    shown = printed(stand_in("llama-server"), "--models-dir", "x", "-cmoe")
    assert shown["arguments"] == ["--models-dir", "x"]
    assert shown["env"]["LLAMA_ARG_OVERRIDE_TENSOR"] == OURS and shown["config"]["devices"] == []


def test_a_model_without_experts_starts_as_it_is(printed: Started, stand_in: Callable[..., str], dense: str) -> None:
    server = stand_in("llama-server")
    shown = printed(server, "-m", dense, "-cmoe", "-fit", "on")
    assert shown["command"] == [server, "-m", dense, "-cmoe", "-fit", "on"] and shown["env"] == {}
    assert len(shown["notes"]) == 1 and "no experts" in shown["notes"][0]


def test_questions_about_the_program_need_no_model(printed: Started, stand_in: Callable[..., str]) -> None:
    shown = printed(stand_in("llama-cli"), "--version", "--moe-cache-mib", "8")
    assert shown["arguments"] == ["--version", "--moe-cache-mib", "8"] and shown["env"] == {} and not shown["notes"]


def test_a_large_context_is_told(
    printed: Started, stand_in: Callable[..., str], moe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrimoe.hosts import launch

    monkeypatch.setattr(launch, "_LARGE_CONTEXT_BYTES", 1)
    server = stand_in("llama-server")
    assert any("without -c" in line for line in printed(server, "-m", moe)["notes"])
    for words in (("-c", "64"), ("-fit", "off")):
        assert not printed(server, "-m", moe, *words)["notes"]


def test_threads_of_a_kept_calibration(
    printed: Started, stand_in: Callable[..., str], moe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrimoe import cpu_threads
    from hybrimoe.machine import host

    n = host.n_physical_cores()

    def best(options: Any, model: Any) -> Any:
        from dataclasses import replace

        return options if options.n_threads is not None else replace(options, n_threads=n + 1, n_threads_batch=n + 2)

    monkeypatch.setattr(cpu_threads, "with_best_threads", best)
    server, bench = stand_in("llama-server"), stand_in("llama-bench", BENCH_HELP)
    shown = printed(server, "-m", moe)
    assert shown["arguments"][-4:] == ["-t", str(n + 1), "-tb", str(n + 2)] and len(shown["notes"]) == 1
    assert printed(bench, "-m", moe)["arguments"][-2:] == ["-t", str(n + 1)]
    assert printed(server, "-m", moe, "-t", "1")["arguments"][-2:] == ["-fit", "off"]
    monkeypatch.setenv("LLAMA_ARG_THREADS", "1")
    assert "-t" not in printed(server, "-m", moe)["arguments"]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ((), 2, "no program"),
        (("--",), 2, "no program"),
        (("--bogus", "--", "SERVER"), 2, "--bogus"),
        (("-m", "MODEL", "--", "SERVER"), 2, "-m"),
        (("--", "no-such-program"), 2, "no-such-program"),
        (("--", "MODEL"), 2, "is a model"),
        (("--", "CLI"), 2, "no model"),
        (("--", "BENCH"), 2, "no model"),
        (("--", "SERVER", "-m", "missing.gguf"), 3, "missing.gguf"),
        (("--", "SERVER", "-m", "MODEL", "-md", "missing.gguf"), 3, "missing.gguf"),
        (("--", "SERVER", "-m", "MODEL", "-hfd", "user/draft"), 3, "user/draft"),
        (("--", "SERVER", "--gpt-oss-20b-default"), 3, "--gpt-oss-20b-default"),
        (("--", "SERVER", "--fim-qwen-1.5b-default", "-m", "MODEL"), 3, "--fim-qwen-1.5b-default"),
        (("--", "SERVER", "-m"), 2, "-m of llama-server needs a value"),
        (("--", "SERVER", "-m", "MODEL", "-ot"), 2, "-ot of llama-server needs a value"),
        (("--", "SERVER", "-m", "MODEL", "--expert-cache", "8"), 2, "must come before"),
        (("--", "SERVER", "-m", "MODEL", "--cache-policy=lru"), 2, "must come before"),
        (("--", "SERVER", "-m", "MODEL", "--moe-cache-mib", "100"), 2, "--moe-cache-mib"),
        (("--", "SERVER", "-m", "MODEL", "-ncmoe", "x"), 2, "-ncmoe"),
        (("--", "OLD", "-m", "MODEL"), 5, "tensor overrides"),
        (("--", "MUTE", "-m", "MODEL"), 1, "--help"),
        (("--schedule", "x", "--", "SERVER", "-m", "MODEL"), 2, "--schedule"),
        (("--reproducible", "--prefetch", "none", "--", "SERVER", "-m", "MODEL"), 2, "--reproducible"),
    ],
)
def test_bad_input(
    call: Call, clean: Path, stand_in: Callable[..., str], moe: str, words: tuple[str, ...], code: int, says: str
) -> None:
    without = "\n".join(line for line in SERVER_HELP.splitlines() if "-ot," not in line)
    names = {
        "MODEL": moe,
        "SERVER": stand_in("llama-server"),
        "CLI": stand_in("llama-cli"),
        "BENCH": stand_in("llama-bench", BENCH_HELP),
        "OLD": stand_in("llama-completion", without),
        "MUTE": stand_in("llama-perplexity", ""),
    }
    outcome = call("exec", *(names.get(word, word) for word in words))
    outcome.assert_two_lines(code)
    assert says in outcome.err and "hint: " in outcome.err


@pytest.mark.parametrize("program", ["llama-server", "start.sh"])
@pytest.mark.parametrize(
    ("variable", "value"), [("GGML_BACKEND_PATH", "/x/libother.so"), ("LLAMA_ARG_MOE_CACHE_MIB", "64")]
)
def test_what_excludes_the_plug_in(
    call: Call,
    clean: Path,
    stand_in: Callable[..., str],
    moe: str,
    monkeypatch: pytest.MonkeyPatch,
    program: str,
    variable: str,
    value: str,
) -> None:
    path = stand_in(program)
    outcome = call("exec", "env", f"{variable}={value}", path, "-m", moe)
    outcome.assert_two_lines(2)
    assert variable in outcome.err
    monkeypatch.setenv(variable, value)
    call("exec", path, "-m", moe).assert_two_lines(2)


def test_flags_behind_the_program_are_its_own(call: Call, clean: Path, stand_in: Callable[..., str], moe: str) -> None:
    # '-v' is not ours there: no traceback of our error.
    server = stand_in("llama-server")
    call("exec", "--", server, "-v", "-m", "missing.gguf").assert_two_lines(3)
    call("exec", server, "-v", "-m", "missing.gguf").assert_two_lines(3)
    assert "Traceback" in call("exec", "-v", "--", server, "-m", "missing.gguf").err


def test_a_program_that_cannot_be_started(call: Call, clean: Path, stand_in: Callable[..., str], moe: str) -> None:
    path = Path(stand_in("start.sh"))
    path.write_text("#!/no/such/interpreter\n")
    outcome = call("exec", str(path))
    assert outcome.code == 1 and outcome.err.splitlines()[-2].startswith("error: cannot start")


def test_usual_wrappers_are_not_asked(
    printed: Started, stand_in: Callable[..., str], moe: str, clean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = stand_in("llama-server")
    wrapper = Path(stand_in("strace"))
    wrapper.write_text(f"#!/bin/sh\ntouch '{clean / 'traced'}'\n")
    shown = printed(str(wrapper), "-f", server, "-m", moe)
    assert shown["command"][:3] == [str(wrapper), "-f", server] and OURS in shown["command"]
    assert not (clean / "traced").exists()
    # One that is not known is: only it knows where the program is.
    wrapper = wrapper.rename(wrapper.with_name("run"))
    wrapper.write_text(f"#!/bin/sh\ntouch '{clean / 'asked'}'\nexec '{server}' \"$@\"\n")
    assert OURS in printed(str(wrapper), "llama-server", "-m", moe)["command"]
    assert (clean / "asked").exists()


def test_a_program_that_does_not_answer(
    call: Call, clean: Path, stand_in: Callable[..., str], moe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrimoe.hosts import help_page

    monkeypatch.setattr(help_page, "_PATIENCE_S", 0.3)
    path = Path(stand_in("llama-server"))
    # What it has started holds our pipe, and must end with it.
    path.write_text("#!/bin/sh\nsleep 300 &\nwait\n")
    outcome = call("exec", str(path), "-m", moe)
    outcome.assert_two_lines(1)
    assert "has not answered" in outcome.err


def test_whole_graphs(printed: Started, call: Call, stand_in: Callable[..., str], moe: str) -> None:
    """The devices that wrap the program's own are named, and the experts' weights alone are placed."""
    on_gpu = "ffn_.*_exps[.]weight=HybriMoE_Graph"
    listed = ["CUDA0", "CUDA1", "HybriMoE", "HybriMoE_Graph", "HybriMoE_CUDA0", "HybriMoE_CUDA1"]
    server = stand_in("llama-server", devices=listed)
    words = (server, "-m", moe)
    shown = printed("--front", "graph", *words)
    assert shown["command"] == [*words, "-dev", "HybriMoE_CUDA0,HybriMoE_CUDA1", "-ot", on_gpu, "-fit", "off"]
    assert shown["config"]["front"] == "graph"
    assert "-dev HybriMoE_CUDA1" in " ".join(printed("--front", "graph", *words, "-dev", "CUDA1")["command"])
    # A model of two layers: with the output two of three are on the GPU, and layer 0 is the CPU kernels'.
    partly = printed("--front", "graph", *words, "-ngl", "2")["command"]
    assert f"blk[.](0)[.]{OURS},{on_gpu}" in partly
    assert on_gpu in printed("--front", "graph", *words, "-ngl", "99")["command"]
    for refused in (("-sm", "row"), ("-dev", "CUDA7")):
        outcome = call("exec", "--front", "graph", *words, *refused)
        assert outcome.code == 2 and "hint:" in outcome.err, outcome
    outcome = call("exec", "--front", "graph", stand_in("llama-cli", devices=["CUDA0"]), "-m", moe)
    assert outcome.code == 2 and "has no GPU whose graphs could be taken" in outcome.err
