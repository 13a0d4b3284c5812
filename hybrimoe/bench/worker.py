"""One way of running a model, in a process of its own: loads it once, then measures what it is asked for.

`python -m hybrimoe.bench.worker JSON` with the keys of `WorkerOptions`; requests and replies are lines of JSON. A row
of plain llama.cpp comes from a process that never loaded the plug-in: once loaded, it stands among ggml's devices.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe.bench.cases import Setup, Test
from hybrimoe.bench.rows import COMMIT_PREFIX
from hybrimoe.errors import HybrimoeError

if TYPE_CHECKING:
    from hybrimoe.engine import Engine, EngineOptions

__all__ = ["OURS_ONLY", "WorkerOptions", "engine_options", "main"]

# Fields of Setup that llama.cpp knows nothing of.
OURS_ONLY = ("expert_cache", "cache_policy", "schedule", "prefetch", "admission")
_DEVICE_NAME = "HybriMoE"


@dataclass(frozen=True)
class WorkerOptions:
    """`setup` as a dict; `n_cpu_moe` overrides its value for plain llama.cpp; `n_ctx` holds the longest test."""

    setup: dict[str, Any]
    plugin: bool
    n_ctx: int
    prompt_source: str
    n_stream: int
    n_cpu_moe: int | None = None
    guard: bool = True
    fit_margin_bytes: int = 1 << 30
    calibration: str | None = None
    pin_experts: bool = False
    state_dir: str | None = None
    reproducible: bool = False
    trace: str | None = None
    verbose: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def engine_options(options: WorkerOptions) -> EngineOptions:
    """How the engine is made for these options."""
    from hybrimoe.engine import EngineOptions
    from hybrimoe.expert_options import CacheSize, ExpertOptions
    from hybrimoe.placement import Placement

    s = Setup(**options.setup)
    n_cpu_moe = s.n_cpu_moe if options.n_cpu_moe is None else options.n_cpu_moe
    names = None if s.device is None else tuple(n for n in s.device.split("/") if n not in ("", "none"))
    return EngineOptions(
        n_ctx=options.n_ctx,
        n_batch=s.n_batch,
        n_ubatch=s.n_ubatch,
        n_threads=s.n_threads,
        n_gpu_layers=s.n_gpu_layers,
        flash_attn=s.flash_attn,
        cache_type_k=s.type_k,
        cache_type_v=s.type_v,
        load_mode=s.load_mode,
        repack=s.repack,
        placement=Placement(tuple(filter(None, s.overrides.split(";"))), n_cpu_moe < 0, max(0, n_cpu_moe)),
        plugin=options.plugin,
        experts=ExpertOptions(
            cache=CacheSize.parse(s.expert_cache),
            devices=names,
            cache_policy=s.cache_policy,
            schedule=s.schedule,
            prefetch=s.prefetch,
            admission=s.admission,
            guard=options.guard,
            fit_margin_bytes=options.fit_margin_bytes,
            pin_experts=options.pin_experts,
            calibration=None if options.calibration is None else Path(options.calibration),
            state_dir=None if options.state_dir is None else Path(options.state_dir),
            reproducible=options.reproducible,
        ),
        trace=None if options.trace is None else Path(options.trace),
    )


class Worker:
    """A loaded model with its tokens. Times are of `llama_decode` and the wait for its result, nothing else."""

    def __init__(self, options: WorkerOptions) -> None:
        from hybrimoe.decoding import Decoder
        from hybrimoe.engine import Engine
        from hybrimoe.llama_log import llama_log

        self.options = options
        llama_log().verbose = options.verbose
        self.setup = Setup(**options.setup)
        self.engine: Engine = Engine(self.setup.model, engine_options(options))
        self._decoder = Decoder(self.engine)
        self._stream = self._tokens()
        self._state: tuple[int, ctypes.Array[ctypes.c_uint8]] | None = None

    def _tokens(self) -> list[int]:
        from hybrimoe.bench.tokens import token_stream

        o = self.options
        return token_stream(o.prompt_source, o.n_stream, self._decoder.tokenize, self.engine.n_vocab())

    def facts(self) -> dict[str, Any]:
        """About machine, build and model, as llama-bench's fields name them."""
        import llama_cpp

        model = self.engine._model.model
        text = ctypes.create_string_buffer(128)
        llama_cpp.llama_model_desc(model, text, len(text))
        source = self.options.prompt_source
        return {
            **device_facts(),
            **build_facts(self.engine if self.options.plugin else None),
            "model_type": text.value.decode("utf-8", "replace"),
            "model_size": int(llama_cpp.llama_model_size(model)),
            "model_n_params": int(llama_cpp.llama_model_n_params(model)),
            "n_layers": self.engine.info.n_layers,
            "prompt_source": source if source in ("corpus", "random") else f"file:{Path(source).name}",
            "placement": self._placement(),
            "warning": "" if self.engine.verification is None else self.engine.verification.message(),
        }

    def _placement(self) -> str:
        """What a row of plain llama.cpp is called: with the -ncmoe that was chosen for it."""
        chosen = self.options.n_cpu_moe
        return "llama.cpp" if chosen is None else f"llama.cpp -ncmoe {chosen}"

    def run(self, test: Test, repetition: int) -> dict[str, Any]:
        """One repetition; nanoseconds of the test's decode calls, and until the first token's logits were there."""
        self._decoder.clear()
        if self.engine.recorder is not None:
            self.engine.recorder.begin_prompt()
        depth = test.n_depth
        self._fill(depth)
        # Each repetition reads on in the text, or a cache would know it by heart.
        start = depth + (repetition * test.n_tokens) % max(1, len(self._stream) - test.n_ctx + 1)
        tokens = self._stream[start : start + test.n_tokens]
        if depth == 0:
            tokens = self._decoder.with_beginning(tokens)
        self.engine.reset_counters()
        before = self._prefetch_used()
        prompt_ns = self._decoder.prompt(tokens[: test.n_prompt])
        generated = list(self._decoder.one_by_one(tokens[test.n_prompt :]))
        first = prompt_ns if test.n_prompt else generated[0]
        return {
            "ns": prompt_ns + sum(generated),
            "ttft_ns": first,
            "experts": self._experts(self._prefetch_used() - before) if self.options.plugin else None,
        }

    def warm_up(self, test: Test) -> None:
        """As llama-bench: the whole prompt, and one token."""
        self._decoder.clear()
        tokens = self._decoder.with_beginning(self._stream[: test.n_prompt + 1])
        self._decoder.prompt(tokens[: test.n_prompt])
        if test.n_gen:
            list(self._decoder.one_by_one(tokens[test.n_prompt :][:1]))

    def _fill(self, depth: int) -> None:
        """The first `depth` tokens, computed once and restored afterwards, as llama-bench does."""
        import llama_cpp

        if depth == 0:
            return
        context = self.engine.ctx
        if self._state is not None and self._state[0] == depth:
            data = self._state[1]
            if llama_cpp.llama_state_seq_set_data(context, data, len(data), 0):
                return
        self._decoder.clear()
        self._decoder.prompt(self._decoder.with_beginning(self._stream[:depth]))
        size = int(llama_cpp.llama_state_seq_get_size(context, 0))
        data = (ctypes.c_uint8 * size)()
        n = int(llama_cpp.llama_state_seq_get_data(context, data, size, 0))
        self._state = (depth, data) if n else None

    def _prefetch_used(self) -> int:
        return int(self.engine.expert_state().get("stats", {}).get("n_prefetch_used", 0))

    def _experts(self, prefetch_used: int) -> dict[str, Any]:
        totals: Mapping[str, Any] = self.engine.stats()["totals"]
        state = self.engine.expert_state()
        devices = state.get("devices", [])
        n_layers = max(1, len(self.engine.info.moe_layer_indices))
        names = ("n_hits", "n_misses", "h2d_bytes", "n_experts_cpu", "n_experts_gpu")
        return {
            **{name: totals[name] for name in names},
            "n_slots": round(sum(sum(d["n_slots"]) for d in devices) / n_layers),
            "cache_bytes": round(sum(d["cache_bytes"] for d in devices)),
            "prefetch_used": prefetch_used,
            "why_unused": self._why_unused(state),
        }

    def _why_unused(self, state: Mapping[str, Any]) -> str:
        """Why no accelerator takes part now; empty where one does."""
        from hybrimoe.cli.report import pause_text

        if pauses := state.get("paused"):
            return pause_text(pauses[0])
        if state.get("phase") != "cpu-only":
            return ""
        return str(state.get("given_up") or "there is no accelerator")


