"""Forward passes through llama.cpp's C interface, with or without the plug-in: what parity tests and benchmarks share.

A process that has loaded the plug-in is no longer a plain llama.cpp: the plug-in stands among ggml's devices and takes
part in placing tensors. So a process makes models of one kind only, and comparisons run one process for each side.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hybrimoe.native.plugin import LayerCounters, Plugin
    from hybrimoe.placement import Placement

# (address of a ggml_tensor, ask) -> bool: asked for each node before it runs whether its value is wanted, then called
# with ask False once a wanted one is computed. See `ggml_backend_sched_eval_callback`.
NodeCallback = Callable[[int, bool], bool]


class ForwardError(Exception):
    """llama.cpp refused to load a model, to make a context or to compute."""


class Model:
    """A model in memory. `repack` False is llama.cpp's `--repack 0`: every weight stays as it is in the file.

    `mmap` False reads the file into buffers instead of mapping it; `host` False is `--no-host`. `backends` are modules
    to load first (see `hybrimoe.native.backend_modules`); `placement` is llama.cpp's `-ot`, `-cmoe` and `-ncmoe`;
    `settings` configure the plug-in. With `front` "graph" the plug-in's wrapper of the settings' first device takes
    whole graphs; all models of a process have the same.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        plugin: bool,
        repack: bool,
        mmap: bool = True,
        host: bool = True,
        n_gpu_layers: int = 0,
        placement: Placement | None = None,
        backends: Sequence[Path | str] = (),
        settings: Mapping[str, Any] | None = None,
        front: str = "block",
    ) -> None:
        import llama_cpp

        self.path = Path(path)
        self.front = front
        self._log = _quiet_log()
        if backends:
            from hybrimoe.native.backend_modules import load_backend_modules

            load_backend_modules(backends)
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = repack
        params.no_host = not host
        params.n_gpu_layers = n_gpu_layers
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP if mmap else llama_cpp.LLAMA_LOAD_MODE_NONE
        self.plugin: Plugin | None = None
        if plugin:
            from hybrimoe.native.plugin import load_plugin, plugin_library

            if front == "graph":
                plugin_library().configure(**{**(settings or {}), "front": front})
            self.plugin = load_plugin()
            if settings:
                self.plugin.configure(**settings)
        if plugin or placement is not None:
            from hybrimoe.placement import Placement, buffer_types, override_array

            types = buffer_types()
            rules = (placement or Placement()).rules(types, self.plugin.buffer_type if self.plugin else None)
            if front == "graph":
                assert settings is not None
                rules = [("ffn_.*_exps[.]weight", types["HybriMoE_Graph"])]
                self._devices = _device_list(f"HybriMoE_{settings['devices'][0]}")
                params.devices = ctypes.cast(self._devices, dict(params._fields_)["devices"])
            # llama.cpp refers to the array for as long as the model lives.
            self._overrides = override_array(rules)
            params.tensor_buft_overrides = ctypes.cast(self._overrides, ctypes.c_void_p)
        self.handle = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise ForwardError(f"cannot load {path}: {_last_error(self._log)}")
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.handle)
        self.n_vocab = int(llama_cpp.llama_vocab_n_tokens(self.vocabulary))

    def tokenize(self, text: str) -> list[int]:
        import llama_cpp

        data = text.encode()
        tokens = (llama_cpp.llama_token * (len(data) + 8))()
        n = llama_cpp.llama_tokenize(self.vocabulary, data, len(data), tokens, len(tokens), True, True)
        return list(tokens[:n])

    def close(self) -> None:
        import llama_cpp

        if self.handle:
            llama_cpp.llama_model_free(self.handle)
            self.handle = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _device_list(*names: str) -> ctypes.Array[ctypes.c_void_p]:
    from hybrimoe.native.plugin import ggml_library

    ggml = ggml_library()
    # ggml_backend_dev_t ggml_backend_dev_by_name(const char * name)
    ggml.ggml_backend_dev_by_name.argtypes = [ctypes.c_char_p]
    ggml.ggml_backend_dev_by_name.restype = ctypes.c_void_p
    devices = [ggml.ggml_backend_dev_by_name(name.encode()) for name in names]
    if None in devices:
        raise ForwardError(f"ggml has no device {names[devices.index(None)]}")
    return (ctypes.c_void_p * (len(names) + 1))(*devices, None)


