"""`Engine`: a `llama_cpp.Llama` whose experts run in the plug-in, with llama.cpp's defaults.

Chat templates, sampling, grammars and tool calls come from llama-cpp-python; this module adds the placement of the
experts, the counters, honest errors, and generation that can be interrupted.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp._internals
import llama_cpp.llama
import llama_cpp.llama_chat_format as llama_chat_format
import numpy as np

from hybrimoe.chat_template import BoundedFormatter, TemplateProcess, bounded_templates
from hybrimoe.errors import DoesNotFitError, HybrimoeError, ModelError, PluginError, UsageError
from hybrimoe.expert_options import ExpertOptions
from hybrimoe.generation import RANDOM_SEED, Answer, Sampling
from hybrimoe.gguf_model import GgufModel, inspect
from hybrimoe.interrupt import AbortFlag, abort_on_interrupt
from hybrimoe.llama_log import LlamaLog, llama_log
from hybrimoe.llama_seam import Loader, LoadSettings
from hybrimoe.machine import host
from hybrimoe.native.backend_modules import backend_module_paths, device_names, load_backend_modules
from hybrimoe.native.plugin import LayerCounters, Plugin, ggml_library, load_plugin
from hybrimoe.placement import PLUGIN_BUFFER_TYPE, Placement, buffer_types
from hybrimoe.trace.identity import identity_of
from hybrimoe.trace.live import LiveRecorder, check_target, ring_bytes

# (ggml type, bytes per element) of the KV cache types that llama.cpp accepts (`kv_cache_types` in common/arg.cpp).
KV_TYPES: Mapping[str, tuple[int, float]] = {
    "f32": (0, 4.0),
    "f16": (1, 2.0),
    "bf16": (30, 2.0),
    "q8_0": (8, 34 / 32),
    "q4_0": (2, 18 / 32),
    "q4_1": (3, 20 / 32),
    "iq4_nl": (20, 18 / 32),
    "q5_0": (6, 22 / 32),
    "q5_1": (7, 24 / 32),
}
# llama.cpp rounds the context up to this (src/llama-context.cpp).
_CTX_STEP = 256


@dataclass(frozen=True)
class EngineOptions:
    """How a model is loaded. Defaults are llama.cpp's (`common_params` in common/common.h).

    `n_ctx` 0: the context the model was trained with. Threads None: one per physical core; 0 or less: one per hardware
    thread; `n_threads_batch` None: as `n_threads`. `n_gpu_layers` below 0: all layers (without their experts).
    `backends` are modules of ggml backends to load first; None: those that HYBRIMOE_BACKENDS names. `trace` is a file
    that routing and decisions are recorded into (docs/trace-format.md); it must not exist yet. `observe` lets other
    processes of the user watch, and counts which experts are asked for (docs/observability.md).
    """

    n_ctx: int = 0
    n_batch: int = 2048
    n_ubatch: int = 512
    n_threads: int | None = None
    n_threads_batch: int | None = None
    n_gpu_layers: int = -1
    flash_attn: str = "auto"
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    load_mode: str = "auto"
    repack: bool = True
    warmup: bool = True
    placement: Placement = field(default_factory=Placement)
    plugin: bool = True
    experts: ExpertOptions = field(default_factory=ExpertOptions)
    backends: tuple[Path, ...] | None = None
    trace: Path | None = None
    observe: bool = False

    def placed_experts(self) -> ExpertOptions:
        """`experts` with what `cpu_moe` and `n_cpu_moe` mean to the plug-in."""
        experts = self.experts
        if self.placement.cpu_moe:
            experts = replace(experts, devices=())
        if self.placement.n_cpu_moe:
            experts = replace(experts, n_cpu_layers=self.placement.n_cpu_moe)
        return experts

    def threads(self) -> tuple[int, int]:
        """(threads for decode, threads for prefill)"""

        def count(given: int | None, default: int) -> int:
            if given is None:
                return default
            return given if given > 0 else host.n_logical_cpus()

        n = count(self.n_threads, host.n_physical_cores())
        return n, count(self.n_threads_batch, n)


@dataclass(frozen=True)
class Verification:
    """Where the MoE layers of the model really ran. Layers are llama.cpp's indices."""

    expected: tuple[int, ...]
    dispatched: tuple[int, ...]
    delegated: tuple[int, ...]
    missing: tuple[int, ...]

    @property
    def ok(self) -> bool:
        return not self.missing and not self.delegated

    def message(self) -> str:
        """One line for the user; empty when all is well."""
        n = len(self.expected)
        if self.missing:
            return f"{len(self.missing)} of {n} MoE layers did not run in the plug-in (layers {_ranges(self.missing)})"
        if self.delegated:
            return (
                f"{len(self.delegated)} of {n} MoE layers were not recognised and ran through ggml's CPU backend "
                f"(layers {_ranges(self.delegated)}): results are right, speed may suffer"
            )
        return ""