def device_facts() -> dict[str, str]:
    """ggml's devices and backends in llama-bench's words, without the plug-in's own."""
    from hybrimoe.native.plugin import ggml_library

    ggml = ggml_library()
    # size_t ggml_backend_reg_count(void)
    ggml.ggml_backend_reg_count.argtypes = []
    ggml.ggml_backend_reg_count.restype = ctypes.c_size_t
    # ggml_backend_reg_t ggml_backend_reg_get(size_t index)
    ggml.ggml_backend_reg_get.argtypes = [ctypes.c_size_t]
    ggml.ggml_backend_reg_get.restype = ctypes.c_void_p
    # const char * ggml_backend_reg_name(ggml_backend_reg_t reg)
    ggml.ggml_backend_reg_name.argtypes = [ctypes.c_void_p]
    ggml.ggml_backend_reg_name.restype = ctypes.c_char_p
    found: dict[bool, list[str]] = {True: [], False: []}
    for i in range(ggml.ggml_backend_dev_count()):
        device = ggml.ggml_backend_dev_get(i)
        if ggml.ggml_backend_dev_name(device).decode() == _DEVICE_NAME:
            continue
        # enum ggml_backend_dev_type: CPU 0, GPU 1, IGPU 2, ACCEL 3
        is_gpu = ggml.ggml_backend_dev_type(device) in (1, 2)
        found[is_gpu].append(ggml.ggml_backend_dev_description(device).decode("utf-8", "replace"))
    backends = [
        ggml.ggml_backend_reg_name(ggml.ggml_backend_reg_get(i)).decode() for i in range(ggml.ggml_backend_reg_count())
    ]
    others = [name for name in backends if name not in ("CPU", _DEVICE_NAME)]
    return {
        "cpu_info": ", ".join(found[False]),
        "gpu_info": ", ".join(found[True]),
        "backends": ",".join(others) or "CPU",
    }


