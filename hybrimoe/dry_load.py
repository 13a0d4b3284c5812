"""What llama.cpp itself would allocate for a model: it is loaded without its weights and without allocating anything.

llama.cpp's `no_alloc` builds model, context and graphs from the header alone and logs every buffer's size, in some
milliseconds, for every architecture it knows: grouped, latent and sliding-window attention, recurrent state. It ends
the process on some damaged files, so it runs in a child. Where weights are missing, the child gets a sparse copy of the
header (the length of the model, some kilobytes on the disk).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import HybrimoeError, ModelError
from hybrimoe.files import open_regular
from hybrimoe.last_words import wrong_cpu

if TYPE_CHECKING:
    from hybrimoe.gguf_model import GgufModel

__all__ = ["Buffers", "LlamaCrashError", "LoadShape", "dry_load"]

_TIMEOUT_S = 120
_MIB = 1 << 20
# Lines of the pinned llama.cpp: src/llama-kv-cache.cpp, llama-memory-recurrent.cpp, llama-context.cpp.
_MEMORY_SIZE = re.compile(r"^(llama_kv_cache\w*|llama_memory_recurrent): size = +([\d.]+) MiB")
_COMPUTE_SIZE = re.compile(r"^\w+: +(\S+) compute buffer size = +([\d.]+) MiB")
_GRAPH_NODES = re.compile(r"^sched_reserve: graph.*: nodes = (\d+)(?: / (\d+))?")
_OUTPUT_SIZE = re.compile(r"^\w+: +(\S+) +output buffer size = +([\d.]+) MiB")
# ggml's macros and the C++ library, without the path of the source in front.
_LAST_WORD = re.compile(r"[\w.-]+\.(?:c|cpp|h):\d+: .*|what\(\): .*")


class LlamaCrashError(HybrimoeError):
    """llama.cpp ended the process that asked it, or did not come to an end; `reason` is its last word."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"llama.cpp could not be asked for its buffers: {reason}", "hybrimoe doctor")
        self.reason = reason


@dataclass(frozen=True)
class LoadShape:
    """How the model would be loaded. KV types are names as `-ctk` takes them."""

    n_ctx: int
    n_batch: int = 2048
    n_ubatch: int = 512
    n_gpu_layers: int = 0
    flash_attn: str = "auto"
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    plugin: bool = False


@dataclass(frozen=True)
class Buffers:
    """Bytes that llama.cpp allocates besides the weights. `compute_bytes` is by buffer type."""

    kv_bytes: int
    recurrent_bytes: int
    output_bytes: int
    compute_bytes: Mapping[str, int] = field(default_factory=dict)
    swa_full: bool = True
    n_graph_nodes: int = 0

    @property
    def memory_bytes(self) -> int:
        """KV cache and recurrent state."""
        return self.kv_bytes + self.recurrent_bytes

    @property
    def all_compute_bytes(self) -> int:
        return sum(self.compute_bytes.values())


def dry_load(model: GgufModel, shape: LoadShape) -> Buffers:
    """Asks llama.cpp. `model` may come from headers alone.

    Raises ModelError when llama.cpp refuses the model, LlamaCrashError when it dies of it, PluginError when it is not
    for this CPU, HybrimoeError when it cannot be asked (not installed, no room for a sparse file).
    """
    if all(t.offset + t.n_bytes <= _file_bytes(t.path) for t in model.tensors):
        return _in_child(model.path, shape)
    try:
        with tempfile.TemporaryDirectory(prefix="hybrimoe-plan-") as folder:
            return _in_child(_sparse_copy(model, Path(folder)), shape)
    except OSError as error:
        raise HybrimoeError(f"no temporary copy of the header can be written: {error}", "set TMPDIR") from error