class Engine(llama_cpp.Llama):  # type: ignore[misc]
    """A loaded MoE model, ready to answer.

    Raises ModelError (missing, damaged, unsupported, no experts), UsageError (impossible options), DoesNotFitError and
    PluginError. `progress` is called with a share from 0 to 1 while weights are loaded, `on_trace_failure` from another
    thread when a recording had to end. Close it, or use it as a context manager; one thread at a time.
    """

    def __init__(
        self,
        path: Path | str,
        options: EngineOptions | None = None,
        *,
        progress: Callable[[float], None] | None = None,
        on_trace_failure: Callable[[str], None] = lambda text: None,
        **llama_arguments: Any,
    ) -> None:
        self._on_trace_failure = on_trace_failure
        # Llama.__del__ closes what __init__ made, however far it came.
        self._stack = contextlib.ExitStack()
        self.options = options or EngineOptions()
        self.info: GgufModel = inspect(path).require_moe()
        log = llama_log()
        options = self.options
        if options.trace is not None:
            if not options.plugin:
                raise UsageError("--trace records the plug-in", "without it: hybrimoe trace record")
            check_target(options.trace)
        load_backend_modules(backend_module_paths() if options.backends is None else options.backends)
        self.plugin: Plugin | None = load_plugin() if options.plugin else None
        if self.plugin is not None:
            self.plugin.configure(**self._plugin_settings())
        self.plugin_instance = 0
        self.verification: Verification | None = None
        self.n_evaluated = 0
        # Of all answers: prompt tokens computed, tokens drawn after each answer's first one, and the time both took.
        self.n_prompt_tokens = self.n_generated = 0
        self.prompt_s = self.generation_s = 0.0
        self.phase = "idle"
        self._pieces: dict[int, bytes] = {}
        self._templates = TemplateProcess()
        self._last_event = 0
        self.recorder: LiveRecorder | None = None
        self.abort_flag = AbortFlag()
        self._sampling: Sampling | None = None
        self._prompt_tail: list[int] = []
        n_ctx = _context_size(self.info, self.options)
        log.clear()
        rules = self.options.placement.rules(buffer_types(), self.plugin.buffer_type if self.plugin else None)
        loader = Loader(
            LoadSettings(
                rules,
                self.options.n_gpu_layers,
                self.options.load_mode,
                self.options.repack,
                self.options.flash_attn,
            ),
            progress,
            self.abort_flag,
        )
        # llama.cpp refers to its arrays for as long as the model lives.
        self._loader = loader
        try:
            self._templates.start()
            with abort_on_interrupt(self.abort_flag), loader.installed(), bounded_templates(self._templates):
                try:
                    self._load(str(self.info.path), n_ctx, llama_arguments)
                finally:
                    if self.plugin is not None and options.trace is not None:
                        self.plugin.configure(trace=0, trace_scores=True)  # of this instance alone
            self.context_size = self.n_ctx()  # for those who may ask when the context is freed already
            if self.n_ctx() > len(self.input_ids):
                self.input_ids: Any = np.zeros(self.n_ctx(), dtype=np.intc)
            if self.plugin is not None:
                self.plugin_instance = self.plugin.last_instance()
                self._start_recording()
            self.abort_flag.install(self.ctx)
            self._chat_formatter = self._make_chat_formatter()
            if self.options.warmup:
                self._warm_up()
        except (ValueError, RuntimeError, MemoryError) as error:
            self.close()
            raise loader.failure or _load_error(self.info, loader, log, error) from error
        except BaseException:
            self.close()
            raise

    def _plugin_settings(self) -> dict[str, Any]:
        experts = self.options.placed_experts()
        n_batch = min(self.options.n_batch, self.options.n_ubatch)
        known = [name for name in device_names(ggml_library()) if name != PLUGIN_BUFFER_TYPE]
        settings = experts.settings(self.info, n_batch, known)
        if self.options.trace is not None:
            settings["trace"] = ring_bytes(self.info, n_batch)
        return {**settings, "observe": self.options.observe}

    def _start_recording(self) -> None:
        if self.plugin is not None and self.options.trace is not None:
            self.recorder = LiveRecorder(
                self.plugin.trace_ring(self.plugin_instance),
                self.options.trace,
                identity_of(self.info),
                on_failure=self._on_trace_failure,
                source={"tool": "hybrimoe --trace", "plug-in": self.plugin.version},
            )

    def _load(self, path: str, n_ctx: int, arguments: dict[str, Any]) -> None:
        n_threads, n_threads_batch = self.options.threads()
        super().__init__(
            path,
            n_ctx=n_ctx,
            n_batch=self.options.n_batch,
            n_ubatch=self.options.n_ubatch,
            n_threads=n_threads,
            n_threads_batch=n_threads_batch,
            type_k=KV_TYPES[self.options.cache_type_k][0],
            type_v=KV_TYPES[self.options.cache_type_v][0],
            seed=RANDOM_SEED,
            # llama.cpp's template for models that have none; llama-cpp-python would take Llama 2's.
            chat_format=None if self.info.chat_template else "chatml",
            verbose=False,
            **arguments,
        )

    def _warm_up(self) -> None:
        """Throw-away steps, as llama.cpp does: the first answer shall not pay for page faults and thread start.

        The plug-in learns the layers in the first step and fills the expert cache before the second.
        """
        token = self.token_bos() if self.token_bos() != -1 else max(self.token_eos(), 0)
        with abort_on_interrupt(self.abort_flag):
            self.eval([token])
            if self.plugin is not None:
                self.eval([token])
        self.phase = "idle"
        self.reset()
        self._ctx.kv_cache_clear()
        llama_cpp.llama_perf_context_reset(self.ctx)
        if self.plugin is not None:
            self.verify()
            self.plugin.reset_counters(self.plugin_instance)
        if self.recorder is not None:
            self.recorder.end_warm_up()

    def close(self) -> None:
        """Free model and context, and end the recording. Further calls do nothing."""
        if getattr(self, "recorder", None) is not None:
            self.recorder.close()  # type: ignore[union-attr]
        if getattr(self, "_templates", None) is not None:
            self._templates.close()
        super().close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Prompts

    def _make_chat_formatter(self) -> BoundedFormatter:
        def text(token: int) -> str:
            return "" if token == -1 else str(self._model.token_get_text(token))

        formatter = BoundedFormatter(
            self._templates,
            self.info.chat_template or llama_chat_format.CHATML_CHAT_TEMPLATE,
            eos_token=text(self.token_eos()),
            bos_token=text(self.token_bos()),
        )
        try:
            formatter.check()
        except Exception as error:
            raise ModelError(
                f"the chat template of '{self.info.path.name}' cannot be used: {error}",
                "get the model from another source: the template is part of it",
            ) from error
        return formatter

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Tokens of a conversation (`role` and `content` of each message), up to where the assistant begins to answer.

        Raises ModelError when the model's template refuses the conversation, as some do with system prompts.
        """
        try:
            prompt = self._chat_formatter(messages=[dict(m) for m in messages]).prompt
        except Exception as error:
            raise ModelError(
                f"the chat template of '{self.info.path.name}' refuses this conversation: {error}",
                "try without a system prompt, or use --no-conversation",
            ) from error
        add_bos = bool(self._model.add_bos_token())
        if add_bos and self.token_bos() != -1:
            prompt = prompt.removeprefix(self._model.token_get_text(self.token_bos()))
        return list(self.tokenize(prompt.encode(), add_bos=add_bos, special=True))

    def text_prompt(self, text: str) -> list[int]:
        """Tokens of a text to be continued as it stands."""
        return list(self.tokenize(text.encode(), add_bos=bool(self._model.add_bos_token()), special=True))

    # Answers

    def answer(self, prompt: Sequence[int], sampling: Sampling | None = None, n_predict: int = -1) -> Answer:
        """A new answer to `prompt`; iterate over it. Raises UsageError when the prompt is empty or too long."""
        return Answer(self, list(prompt), sampling or Sampling(), n_predict)

    def tokens(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Tokens after `prompt` without end; what the KV cache holds of it already is not computed again."""
        self._sampling = sampling
        self.last_n_tokens_size = sampling.repeat_last_n
        self.set_seed(sampling.seed)
        try:
            yield from self.generate(list(prompt), **sampling.to_llama())
        except (RuntimeError, KeyboardInterrupt) as error:
            # The logits of an aborted step do not exist: the next answer must compute them again.
            self._requires_eval = True
            if isinstance(error, RuntimeError) and not self.abort_flag.is_set():
                raise HybrimoeError(
                    f"llama.cpp failed while computing: {llama_log().reason() or error}", "run again with -v"
                ) from error
            raise KeyboardInterrupt from None

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        if self.recorder is not None:
            self.recorder.begin_prompt()
        self._prompt_tail = list(tokens)[-self.last_n_tokens_size :] if self.last_n_tokens_size > 0 else []
        return self._generate(super().generate(tokens, *args, **kwargs))

    def _generate(self, tokens: Any) -> Any:
        """Passes tokens on, and counts them and their time: from one being asked for to it being there."""
        n_before, is_first = self.n_evaluated, True
        try:
            with contextlib.closing(tokens):
                start = time.perf_counter()
                for token in tokens:
                    passed_s = time.perf_counter() - start
                    if is_first:
                        self.n_prompt_tokens += self.n_evaluated - n_before
                        self.prompt_s += passed_s
                    else:
                        self.n_generated += 1
                        self.generation_s += passed_s
                    is_first = False
                    yield token
                    start = time.perf_counter()
        finally:
            self.phase = "idle"

    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._init_sampler(*args, **kwargs)
        # llama.cpp's penalties see the prompt too. A grammar in the chain must not: it describes the answer only.
        if kwargs.get("grammar") is None:
            for token in self._prompt_tail:
                sampler.accept(token)
        return sampler

    def after_answer(self) -> None:
        """Called when an answer that has begun ends, however it ends."""
        if self.plugin is not None and self.verification is None:
            self.verify()

    def eval(self, tokens: Sequence[int]) -> None:
        self.phase = "generating" if len(tokens) == 1 else "prompt"
        super().eval(tokens)
        self.n_evaluated += len(tokens)

    def is_end(self, token: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_eog(self._model.vocab, token))

    def token_bytes(self, token: int, special: bool = False) -> bytes:
        """The text of a token, which may be part of a UTF-8 sequence; control tokens are empty unless `special`."""
        if special:
            return self._token_text(token, special)
        # llama-cpp-python asks for the whole answer's text again at every token.
        if (piece := self._pieces.get(token)) is None:
            piece = self._pieces[token] = self._token_text(token, special)
        return piece

    def _token_text(self, token: int, special: bool) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama_cpp.llama_token_to_piece(self._model.vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def detokenize(self, tokens: Sequence[int], prev_tokens: Any = None, special: bool = False) -> bytes:
        # llama-cpp-python's own cuts tokens of more than 32 bytes, such as long runs of spaces.
        text = b"".join(self.token_bytes(token, special) for token in tokens)
        starts_with_bos = len(tokens) > 0 and tokens[0] == self.token_bos()
        return text[1:] if starts_with_bos and text.startswith(b" ") else text

    def create_completion(self, *args: Any, **kwargs: Any) -> Any:
        return super().create_completion(*args, **{"max_tokens": -1, **_llama_cpp_defaults(), **kwargs})

    def create_chat_completion(self, *args: Any, **kwargs: Any) -> Any:
        return super().create_chat_completion(*args, **{**_llama_cpp_defaults(), **kwargs})

    # What ran where

    def counters(self) -> list[LayerCounters]:
        """The plug-in's counters per layer since the last reset; empty without the plug-in."""
        return [] if self.plugin is None else self.plugin.counters(self.plugin_instance)

    def residency(self) -> dict[int, list[int]]:
        """Per layer (llama.cpp's index) and expert the accelerator that holds it, -1 for none; empty where unknown."""
        return {} if self.plugin is None else self.plugin.residency(self.plugin_instance)

    def expert_state(self) -> dict[str, Any]:
        """Accelerators with slots and costs, statistics since the start, guard; empty without the plug-in."""
        return {} if self.plugin is None else self.plugin.state(self.plugin_instance)

    def expert_events(self, after: int = 0) -> list[tuple[int, str]]:
        """What the dispatch decided and why, after line number `after`: (number, line)."""
        return [] if self.plugin is None else self.plugin.events(self.plugin_instance, after)

    def new_expert_events(self) -> list[str]:
        """Lines of `expert_events` since this was last asked."""
        events = self.expert_events(self._last_event)
        self._last_event = events[-1][0] if events else self._last_event
        return [line for _, line in events]

    def reset_counters(self) -> None:
        if self.plugin is not None:
            self.plugin.reset_counters(self.plugin_instance)

    def verify(self, *, strict: bool = False) -> Verification:
        """Compares the plug-in's counters with the model's MoE layers; call it after the first step.

        Where nothing has run since the counters were reset, the report is the one from before.
        `strict` raises PluginError unless every MoE layer ran through the plug-in's own dispatch.
        """
        expected = self.info.moe_layer_indices
        if self.verification is None or self.counters():
            self.verification = self._verified(expected)
        if strict and not self.verification.ok:
            raise PluginError(self.verification.message(), "hybrimoe doctor")
        return self.verification

    def _verified(self, expected: tuple[int, ...]) -> Verification:
        counted = {c.layer: c for c in self.counters()}
        delegated = [i for i in expected if i in counted and counted[i].n_blocks_delegated]
        dispatched = [i for i in expected if i in counted and counted[i].n_blocks and i not in delegated]
        missing = [i for i in expected if i not in dispatched and i not in delegated]
        return Verification(expected, tuple(dispatched), tuple(delegated), tuple(missing))

    def stats(self) -> dict[str, Any]:
        """Counters per layer and their sums since the last reset, as JSON-able data. Times in microseconds."""
        layers = self.counters()
        names = [f.name for f in fields(LayerCounters) if f.name not in ("layer", "n_steps", "n_tokens")]
        totals: dict[str, Any] = {name: sum(getattr(c, name) for c in layers) for name in names}
        totals["n_tokens"] = max((c.n_tokens for c in layers), default=0)
        totals["n_steps"] = max((c.n_steps for c in layers), default=0)
        return {
            "plugin": self.plugin is not None,
            "n_moe_layers": len(self.info.moe_layer_indices),
            "n_nodes_delegated": 0 if self.plugin is None else self.plugin.n_nodes_delegated(self.plugin_instance),
            "totals": totals,
            "layers": [asdict(c) for c in layers],
        }


def _llama_cpp_defaults() -> dict[str, Any]:
    sampling = Sampling()
    return {
        "temperature": sampling.temp,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repeat_penalty,
        "seed": sampling.seed,
    }


def _context_size(model: GgufModel, options: EngineOptions) -> int:
    """The context to ask llama.cpp for. Raises UsageError and DoesNotFitError."""
    if options.n_ctx > model.n_ctx_train > 0:
        raise UsageError(
            f"a context of {options.n_ctx} tokens is larger than the {model.n_ctx_train} that '{model.path.name}' was "
            "trained with",
            f"use -c {model.n_ctx_train} or less, or -c 0 for all of it",
        )
    n_ctx = options.n_ctx or model.n_ctx_train
    if n_ctx == 0:
        raise UsageError(f"'{model.path.name}' does not say how large its context is", "give one with -c")
    on_gpu = options.n_gpu_layers != 0 and bool(llama_cpp.llama_supports_gpu_offload())
    if not on_gpu:
        from hybrimoe.planning.memory import check_context

        kinds = options.cache_type_k, options.cache_type_v
        check_context(model, n_ctx, kinds, weights_are_copied=options.load_mode == "none")
    return -(-n_ctx // _CTX_STEP) * _CTX_STEP if options.n_ctx else 0


def _load_error(model: GgufModel, loader: Loader, log: LlamaLog, error: Exception) -> HybrimoeError:
    reason = log.reason() or str(error)
    if loader.context_failed or isinstance(error, MemoryError):
        if "alloc" in reason or "memory" in reason:
            return DoesNotFitError(f"'{model.path.name}' does not fit: {reason}", "use a smaller context with -c")
        return HybrimoeError(f"llama.cpp cannot make a context for '{model.path.name}': {reason}", "run again with -v")
    if "unable to allocate" in reason or "failed to allocate" in reason:
        return DoesNotFitError(f"'{model.path.name}' does not fit: {reason}", "use a smaller model or quantisation")
    return ModelError(f"llama.cpp cannot load '{model.path.name}': {reason}", "hybrimoe models show, or run with -v")


def _ranges(numbers: Sequence[int]) -> str:
    """'0-3, 7' for (0, 1, 2, 3, 7)."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