class Context:
    """A context of `model`. `on_node` sees every node of the graph; see `NodeCallback`."""

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int = 1024,
        n_batch: int = 512,
        n_ubatch: int | None = None,
        n_threads: int = 2,
        n_sequences: int = 1,
        op_offload: bool = False,
        on_node: NodeCallback | None = None,
    ) -> None:
        import llama_cpp

        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = n_batch
        params.n_ubatch = n_ubatch or n_batch
        params.n_threads = params.n_threads_batch = n_threads
        params.n_seq_max = n_sequences
        params.op_offload = op_offload
        if on_node is not None:
            wanted = on_node
            self._on_node = llama_cpp.ggml_backend_sched_eval_callback(lambda node, ask, _data: wanted(node, ask))
            params.cb_eval = self._on_node
        self.model = model
        self.handle = llama_cpp.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise ForwardError(f"cannot make a context: {_last_error(model._log)}")
        self._instance = model.plugin.last_instance() if model.plugin and model.front == "block" else 0
        self._batch = llama_cpp.llama_batch_init(n_batch, 0, 1)

    @property
    def instance(self) -> int:
        """The plug-in's; where it takes whole graphs there is one once something was computed, for all contexts."""
        return self._instance or (self.model.plugin.last_instance() if self.model.plugin else 0)

    def compute(self, tokens: Sequence[int], position: int, *, sequence: int = 0, last_only: bool = False) -> None:
        """One llama_decode of `tokens` at `position`; logits of all tokens are kept, or of the last one only."""
        import llama_cpp

        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), position + i, 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = not last_only or i == len(tokens) - 1
        status = llama_cpp.llama_decode(self.handle, batch)
        if status != 0:
            raise ForwardError(f"llama_decode returned {status}: {_last_error(self.model._log)}")

    def logits(self, n_rows: int) -> npt.NDArray[np.float32]:
        """A copy of the last computation's logits, `[n_rows, n_vocab]`; waits for it to finish."""
        import llama_cpp
        import numpy as np

        rows = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.handle), (n_rows, self.model.n_vocab))
        copy: npt.NDArray[np.float32] = rows.astype(np.float32, copy=True)
        return copy

    def forward(
        self, tokens: Sequence[int], position: int, *, sequence: int = 0, last_only: bool = False
    ) -> npt.NDArray[np.float32]:
        self.compute(tokens, position, sequence=sequence, last_only=last_only)
        return self.logits(1 if last_only else len(tokens))

    def synchronize(self) -> None:
        import llama_cpp

        llama_cpp.llama_synchronize(self.handle)

    def clear(self) -> None:
        """Forget all tokens."""
        import llama_cpp

        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.handle), True)

    def saved(self) -> bytes:
        """The whole state, as `restore` takes it."""
        import ctypes

        import llama_cpp

        size = llama_cpp.llama_state_get_size(self.handle)
        buffer = (ctypes.c_uint8 * size)()
        return bytes(buffer[: llama_cpp.llama_state_get_data(self.handle, buffer, size)])

    def restore(self, state: bytes) -> None:
        import ctypes

        import llama_cpp

        if (
            llama_cpp.llama_state_set_data(
                self.handle, (ctypes.c_uint8 * len(state)).from_buffer_copy(state), len(state)
            )
            == 0
        ):
            raise ForwardError("the state cannot be restored")

    def forget_from(self, position: int) -> None:
        """Forget the tokens of sequence 0 from `position` on."""
        import llama_cpp

        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.handle), 0, position, -1)

    def set_threads(self, n_threads: int) -> None:
        import llama_cpp

        llama_cpp.llama_set_n_threads(self.handle, n_threads, n_threads)

    def set_warmup(self, on: bool) -> None:
        import llama_cpp

        llama_cpp.llama_set_warmup(self.handle, on)

    def counters(self) -> list[LayerCounters]:
        """The plug-in's counters of this context; empty without the plug-in."""
        return self.model.plugin.counters(self.instance) if self.model.plugin else []

    def reset_counters(self) -> None:
        if self.model.plugin:
            self.model.plugin.reset_counters(self.instance)

    def n_nodes_delegated(self) -> int:
        return self.model.plugin.n_nodes_delegated(self.instance) if self.model.plugin else 0

    def close(self) -> None:
        import llama_cpp

        if self.handle:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(self.handle)
            self.handle = None

    def __enter__(self) -> Context:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Tensors:
    """Reads the tensors whose addresses a `NodeCallback` gets."""

    def __init__(self) -> None:
        from hybrimoe.native.plugin import ggml_library

        library = ggml_library()
        # const char * ggml_get_name(const struct ggml_tensor * tensor)
        library.ggml_get_name.argtypes = [ctypes.c_void_p]
        library.ggml_get_name.restype = ctypes.c_char_p
        # bool ggml_is_contiguous(const struct ggml_tensor * tensor)
        library.ggml_is_contiguous.argtypes = [ctypes.c_void_p]
        library.ggml_is_contiguous.restype = ctypes.c_bool
        # size_t ggml_nbytes(const struct ggml_tensor * tensor)
        library.ggml_nbytes.argtypes = [ctypes.c_void_p]
        library.ggml_nbytes.restype = ctypes.c_size_t
        # void ggml_backend_tensor_get(const struct ggml_tensor * tensor, void * data, size_t offset, size_t size)
        library.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        library.ggml_backend_tensor_get.restype = None
        self._ggml = library

    def name(self, tensor: int) -> str:
        text: bytes = self._ggml.ggml_get_name(tensor)
        return text.decode("utf-8", "replace")

    def value(self, tensor: int) -> bytes | None:
        """The tensor's bytes; None for a view with gaps, which may hold anything between its elements."""
        if not self._ggml.ggml_is_contiguous(tensor):
            return None
        buffer = ctypes.create_string_buffer(int(self._ggml.ggml_nbytes(tensor)))
        self._ggml.ggml_backend_tensor_get(tensor, buffer, 0, len(buffer))
        return buffer.raw


_log_callbacks: dict[str, Any] = {}


def _quiet_log() -> list[str]:
    """Keeps llama.cpp's messages instead of printing them; one list for the process, because llama.cpp has one log."""
    import llama_cpp

    if not _log_callbacks:
        lines: list[str] = []

        def keep(level: int, text: bytes, _data: Any) -> None:
            lines.append(text.decode("utf-8", "replace").strip())
            del lines[:-50]

        _log_callbacks["lines"] = lines
        _log_callbacks["callback"] = llama_cpp.llama_log_callback(keep)
        llama_cpp.llama_log_set(_log_callbacks["callback"], ctypes.c_void_p(0))
    kept: list[str] = _log_callbacks["lines"]
    return kept


def _last_error(lines: list[str]) -> str:
    return next(
        (line for line in reversed(lines) if "error" in line or "failed" in line), "no reason in llama.cpp's log"
    )
