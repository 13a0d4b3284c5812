"""The seam in llama-cpp-python: what `llama_cpp.Llama.__init__` cannot pass on to llama.cpp."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
import llama_cpp._internals

from hybrimoe.interrupt import AbortFlag
from hybrimoe.placement import override_array

FLASH_ATTENTION: Mapping[str, int] = {
    "auto": llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "on": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}
LOAD_MODES: Mapping[str, int] = {
    "auto": llama_cpp.LLAMA_LOAD_MODE_AUTO,
    "none": llama_cpp.LLAMA_LOAD_MODE_NONE,
    "mmap": llama_cpp.LLAMA_LOAD_MODE_MMAP,
    "mlock": llama_cpp.LLAMA_LOAD_MODE_MLOCK,
    "mmap+mlock": llama_cpp.LLAMA_LOAD_MODE_MMAP_MLOCK,
    "dio": llama_cpp.LLAMA_LOAD_MODE_DIRECT_IO,
}


@dataclass(frozen=True)
class LoadSettings:
    """Fields of llama.cpp's parameters. `rules` are (pattern, buffer type) of tensors; see `placement`."""

    rules: Sequence[tuple[str, int]]
    n_gpu_layers: int
    load_mode: str
    repack: bool
    flash_attn: str


def has_faulty_amx() -> bool:
    """Whether this ggml has its AMX path, which crashes at its first tile instruction when built with some compilers.

    llama.cpp issue 20824 and pull request 26954. It runs only on repacked weights, so they are left alone then.
    """
    return b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info()


class Loader:
    """Completes the parameters of one `Llama.__init__`, reports its progress and lets `abort_flag` stop it.

    While installed, the C functions that `Llama.__init__` calls last are wrapped; calls from other threads pass
    through unchanged. One construction at a time. Must live as long as the model, which refers to its arrays.
    `failure` is what the progress function raised; llama.cpp stopped loading then.
    """

    _lock = threading.Lock()

    def __init__(self, settings: LoadSettings, progress: Callable[[float], None] | None, abort_flag: AbortFlag) -> None:
        self.settings = settings
        self.progress = progress
        self.abort_flag = abort_flag
        self.failure: BaseException | None = None
        self.context_failed = False
        self.overrides = override_array(settings.rules)
        self._c_progress = llama_cpp.llama_progress_callback(self._on_progress)

    def _on_progress(self, share: float, _user_data: Any) -> bool:
        try:
            if self.progress:
                self.progress(share)
        except BaseException as error:  # it must not pass through C code
            self.failure = error
        return self.failure is None and not self.abort_flag.is_set()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        api = llama_cpp.llama_cpp
        originals: dict[tuple[Any, str], Callable[..., Any]] = {
            (api, "llama_model_load_from_file"): api.llama_model_load_from_file,
            (api, "llama_init_from_model"): api.llama_init_from_model,
            (api, "llama_batch_init"): api.llama_batch_init,
            # It redirects stdout and stderr of the whole process while loading; the log is silent without that.
            (llama_cpp._internals, "suppress_stdout_stderr"): llama_cpp._internals.suppress_stdout_stderr,
        }
        wrappers: tuple[Callable[..., Any], ...] = (
            self._load_model,
            self._init_context,
            self._init_batch,
            self._suppress,
        )
        thread = threading.get_ident()

        def guarded(wrapper: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if threading.get_ident() != thread:
                    return original(*args, **kwargs)
                return wrapper(original, *args, **kwargs)

            return call

        with self._lock:
            for ((module, name), original), wrapper in zip(originals.items(), wrappers, strict=True):
                setattr(module, name, guarded(wrapper, original))
            try:
                yield
            finally:
                for (module, name), original in originals.items():
                    setattr(module, name, original)

    def _load_model(self, original: Callable[..., Any], path: bytes, params: Any) -> Any:
        params.tensor_buft_overrides = ctypes.cast(self.overrides, ctypes.c_void_p)
        params.n_gpu_layers = self.settings.n_gpu_layers
        params.load_mode = LOAD_MODES[self.settings.load_mode]
        params.use_extra_bufts = self.settings.repack and not has_faulty_amx()
        params.progress_callback = self._c_progress
        return original(path, params)

    def _init_context(self, original: Callable[..., Any], model: Any, params: Any) -> Any:
        params.flash_attn_type = FLASH_ATTENTION[self.settings.flash_attn]
        params.no_perf = False
        context = original(model, params)
        self.context_failed = context is None
        return context

    def _init_batch(self, original: Callable[..., Any], n_tokens: int, embd: int, n_seq_max: int) -> Any:
        # Llama asks for as many sequence ids per token as the context has tokens, and uses one.
        return original(n_tokens, embd, 1)

    def _suppress(self, original: Callable[..., Any], disable: bool = True) -> Any:
        return contextlib.nullcontext()
