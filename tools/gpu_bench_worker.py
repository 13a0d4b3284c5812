"""One row of `tools/bench_gpu.py` in a process of its own: loads the model once, then measures what it is asked for.

`python gpu_bench_worker.py JSON` with the keys of `WorkerOptions`; requests and replies are lines of JSON on stdin and
stdout. A process of its own for each row, because a loaded plug-in changes plain llama.cpp.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_cpu import N_PROMPT_BEFORE_DECODE, timed_us, token_source

from hybrimoe.errors import HybrimoeError


@dataclass(frozen=True)
class WorkerOptions:
    model: str
    plugin: bool
    n_threads: int
    n_ctx: int
    n_ubatch: int = 512
    n_gpu_layers: int = 0
    n_cpu_moe: int | None = None
    host: bool = True
    mmap: bool = True
    device: str = ""
    backends: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    n_warmup: int = 8


class Worker:
    """A loaded model with a context."""

    def __init__(self, options: WorkerOptions) -> None:
        from llama_forward import Context, Model

        from hybrimoe.llama_log import llama_log
        from hybrimoe.native.backend_modules import load_backend_modules
        from hybrimoe.placement import Placement

        llama_log()
        load_backend_modules(options.backends)
        self.options = options
        self.free_before = self._device_free()
        # Ours takes whatever experts the placement leaves to it, so nothing is placed then.
        placement = Placement()
        if not options.plugin:
            all_on_cpu = options.n_cpu_moe is None
            placement = Placement(cpu_moe=all_on_cpu, n_cpu_moe=0 if all_on_cpu else options.n_cpu_moe or 0)
        self.model = Model(
            options.model,
            plugin=options.plugin,
            repack=True,
            host=options.host,
            mmap=options.mmap,
            n_gpu_layers=options.n_gpu_layers,
            placement=placement,
            settings=options.settings,
        )
        self.context = Context(
            self.model,
            n_ctx=options.n_ctx,
            n_batch=options.n_ubatch,
            n_threads=options.n_threads,
            op_offload=True,
        )
        self.tokens = token_source(self.model, None, options.n_ctx)
        self._copy_busy_us = 0.0
        self._has_seen: set[int] = set()
        self._last_event = 0

    def warm_up(self) -> dict[str, Any]:
        """Page faults, shader compilation and thread start; for ours also a cache filled by `n_warmup` tokens."""
        self.prefill(min(N_PROMPT_BEFORE_DECODE, self.options.n_ubatch))
        self.decode(self.options.n_warmup)
        layers = self.context.counters()
        return {
            "ready": True,
            "n_blocks_delegated": sum(layer.n_blocks_delegated for layer in layers),
            "device_bytes_used": self.free_before - self._device_free(),
        }

    def prefill(self, n: int) -> dict[str, Any]:
        context, step = self.context, self.options.n_ubatch
        context.clear()
        self._reset()
        us = sum(timed_us(context, self.tokens[start : min(start + step, n)], start) for start in range(0, n, step))
        return {"us": us, **self._counted()}

    def decode(self, n: int) -> dict[str, Any]:
        context, first = self.context, N_PROMPT_BEFORE_DECODE
        context.clear()
        context.compute(self.tokens[:first], 0, last_only=True)
        context.synchronize()
        self._reset()
        us = sum(timed_us(context, [self.tokens[first + i]], first + i) for i in range(n))
        return {"us": us, **self._counted()}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        n = int(request["n"])
        if request["test"] != "prefill":
            return self.decode(n)
        if n not in self._has_seen:  # a GPU compiles and captures for each size of batch
            self._has_seen.add(n)
            self.prefill(n)
        return self.prefill(n)

    def _reset(self) -> None:
        if self.model.plugin is not None:
            self.model.plugin.reset_counters(self.context.instance)
            self._copy_busy_us = self._copied_us()
            self._new_events()

    def _counted(self) -> dict[str, Any]:
        """Sums over layers and time spent copying since the reset, and the plug-in's state now."""
        plugin = self.model.plugin
        if plugin is None:
            return {}
        totals: dict[str, float] = {}
        for layer in self.context.counters():
            for name, value in dataclasses.asdict(layer).items():
                if name != "layer":
                    totals[name] = totals.get(name, 0) + value
        return {
            "counters": totals,
            "state": plugin.state(self.context.instance),
            "copy_busy_us": self._copied_us() - self._copy_busy_us,
            "events": self._new_events(),
        }

    def _new_events(self) -> list[str]:
        """What the dispatch logged since this was last asked."""
        assert self.model.plugin is not None
        events = self.model.plugin.events(self.context.instance, self._last_event)
        if events:
            self._last_event = events[-1][0]
        return [line for _, line in events]

    def _copied_us(self) -> float:
        assert self.model.plugin is not None
        devices = self.model.plugin.state(self.context.instance).get("devices", [])
        return float(sum(device.get("copy_busy_us", 0.0) for device in devices))

    def _device_free(self) -> int:
        from hybrimoe.native.backend_modules import device_memory

        return device_memory(self.options.device)[0] if self.options.device else 0


def serve(options: WorkerOptions) -> None:
    """Answers requests on stdin until it ends; an error is answered, too, and ends the process."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr

    def reply(**values: Any) -> None:
        print(json.dumps(values), file=replies, flush=True)

    from llama_forward import ForwardError

    try:
        worker = Worker(options)
        reply(**worker.warm_up())
        for line in sys.stdin:
            reply(**worker.answer(json.loads(line)))
    except HybrimoeError as error:
        reply(error=error.message, hint=error.hint)
        raise SystemExit(error.exit_code) from None
    except ForwardError as error:
        reply(error=str(error), hint="a model that does not fit the GPU fails like this")
        raise SystemExit(1) from None
    except (KeyboardInterrupt, BrokenPipeError):  # whoever asked is gone
        raise SystemExit(130) from None


def main(argv: Sequence[str]) -> None:
    values = json.loads(argv[0])
    serve(WorkerOptions(**{**values, "backends": tuple(values.get("backends", ()))}))


if __name__ == "__main__":
    main(sys.argv[1:])
