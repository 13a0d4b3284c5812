"""What a command of ours says of itself to those who watch, through the plug-in's observer."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import HybrimoeError
from hybrimoe.native.plugin import Library, plugin_library

if TYPE_CHECKING:
    from hybrimoe.engine import Engine

__all__ = ["Host"]

_PERIOD_S = 0.5


class Host:
    """Hands the facts of this process to the plug-in, twice a second where they change, until `close`.

    Args:
        engine: a loaded engine, or None while it is loaded (set `engine` then).
        command: what runs it: 'serve', 'chat' or 'run'.
        more: what else belongs into every snapshot, such as the number of requests.
        model: the model's name while it is loaded.

    Raises PluginError when the plug-in's library is missing or damaged.
    """

    def __init__(
        self, engine: Engine | None, command: str, more: Callable[[], dict[str, Any]] = dict, *, model: str = ""
    ) -> None:
        self.engine = engine
        self._command = command
        self._more = more
        self._model = model
        self._library: Library = plugin_library()
        self._told: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def serve(self) -> None:
        """Lets others of this user watch from now on."""
        self._library.configure(observe=True, log_to_stderr=False)
        self.publish()
        self._thread = threading.Thread(target=self._loop, name="hybrimoe-facts", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Nothing is handed over any more. Further calls do nothing."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def publish(self) -> None:
        """Hands the facts over. Thread-safe."""
        with self._lock:
            facts = self._facts()
            if facts != self._told:
                self._library.set_host_facts(facts)
                self._told = facts

    def read(self, after: int = 0) -> dict[str, Any]:
        """The raw snapshot of now, with the events after a number. Thread-safe."""
        self.publish()
        return self._library.snapshot(f"after={after}")

    @property
    def is_watchable(self) -> bool:
        return self._library.snapshot("events")["socket"] is not None

    def _loop(self) -> None:
        while not self._ended.wait(_PERIOD_S):
            with contextlib.suppress(HybrimoeError):
                self.publish()

    def _facts(self) -> dict[str, Any]:
        engine = self.engine
        head = {"command": self._command, **self._more()}
        if engine is None:
            return {**head, "phase": "loading", "model": {"name": self._model}}
        info = engine.info
        return {
            **head,
            "phase": engine.phase,
            "plugin": engine.plugin is not None,
            "instance": engine.plugin_instance,
            "model_file": str(info.path),
            "model": {
                "name": info.name,
                "architecture": info.architecture,
                "file_type": info.file_type,
                "n_layers": info.n_layers,
                "n_moe_layers": len(info.moe_layer_indices),
                "n_experts": info.n_experts,
                "top_k": info.n_experts_used,
            },
            "context": {"n_ctx": engine.context_size, "n_tokens": int(engine.n_tokens)},
            "tokens": {
                "prompt": engine.n_prompt_tokens,
                "generated": engine.n_generated,
                "prompt_s": engine.prompt_s,
                "generation_s": engine.generation_s,
            },
        }