def build_facts(engine: Engine | None) -> dict[str, Any]:
    """`build_commit` and `build_number`.

    Commits of llama.cpp's rows and of ours are equally long, because readers cut them to the shorter. llama-cpp-python
    says which release its llama.cpp is, not which commit; ours is the checkout's, or else a hash of the plug-in.
    """
    import llama_cpp

    stock = f"llama.cpp-{llama_cpp.__version__}"
    if engine is None or engine.plugin is None:
        return {"build_commit": stock, "build_number": 0}
    room = max(4, len(stock) - len(COMMIT_PREFIX))
    return {"build_commit": COMMIT_PREFIX + _own_commit(engine.plugin.path)[:room], "build_number": 0}


def _own_commit(plugin: Path) -> str:
    import hashlib
    import subprocess

    import hybrimoe

    folder = Path(hybrimoe.__file__).resolve().parent
    if (folder.parent / ".git").exists():
        command = ["git", "-C", str(folder.parent), "rev-parse", "HEAD"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            done = None
        if done is not None and done.returncode == 0:
            return done.stdout.strip()
    return hashlib.sha256(plugin.read_bytes()).hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Answers requests on stdin until it ends; an error is answered, too, and ends the process."""
    values = json.loads((sys.argv[1:] if arguments is None else arguments)[0])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr

    def reply(**values: Any) -> None:
        print(json.dumps(values), file=replies, flush=True)

    try:
        worker = Worker(WorkerOptions(**values))
        with worker.engine:
            reply(**worker.facts())
            for line in sys.stdin:
                request = json.loads(line)
                test = Test(**request["test"])
                if request["warm_up"]:
                    worker.warm_up(test)
                    reply()
                else:
                    reply(**worker.run(test, request["repetition"]))
    except HybrimoeError as error:
        reply(error=error.message, hint=error.hint, exit_code=error.exit_code)
        return error.exit_code
    except (KeyboardInterrupt, BrokenPipeError):  # whoever asked is gone
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
