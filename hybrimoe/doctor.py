"""What this machine and installation can do, what is wrong, and the mend for it. Everything is tried, not guessed."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from hybrimoe.errors import EXIT_OK, HybrimoeError, ModelError, PluginError
from hybrimoe.host_checks import host_findings, models_folder
from hybrimoe.machine import host

# enum ggml_backend_dev_type (ggml-backend.h)
_DEVICE_KINDS = {0: "CPU", 1: "GPU", 2: "integrated GPU", 3: "accelerator", 4: "meta"}
_RUN_TIMEOUT_S = 300
_LOW_MEMORY_BYTES = 2 << 30
_LOW_LOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Finding:
    """`level`: 'ok', 'note', 'warning' or 'error'. `exit_code` is what an error makes of the command's end."""

    level: str
    topic: str
    message: str
    mend: str = ""
    exit_code: int = EXIT_OK


@dataclass
class Diagnosis:
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    backends: list[dict[str, str]] = field(default_factory=list)
    plugin: dict[str, Any] = field(default_factory=dict)
    demo: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return next((f.exit_code for f in self.findings if f.level == "error"), EXIT_OK)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.exit_code == EXIT_OK, **asdict(self)}


def diagnose(*, run: bool = True) -> Diagnosis:
    """Examines everything. `run` False leaves out the run of the demo model, which takes some seconds."""
    diagnosis = Diagnosis()
    _examine_machine(diagnosis)
    diagnosis.findings += host_findings(models_folder())
    _examine_versions(diagnosis)
    if _examine_llama(diagnosis):
        _examine_gpus(diagnosis)
        if _examine_plugin(diagnosis) and run:
            _run_demo(diagnosis)
    return diagnosis


def _examine_machine(d: Diagnosis) -> None:
    cpu, memory = host.cpu(), host.memory()
    d.machine = {
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "cpu": cpu.name,
        "n_cores": cpu.n_cores,
        "n_threads": cpu.n_threads,
        "vector_level": cpu.level,
        "memory_bytes": memory.total_bytes,
        "memory_available_bytes": memory.available_bytes,
        "memory_limit_bytes": memory.limit_bytes,
        "lock_limit_bytes": _lock_limit(),
        "gpus": [asdict(gpu) for gpu in host.gpus()],
    }
    if cpu.level in ("AVX", "SSE 4.2", "unknown"):
        d.findings.append(
            Finding("warning", "cpu", f"this CPU has no AVX2 ({cpu.level}): expect little speed", "use another machine")
        )
    if memory.available_bytes < _LOW_MEMORY_BYTES:
        gib = memory.available_bytes / 2**30
        d.findings.append(
            Finding("warning", "memory", f"only {gib:.1f} GiB of memory are free", "close other programs")
        )
    if memory.limit_bytes is not None and memory.limit_bytes < memory.total_bytes:
        gib, all_gib = memory.limit_bytes / 2**30, memory.total_bytes / 2**30
        text = f"a control group limits this process to {gib:.1f} of {all_gib:.1f} GiB"
        d.findings.append(Finding("note", "memory", text, "raise the container's memory limit if models do not fit"))
    lock = d.machine["lock_limit_bytes"]
    if lock is not None and lock < _LOW_LOCK_BYTES:
        text = "this process may lock almost no memory: --load-mode mlock will not work"
        d.findings.append(Finding("note", "memory", text, "ulimit -l unlimited (or /etc/security/limits.conf)"))


def _lock_limit() -> int | None:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _examine_versions(d: Diagnosis) -> None:
    import hybrimoe

    d.versions = {"hybrimoe": hybrimoe.__version__}
    for package in ("llama-cpp-python", "gguf", "numpy"):
        try:
            d.versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            mend = f"pip install {package}"
            d.findings.append(Finding("error", "installation", f"the package {package} is missing", mend, 1))


def _examine_llama(d: Diagnosis) -> bool:
    mend = "pip install --force-reinstall --no-cache-dir llama-cpp-python"
    try:
        import llama_cpp

        from hybrimoe.llama_log import llama_log
        from hybrimoe.llama_seam import has_faulty_amx
        from hybrimoe.native.plugin import ggml_library

        code = "import llama_cpp; llama_cpp.llama_backend_init(); llama_cpp.llama_supports_gpu_offload()"
        _try_in_child(code, "llama.cpp crashes when it is started", mend)
        llama_log()
        llama_cpp.llama_backend_init()
        ggml = ggml_library()
    except PluginError as error:
        d.findings.append(Finding("error", "llama.cpp", error.message, error.hint, error.exit_code))
        return False
    except Exception as error:
        d.findings.append(Finding("error", "llama.cpp", f"llama-cpp-python cannot be loaded: {error}", mend, 5))
        return False
    d.versions["ggml"] = ggml.ggml_version().decode()
    d.machine["gpu_offload"] = bool(llama_cpp.llama_supports_gpu_offload())
    if has_faulty_amx():
        text = "llama.cpp was built with its AMX path, which crashes on some machines: dense weights are not repacked"
        package = f"llama-cpp-python=={d.versions['llama-cpp-python']}"
        mend = f"CFLAGS=-U__AMX_INT8__ CXXFLAGS=-U__AMX_INT8__ pip install --force-reinstall --no-cache-dir {package}"
        d.findings.append(Finding("note", "llama.cpp", text, mend))
    _list_backends(d, ggml)
    return True


def _list_backends(d: Diagnosis, ggml: ctypes.CDLL) -> None:
    d.backends = []
    for index in range(ggml.ggml_backend_dev_count()):
        device = ggml.ggml_backend_dev_get(index)
        kind = ggml.ggml_backend_dev_type(device)
        d.backends.append(
            {
                "name": ggml.ggml_backend_dev_name(device).decode("utf-8", "replace"),
                "description": ggml.ggml_backend_dev_description(device).decode("utf-8", "replace"),
                "kind": _DEVICE_KINDS.get(kind, "other"),
            }
        )


