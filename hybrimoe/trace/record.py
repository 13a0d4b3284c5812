"""Records routing from plain llama.cpp, through its evaluation callback: ids, weights, all scores, look-ahead.

The process must not have loaded the plug-in: the callback cuts graphs into pieces. Nothing is timed here; `--trace` of
chat, run, bench and serve records the engine's own decisions instead.

Look-ahead is HybriMoE's (sec. IV-C): the gates of the next three layers applied to this layer's gate input, computed
here from the router weights of the model file.
"""

from __future__ import annotations

import contextlib
import ctypes as ct
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import HybrimoeError
from hybrimoe.files import open_regular
from hybrimoe.trace.format import MAX_LOOKAHEAD
from hybrimoe.trace.identity import identity_of
from hybrimoe.trace.tensors import GgmlTensor, values
from hybrimoe.trace.writer import TraceWriter

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hybrimoe.engine import Engine, EngineOptions
    from hybrimoe.generation import Sampling
    from hybrimoe.gguf_model import GgufModel

__all__ = ["RecordOptions", "Recording", "built_in_prompts", "record"]

_NAME = re.compile(rb"ffn_moe_(logits|probs|topk|weights|weights_norm|weights_scaled|weights_softmax)-(\d+)")
_ROUTER = b"ffn_gate_inp"
# A gate function is recognised by the scores that llama.cpp computed from the same input.
_GATE_TOLERANCE = 2e-2


@dataclass(frozen=True)
class RecordOptions:
    """What to store: `scores` is 'f16', 'f32' or 'none'."""

    scores: str = "f16"
    lookahead: bool = True


@dataclass(frozen=True)
class Recording:
    """A closed recording: its writer, and notes for the user."""

    writer: TraceWriter
    notes: list[str]
    interrupted: bool


def built_in_prompts() -> list[str]:
    """Questions of everyday life, for a first recording."""
    return (Path(__file__).with_name("prompts.txt")).read_text(encoding="utf-8").strip().splitlines()