def _file_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _sparse_copy(model: GgufModel, folder: Path) -> Path:
    from hybrimoe.gguf_header import read_header

    for part in model.parts:
        header = read_header(part)
        end = max((t.offset + t.n_bytes for t in header.tensors), default=header.data_offset)
        copy = folder / part.name
        with open_regular(part) as source, copy.open("wb") as target:
            target.write(source.read(header.data_offset))
        os.truncate(copy, -(-end // 64) * 64)
    return folder / model.parts[0].name


def _in_child(path: Path, shape: LoadShape) -> Buffers:
    request = json.dumps({"path": str(path), **asdict(shape)})
    command = [sys.executable, "-m", "hybrimoe.dry_load"]
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise LlamaCrashError(f"it did not come to an end within {_TIMEOUT_S} s") from error
    except OSError as error:
        raise HybrimoeError(f"llama.cpp could not be asked for its buffers: {error}", "hybrimoe doctor") from error
    if done.returncode == -signal.SIGILL:
        raise wrong_cpu()
    if done.returncode < 0:
        raise LlamaCrashError(_last_word(done.stderr, done.returncode))
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise HybrimoeError(
            f"llama.cpp could not be asked for its buffers (it ended with {done.returncode})", "hybrimoe doctor"
        ) from None
    if "error" in answer:
        raise ModelError(f"llama.cpp cannot load '{path.name}': {answer['error']}", "hybrimoe models show")
    return Buffers(**answer)


def _last_word(text: str, returncode: int) -> str:
    """What a process that a signal ended said: ggml's assertion, else the signal's name."""
    for line in text.splitlines():
        if match := _LAST_WORD.search(line):
            return match[0].strip()
    with contextlib.suppress(ValueError):
        return f"ended by {signal.Signals(-returncode).name}"
    return f"ended by signal {-returncode}"


# In the child.


def _serve(request: dict[str, Any]) -> dict[str, Any]:
    import llama_cpp

    from hybrimoe.engine import KV_TYPES
    from hybrimoe.llama_seam import FLASH_ATTENTION, LOAD_MODES
    from hybrimoe.placement import MOE_PATTERN, buffer_types, override_array

    text: list[str] = []

    def on_log(_level: int, line: bytes, _data: Any) -> None:
        text.append(line.decode("utf-8", "replace"))

    callback = llama_cpp.llama_log_callback(on_log)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    rules: list[tuple[str, int]] = []
    if request["plugin"]:
        from hybrimoe.native.plugin import load_plugin

        rules.append((MOE_PATTERN, load_plugin().buffer_type))
    elif request["n_gpu_layers"]:
        rules.append((MOE_PATTERN, buffer_types()["CPU"]))
    overrides = override_array(rules)
    model_params = llama_cpp.llama_model_default_params()
    model_params.no_alloc = True
    model_params.load_mode = LOAD_MODES["none"]
    model_params.use_extra_bufts = False
    model_params.n_gpu_layers = request["n_gpu_layers"]
    model_params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    model = llama_cpp.llama_model_load_from_file(request["path"].encode(), model_params)
    if not model:
        return {"error": _reason(text)}
    params = llama_cpp.llama_context_default_params()
    for name in ("n_ctx", "n_batch", "n_ubatch"):
        setattr(params, name, request[name])
    params.type_k = KV_TYPES[request["cache_type_k"]][0]
    params.type_v = KV_TYPES[request["cache_type_v"]][0]
    params.flash_attn_type = FLASH_ATTENTION[request["flash_attn"]]
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        return {"error": _reason(text)}
    return {**_sizes(text), "swa_full": bool(params.swa_full)}


def _reason(text: list[str]) -> str:
    lines = [line for line in "".join(text).splitlines() if "error" in line.lower() or "fail" in line.lower()]
    return re.sub(r"^[\w:~<>]+: ", "", lines[0]) if lines else "no reason given"


def _sizes(text: list[str]) -> dict[str, Any]:
    kv = recurrent = output = 0.0
    n_nodes = 0
    compute: dict[str, int] = {}
    for line in "".join(text).splitlines():
        if match := _MEMORY_SIZE.match(line):
            if match[1] == "llama_memory_recurrent":
                recurrent += float(match[2])
            else:
                kv += float(match[2])
        elif match := _COMPUTE_SIZE.match(line):
            # Reserved more than once where flash attention was tried first: the last line holds.
            compute[match[1]] = int(float(match[2]) * _MIB)
        elif match := _OUTPUT_SIZE.match(line):
            output += float(match[2])
        elif match := _GRAPH_NODES.match(line):
            n_nodes = int(match[2] or match[1])  # prompt / token
    return {
        "kv_bytes": int(kv * _MIB),
        "recurrent_bytes": int(recurrent * _MIB),
        "output_bytes": int(output * _MIB),
        "compute_bytes": compute,
        "n_graph_nodes": n_nodes,
    }


if __name__ == "__main__":
    print(json.dumps(_serve(json.load(sys.stdin))))