def _examine_gpus(d: Diagnosis) -> None:
    if d.machine["gpu_offload"]:
        cards = [b for b in d.backends if "GPU" in b["kind"]]
        text = ", ".join(f"{b['name']} ({b['description']})" for b in cards)
        if cards:
            d.findings.append(Finding("ok", "gpu", f"llama.cpp can use {text}"))
        else:
            text = "llama-cpp-python has GPU support, but finds no card"
            d.findings.append(Finding("warning", "gpu", text, "check the driver: nvidia-smi or vulkaninfo"))
        return
    notable = host.notable_gpu()
    for gpu in host.gpus():
        # A processor's own graphics is no loss; a card is.
        level = "warning" if notable is not None and notable.kind == gpu.kind else "note"
        text = f"{gpu.name} is present, but this llama-cpp-python was built without GPU support: it is not used"
        d.findings.append(Finding(level, "gpu", text, gpu.build_command))


def _examine_plugin(d: Diagnosis) -> bool:
    from hybrimoe.native.plugin import ABI_VERSION, library_path, load_plugin

    try:
        d.plugin["path"] = str(library_path())
        # Loading may end the process when the library does not match: another process tries it first.
        code = "from hybrimoe.native.plugin import load_plugin; load_plugin()"
        _try_in_child(code, "the plug-in crashes when it is loaded", _reinstall())
        plugin = load_plugin()
    except HybrimoeError as error:
        d.plugin["loaded"] = False
        d.findings.append(Finding("error", "plug-in", error.message, error.hint, error.exit_code))
        return False
    d.plugin |= {
        "loaded": True,
        "version": plugin.version,
        "abi": ABI_VERSION,
        "compiled_for_ggml": plugin.ggml_version,
    }
    d.versions["plug-in"] = plugin.version
    from hybrimoe.native.plugin import ggml_library

    _list_backends(d, ggml_library())
    d.findings.append(Finding("ok", "plug-in", f"loaded {plugin.path}"))
    return True


def _try_in_child(code: str, failure: str, mend: str) -> None:
    """Raises PluginError when a signal ends the child: `failure`, unless the cause is a llama.cpp for another CPU."""
    from hybrimoe.last_words import wrong_cpu

    done = _child([sys.executable, "-c", code], dict(os.environ))
    if done.returncode == -signal.SIGILL:
        raise wrong_cpu()
    if done.returncode < 0:
        raise PluginError(f"{failure} ({_signal(done.returncode)})", mend)


def _child(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        timeout=_RUN_TIMEOUT_S,
        check=False,
        env=environment,
    )


def _reinstall() -> str:
    from hybrimoe.native.plugin import REINSTALL_HINT

    return REINSTALL_HINT


def _signal(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _run_demo(d: Diagnosis) -> None:
    """Whether experts really run in the plug-in: the demo model answers in a process of its own."""
    from hybrimoe.models import store

    path = store.models_dir() / f"{store.DEMO_NAME}.gguf"
    if not path.is_file():
        d.demo = {"built": False}
        d.findings.append(
            Finding("note", "demo", "the demo model is not built: nothing was run", "hybrimoe models build demo")
        )
        return
    d.demo = {"built": True, "path": str(path)}
    try:
        d.demo |= run_model(path)
    except HybrimoeError as error:
        d.findings.append(Finding("error", "demo", error.message, error.hint, error.exit_code))
        return
    if d.demo["verified"]:
        text = f"the demo model ran: all {d.demo['n_moe_layers']} MoE layers in the plug-in, {d.demo['speed']}"
        d.findings.append(Finding("ok", "demo", text))
    else:
        d.findings.append(Finding("error", "demo", d.demo["message"] or "the plug-in did not run", _reinstall(), 5))


def run_model(path: Path) -> dict[str, Any]:
    """Lets the model at `path` answer with 8 tokens in a process of its own; what came of it.

    Raises HybrimoeError when the process fails or crashes.
    """
    command = [sys.executable, "-m", "hybrimoe.cli.main", "run", "-m", str(path), "--json", "-n", "8", "--temp", "0"]
    command += ["-c", "512", "-p", "The capital of France is"]
    # The user's settings must not decide whether the installation is sound.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_ARG_")}
    environment["XDG_CONFIG_HOME"] = os.devnull
    try:
        done = _child(command, environment)
    except subprocess.TimeoutExpired:
        raise HybrimoeError(f"'{path.name}' did not answer within {_RUN_TIMEOUT_S} s", "hybrimoe run -v") from None
    if done.returncode < 0:
        raise PluginError(f"running '{path.name}' crashes ({_signal(done.returncode)})", "hybrimoe run -v --no-plugin")
    if done.returncode != EXIT_OK:
        lines = done.stderr.strip().splitlines() or ["no message"]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        kind = {3: ModelError, 5: PluginError}.get(done.returncode, HybrimoeError)
        raise kind(f"running '{path.name}' fails: {(errors or lines)[-1]}", "hybrimoe run -v")
    report = json.loads(done.stdout)
    speed = report["timings"]["generation_per_s"]
    return {
        "answer": report["answer"],
        "verified": report["plugin"]["verified"],
        "message": report["plugin"]["message"],
        "n_moe_layers": report["experts"]["n_moe_layers"],
        "n_blocks": report["experts"]["totals"]["n_blocks"],
        "n_blocks_delegated": report["experts"]["totals"]["n_blocks_delegated"],
        "generation_per_s": speed,
        "speed": "-" if speed is None else f"{speed:.1f} t/s",
    }