class Gates:
    """Router weights of all MoE layers, dequantised from the model file."""

    def __init__(self, model: GgufModel) -> None:
        layers = [layer for layer in model.moe_layers if not layer.predicts_ahead]
        self._weights: list[npt.NDArray[np.float32] | None] = []
        self._biases: list[npt.NDArray[np.float32] | None] = []
        for layer in layers:
            found = {t.name: t for t in layer.router_tensors}
            weight = next((t for name, t in found.items() if name.endswith("ffn_gate_inp.weight")), None)
            bias = next((t for name, t in found.items() if name.endswith("ffn_gate_inp.bias")), None)
            self._weights.append(None if weight is None else _tensor(weight))
            self._biases.append(None if bias is None else _tensor(bias).reshape(-1))
        self._function = ""

    def logits(self, layer: int, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | None:
        """[n_rows, n_expert] of a layer's gate for inputs [n_rows, n_embd]; None if the layer has no plain gate."""
        weight = self._weights[layer]
        if weight is None or weight.shape[1] != x.shape[1]:
            return None
        bias = self._biases[layer]
        out: npt.NDArray[np.float32] = x @ weight.T + (0.0 if bias is None else bias)
        return out

    def recognise(self, layer: int, x: npt.NDArray[np.float32], scores: npt.NDArray[np.float32]) -> bool:
        """Finds the gate function by which llama.cpp made these scores. Returns whether one fits."""
        import numpy as np

        logits = self.logits(layer, x)
        if logits is None:
            return False
        errors = {name: float(np.abs(function(logits) - scores).max()) for name, function in _FUNCTIONS.items()}
        name = min(errors, key=lambda n: errors[n])
        self._function = name if errors[name] <= _GATE_TOLERANCE else ""
        return bool(self._function)

    def scores(self, layer: int, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | None:
        logits = self.logits(layer, x)
        return None if logits is None else _FUNCTIONS[self._function](logits)


def _softmax(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    import numpy as np

    e = np.exp(x - x.max(axis=1, keepdims=True))
    out: npt.NDArray[np.float32] = e / e.sum(axis=1, keepdims=True)
    return out


def _sigmoid(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    import numpy as np

    out: npt.NDArray[np.float32] = 0.5 * (1.0 + np.tanh(0.5 * x))
    return out


def _sqrt_softplus(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    import numpy as np

    out: npt.NDArray[np.float32] = np.sqrt(np.logaddexp(0.0, x))
    return out


_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "softmax": _softmax,
    "sigmoid": _sigmoid,
    "sqrt_softplus": _sqrt_softplus,
}


def _tensor(info: Any) -> npt.NDArray[np.float32]:
    """A tensor of a model file as float32, its shape in numpy's order."""
    import gguf
    import numpy as np
    from gguf.quants import dequantize

    with open_regular(info.path) as file:
        file.seek(info.offset)
        raw = np.frombuffer(file.read(info.n_bytes), dtype=np.uint8)
    kind = gguf.GGMLQuantizationType[info.type_name.upper()]
    plain = {"F32": np.float32, "F16": np.float16}.get(kind.name)
    data = raw.view(plain) if plain is not None else dequantize(raw.reshape(-1, raw.size // info.shape[1]), kind)
    return np.ascontiguousarray(data, dtype=np.float32).reshape(tuple(reversed(info.shape)))


@dataclass
class _Layer:
    """What one graph said about one layer; arrays [n_rows, ...]."""

    ids: Any = None
    weights: Any = None
    scores: Any = None
    x: Any = None


class Recorder:
    """The evaluation callback. Layers of one graph are gathered and written as tokens when the next graph begins."""

    def __init__(self, model: GgufModel, writer: TraceWriter, options: RecordOptions) -> None:
        self.writer = writer
        self.options = options
        self.failure: BaseException | None = None
        self.note = ""
        self._at = {layer: i for i, layer in enumerate(writer.model.layers)}
        self._gates = Gates(model) if options.lookahead else None
        self._recognised = False
        self._layers: dict[int, _Layer] = {}
        self._last = -1
        self._prompt = -1
        self._n_prompt_tokens = self._n_seen = 0
        import llama_cpp

        self.c_callback = llama_cpp.ggml_backend_sched_eval_callback(self._on_node)

    def begin_prompt(self, n_tokens: int) -> None:
        self.finish_graph()
        self._prompt += 1
        self._n_prompt_tokens, self._n_seen = n_tokens, 0

    def _on_node(self, address: int, ask: bool, _user_data: Any) -> bool:
        # An exception must not pass through C code.
        try:
            tensor = ct.cast(address, ct.POINTER(GgmlTensor))
            match = _NAME.fullmatch(tensor.contents.name)
            if match is None or int(match[2]) not in self._at or self._prompt < 0:
                return not ask
            if not ask:
                self._take(match[1], self._at[int(match[2])], tensor)
            return True
        except BaseException as error:
            self.failure = self.failure or error
            return False

    def _take(self, what: bytes, layer: int, tensor: Any) -> None:
        m = self.writer.model
        if layer < self._last:
            self.finish_graph()
        self._last = layer
        entry = self._layers.setdefault(layer, _Layer())
        if what in (b"logits", b"probs"):
            source = tensor.contents.src
            if source[0] and source[1] and _ROUTER in source[0].contents.name:
                entry.x = values(source[1], int(source[1].contents.ne[0]))
        if what == b"probs":
            entry.scores = values(tensor, m.n_expert)
        elif what == b"topk":
            entry.ids = values(tensor, m.top_k)
        elif what.startswith(b"weights"):
            entry.weights = values(tensor, m.top_k)

    def finish_graph(self) -> None:
        """Writes the tokens of the graph that ended."""
        layers, self._layers, self._last = self._layers, {}, -1
        if layers and any(entry.ids is not None and len(entry.ids) for entry in layers.values()):
            self._write(layers)

    def _write(self, layers: dict[int, _Layer]) -> None:
        import numpy as np

        m = self.writer.model
        n = max(len(entry.ids) for entry in layers.values() if entry.ids is not None)
        ids = np.full((n, m.n_layers, m.top_k), -1, np.int32)
        weights = np.zeros(ids.shape, np.float32)
        scores = np.zeros((n, m.n_layers, m.n_expert), np.float32)
        for layer, entry in layers.items():
            rows = 0 if entry.ids is None else len(entry.ids)
            if not rows:
                continue
            # The last layer computes only the tokens whose logits were asked for: the step's last ones.
            ids[n - rows :, layer] = entry.ids
            if entry.weights is not None:
                weights[n - rows :, layer] = entry.weights
            if entry.scores is not None:
                # Where the softmax comes after the selection (gpt-oss), llama.cpp's "probs" are still logits.
                raw = entry.scores.min() < 0 or entry.scores.max() > 1.5
                scores[n - rows :, layer] = _softmax(entry.scores) if raw else entry.scores
        kind = {"f16": np.float16, "f32": np.float32}.get(self.options.scores)
        decode = np.arange(self._n_seen, self._n_seen + n) >= self._n_prompt_tokens
        ahead = self._lookahead(layers, n, scores)
        self.writer.append_tokens(
            ids,
            prompt=np.full(n, self._prompt),
            is_decode=decode,
            weights=weights.astype(kind or np.float32),
            scores=None if kind is None else scores.astype(kind),
            lookahead=None if ahead is None else ahead.astype(kind or np.float16),
        )
        self._n_seen += n

    def _lookahead(
        self, layers: dict[int, _Layer], n: int, scores: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32] | None:
        import numpy as np

        m = self.writer.model
        if self._gates is None:
            return None
        if not self._recognised:
            first = next((i for i, e in sorted(layers.items()) if e.x is not None and len(e.x) == n), None)
            known = first is not None and self._gates.recognise(first, layers[first].x, scores[:, first])
            if not known:
                self._gates = None
                self.note = "no look-ahead is recorded: this model's gates are of a kind that is not known"
                return None
            self._recognised = True
        out = np.zeros((n, m.n_layers, MAX_LOOKAHEAD, m.n_expert), np.float32)
        for layer, entry in layers.items():
            if entry.x is None or not len(entry.x):
                continue
            for distance in range(1, MAX_LOOKAHEAD + 1):
                if layer + distance < m.n_layers:
                    found = self._gates.scores(layer + distance, entry.x)
                    if found is not None:
                        out[n - len(found) :, layer, distance - 1] = found
        return out


@contextlib.contextmanager
def _callback_installed(recorder: Recorder) -> Iterator[None]:
    """Contexts that are made inside have the recorder as evaluation callback."""
    import llama_cpp

    api = llama_cpp.llama_cpp
    original = api.llama_init_from_model

    def with_callback(model: Any, params: Any) -> Any:
        params.cb_eval = recorder.c_callback
        return original(model, params)

    api.llama_init_from_model = with_callback
    try:
        yield
    finally:
        api.llama_init_from_model = original


def record(
    model: GgufModel,
    output: Path,
    prompts: Sequence[str],
    engine_options: EngineOptions,
    *,
    sampling: Sampling,
    n_predict: int,
    conversation: bool = True,
    options: RecordOptions = RecordOptions(),
    source: dict[str, Any] | None = None,
    progress: Callable[[str, float], None] = lambda label, share: None,
) -> Recording:
    """Runs the model over prompts, recording. Ctrl-C ends the recording; what was recorded stays.

    Args:
        engine_options: `plugin` must be False.
        conversation: put each prompt into the model's chat template.

    Raises:
        TraceError: the model's layers differ in their experts.
        HybrimoeError: the file cannot be written, or the disk is full.
    """
    from hybrimoe.engine import Engine

    notes: list[str] = []
    writer = TraceWriter(output, identity_of(model), source=source)
    recorder = Recorder(model, writer, options)
    interrupted = False
    try:
        with _callback_installed(recorder):
            engine = Engine(model.path, engine_options, progress=lambda share: progress("loading", share))
        with engine:
            _run(engine, recorder, prompts, sampling, n_predict, conversation, notes, progress)
    except KeyboardInterrupt:
        interrupted = True
        notes.append("interrupted: what was recorded until then is kept")
    finally:
        if recorder.failure is None:
            recorder.finish_graph()
        writer.close()
    if recorder.failure is not None:
        raise HybrimoeError(f"recording failed: {recorder.failure}", "run again with -v") from recorder.failure
    if writer.failure:
        raise HybrimoeError(writer.failure, "free some disk space, or choose another folder")
    if recorder.note:
        notes.append(recorder.note)
    return Recording(writer, notes, interrupted)


def _run(
    engine: Engine,
    recorder: Recorder,
    prompts: Sequence[str],
    sampling: Sampling,
    n_predict: int,
    conversation: bool,
    notes: list[str],
    progress: Callable[[str, float], None],
) -> None:
    for number, text in enumerate(prompts):
        tokens = engine.chat_prompt([{"role": "user", "content": text}]) if conversation else engine.text_prompt(text)
        room = engine.n_ctx() - 1
        if len(tokens) > room:
            notes.append(f"prompt {number} was cut from {len(tokens)} to {room} tokens: that is the context")
            tokens = tokens[:room]
        # No token of an earlier prompt is reused: every one of them is routed and recorded.
        engine.reset()
        recorder.begin_prompt(len(tokens))
        if n_predict == 0:
            engine.eval(tokens)
        for done, _ in enumerate(engine.answer(tokens, sampling, n_predict) if n_predict else ()):
            share = (number + min(1.0, done / n_predict if n_predict > 0 else 0.5)) / len(prompts)
            progress("recording", share)
            if recorder.writer.failure or recorder.failure is not None:
                return
        progress("recording", (number + 1) / len(prompts))
        if recorder.writer.failure or recorder.failure is not None:
            return
