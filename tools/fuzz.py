#!/usr/bin/env python3
"""Coverage-guided fuzzing of everything that reads what others wrote: atheris for Python, libFuzzer for C++.

Every target begins with the seeds of tests/fuzz (or of native/tests/fuzz). Findings are kept below build/fuzz, with the
command that repeats them. Where atheris or clang is missing, its targets are left out with a message.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "fuzz"
NATIVE = ("settings", "state", "route_trace", "costs", "trace_ring")
PYTHON = (
    "gguf", "gguf-split", "trace", "route-csv", "layer-csv", "moe-beyond-csv", "npz", "calibration", "config",
    "machine", "machine-changes", "costs", "chat", "http",
)  # fmt: skip
_CLANGS = ("clang++", *(f"clang++-{n}" for n in range(22, 12, -1)))
# What libFuzzer prints at its end (-print_final_stats=1).
_EXECUTIONS = re.compile(r"stat::number_of_executed_units:\s+(\d+)")
_PROGRESS = re.compile(r"^#(\d+)\t", re.MULTILINE)
_COVERAGE = re.compile(r"cov: (\d+)")


@dataclass(frozen=True)
class Outcome:
    """What a run of one target gave. `n_findings`: inputs that crash, hang or use too much memory."""

    target: str
    engine: str
    executions: int
    coverage: int
    n_findings: int


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, metavar="N", help="per target (default: %(default)s)")
    parser.add_argument("--target", action="append", metavar="NAME", help="one target, may be repeated (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="of the engines (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a target instead of the table")
    parser.add_argument("--list", action="store_true", help="list the targets and stop")
    parser.add_argument("--worker", metavar="NAME", help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args(argv)
    names = [*(f"native-{name}" for name in NATIVE), *PYTHON]
    if options.worker:
        return _worker(options.worker, rest)
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if options.list:
        print("\n".join(names))
        return 0
    chosen = options.target or names
    if unknown := [name for name in chosen if name not in names]:
        print(f"error: unknown target '{unknown[0]}'\nhint: tools/fuzz.py --list", file=sys.stderr)
        return 2
    outcomes = []
    native = [name for name in chosen if name.startswith("native-")]
    if native and (folder := _build_native()):
        outcomes += [_fuzz_native(folder, name.removeprefix("native-"), options) for name in native]
    python = [name for name in chosen if name in PYTHON]
    if python and importlib.util.find_spec("atheris") is None:
        print("left out: the Python targets, atheris is not installed (pip install atheris)", file=sys.stderr)
        python = []
    outcomes += [_fuzz_python(name, options) for name in python]
    _report(outcomes, as_json=options.json)
    return 1 if any(outcome.n_findings for outcome in outcomes) else 0


def _report(outcomes: Sequence[Outcome], *, as_json: bool) -> None:
    if as_json:
        for outcome in outcomes:
            print(json.dumps(asdict(outcome)))
        return
    print("| target | engine | executions | coverage | findings |\n|---|---|---|---|---|")
    for o in outcomes:
        print(f"| {o.target} | {o.engine} | {o.executions} | {o.coverage} | {o.n_findings} |")


def _run(name: str, engine: str, command: Sequence[str], environment: dict[str, str], seconds: int) -> Outcome:
    """Runs a fuzzer in its folder and reads what it says at its end."""
    folder = BUILD / name
    found = folder / "findings"
    found.mkdir(parents=True, exist_ok=True)
    print(f"{name}: {seconds} s with {engine}", file=sys.stderr, flush=True)
    log = folder / "log"
    before = set(found.iterdir())
    with log.open("wb") as out:
        code = subprocess.run(
            [*command, f"-artifact_prefix={found}/", f"-max_total_time={seconds}"],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_WAIT_POLICY": "passive", **environment},
            cwd=folder,
        ).returncode
    text = log.read_text(errors="replace")
    n_new = len(set(found.iterdir()) - before)
    if code != 0:
        print(f"{name}: ended with {code}, see {log.relative_to(ROOT)}", file=sys.stderr)
        print("\n".join(text.splitlines()[-25:]), file=sys.stderr)
        n_new = max(n_new, 1)
    executions = _EXECUTIONS.findall(text) or _PROGRESS.findall(text)  # the latter of one that a finding ended
    coverage = _COVERAGE.findall(text)
    return Outcome(name, engine, int(executions[-1]) if executions else 0, int(coverage[-1]) if coverage else 0, n_new)


# C++


def _build_native() -> Path | None:
    """Builds the libFuzzer programs with address and undefined-behaviour sanitizers; None where clang is missing."""
    compiler = next((path for name in _CLANGS if (path := shutil.which(name))), None)
    if compiler is None:
        print("left out: the native targets, clang++ is not installed (apt install clang)", file=sys.stderr)
        return None
    sys.path.insert(0, str(ROOT / "tools"))
    from test_native import tool

    build = BUILD / "native"
    configure = [
        tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        f"-DCMAKE_CXX_COMPILER={compiler}", f"-DCMAKE_C_COMPILER={compiler.replace('clang++', 'clang')}",
        "-DHYBRIMOE_TESTS=ON", "-DHYBRIMOE_FUZZ=ON", "-DHYBRIMOE_KERNELS_SCALAR_ONLY=ON",
        "-DHYBRIMOE_SANITIZE=address,undefined,float-cast-overflow,fuzzer-no-link",
        f"-DPython3_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    for command in (configure, [tool("cmake"), "--build", str(build), "--target", "fuzz_programs", "-j", "2"]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            print(done.stdout[-6000:], file=sys.stderr)
            print("error: the fuzz targets cannot be built\nhint: the compiler's message is above", file=sys.stderr)
            raise SystemExit(1)
    return build / "native" / "tests" / "fuzz"


def _fuzz_native(programs: Path, name: str, options: argparse.Namespace) -> Outcome:
    folder = BUILD / f"native-{name}"
    for inside in ("seeds", "corpus"):
        (folder / inside).mkdir(parents=True, exist_ok=True)
    program = str(programs / f"libfuzzer_{name}")
    environment = {
        "HYBRIMOE_FUZZ_SEEDS": str(folder / "seeds"),
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "ASAN_OPTIONS": "detect_leaks=1",
    }
    # Once for the seeds alone, which it writes before it reads its corpus.
    subprocess.run([program, "-runs=0"], env={**os.environ, **environment}, capture_output=True, check=True)
    command = [program, "corpus", "seeds", "-print_final_stats=1", f"-seed={options.seed}", "-timeout=20"]
    return _run(f"native-{name}", "libFuzzer", [*command, "-max_len=4096"], environment, options.seconds)


# Python


def _fuzz_python(name: str, options: argparse.Namespace) -> Outcome:
    folder = BUILD / name
    for inside in ("seeds", "corpus"):
        (folder / inside).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", name, "corpus", "seeds"]
    command += ["-print_final_stats=1", f"-seed={options.seed}", "-timeout=20", "-rss_limit_mb=2048", "-max_len=65536"]
    return _run(name, "atheris", command, {}, options.seconds)


def _import_from_checkout() -> None:
    """The finder of an editable installation loads modules itself, past the instrumentation: it has to go."""
    spec = importlib.util.find_spec("hybrimoe")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    for variable, library in (("HYBRIMOE_CORE_LIB", "libhybrimoe-core.so"), ("HYBRIMOE_PLUGIN", "libggml-hybrimoe.so")):
        for folder in folders:
            if (path := Path(folder) / "native" / library).is_file():
                os.environ.setdefault(variable, str(path))
    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__name__.startswith("ScikitBuild")]
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]


def _worker(name: str, arguments: Sequence[str]) -> int:
    """In the process that fuzzes one Python target: `arguments` are libFuzzer's."""
    atheris = importlib.import_module("atheris")

    _import_from_checkout()
    with atheris.instrument_imports(include=["hybrimoe"]):
        kinds = importlib.import_module("fuzz.targets")
        targets = kinds.make_targets(kinds.make_seeds(BUILD / "shared"))
        targets["http"] = importlib.import_module("fuzz.http_target").make()
    target = targets[name]
    for number, case in enumerate(target.seeds):
        (Path("seeds") / f"seed-{number}").write_bytes(case.data)
    # Of a model the header is what is read; weights are a hole at the end of the file.
    n_zeros = 2 << 20 if target.suffix == ".gguf" else 0
    scratch = Path("scratch")
    scratch.mkdir(exist_ok=True)
    path = scratch / f"input{target.suffix}"
    # A structured input each time is worth more than many that fail at the first byte.
    import random

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.4:
            made = target.mutate(rng)
            if len(made.data) <= max_size:
                return bytes(made.data)
        return bytes(atheris.Mutate(data, max_size))

    def one_input(data: bytes) -> None:
        kinds.Case(data, n_zeros).write(path)
        target.run(path)

    atheris.Setup([sys.argv[0], *arguments], one_input, custom_mutator=mutate)
    with contextlib.suppress(KeyboardInterrupt):
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
