"""One thread that owns the engine and works through requests in the order in which they came.

All of llama.cpp's work happens in this thread: an OpenMP build keeps a team of threads for every thread that calls it,
and the engine belongs to one thread at a time anyway. Results go to the event loop through queues without bounds (an
answer is no longer than the context), so a client that reads slowly holds up nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hybrimoe.server.errors import ApiError

if TYPE_CHECKING:
    from hybrimoe.server.engine import ServerEngine

__all__ = ["Job", "Totals", "Usage", "Worker"]

_END = object()


@dataclass
class Usage:
    """What one answer took. `n_evaluated` of the prompt's tokens were computed, the others were in the KV cache."""

    n_prompt: int = 0
    n_evaluated: int = 0
    n_generated: int = 0
    prompt_s: float = 0.0
    generation_s: float = 0.0
    experts: dict[str, int] = field(default_factory=dict)

    def to_openai(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.n_prompt,
            "completion_tokens": self.n_generated,
            "total_tokens": self.n_prompt + self.n_generated,
            "prompt_tokens_details": {"cached_tokens": self.n_prompt - self.n_evaluated},
        }

    def timings(self) -> dict[str, Any]:
        """llama-server's names, and `experts`. The first token's time belongs to the prompt."""
        prompt_ms, predicted_ms = 1e3 * self.prompt_s, 1e3 * self.generation_s
        n_after_first = max(0, self.n_generated - 1)
        return {
            "cache_n": self.n_prompt - self.n_evaluated,
            "prompt_n": self.n_evaluated,
            "prompt_ms": round(prompt_ms, 3),
            "prompt_per_second": round(1e3 * self.n_evaluated / prompt_ms, 3) if prompt_ms > 0 else None,
            "predicted_n": self.n_generated,
            "predicted_ms": round(predicted_ms, 3),
            "predicted_per_second": round(1e3 * n_after_first / predicted_ms, 3) if predicted_ms > 0 else None,
            "experts": dict(self.experts),
        }


@dataclass
class Totals:
    """Since the start, over all answers."""

    n_done: int = 0
    n_failed: int = 0
    n_cancelled: int = 0
    n_prompt: int = 0
    n_generated: int = 0
    prompt_s: float = 0.0
    generation_s: float = 0.0


class Job:
    """One request for an answer. `work` gets the engine, in the worker's thread, and gives the chunks of the answer."""

    def __init__(self, work: Callable[[ServerEngine, Job], Iterator[Any]], loop: asyncio.AbstractEventLoop) -> None:
        self.usage = Usage()
        self.cancelled = False
        self.cut = False
        self.work = work
        self._loop = loop
        self._results: asyncio.Queue[Any] = asyncio.Queue()

    def put(self, result: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._results.put_nowait, result)

    async def next(self) -> Any:
        """The next chunk. Raises StopAsyncIteration at the end, and what the work has raised."""
        result = await self._results.get()
        if result is _END:
            raise StopAsyncIteration
        if isinstance(result, BaseException):
            raise result
        return result

    async def results(self) -> AsyncIterator[Any]:
        with contextlib.suppress(StopAsyncIteration):
            while True:
                yield await self.next()


class Worker:
    """Loads the engine in a thread of its own and answers requests there until it is stopped.

    Args:
        opens: a context manager that gives the loaded engine; called in the thread.
        max_waiting: more requests than that are refused.
    """

    def __init__(
        self, opens: Callable[[], contextlib.AbstractContextManager[ServerEngine]], *, max_waiting: int
    ) -> None:
        self.engine: ServerEngine | None = None
        self.failure: BaseException | None = None
        self.totals = Totals()
        self.max_waiting = max_waiting
        self.on_ready: Callable[[ServerEngine], None] = lambda engine: None
        self.on_end: Callable[[], None] = lambda: None
        self._opens = opens
        self._waiting: deque[Job] = deque()
        self._current: Job | None = None
        self._stopping = False
        self._n_borrowers = 0
        self._wakes = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="hybrimoe-engine")

    def start(self) -> None:
        self._thread.start()

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_busy(self) -> bool:
        return self._current is not None

    @property
    def is_stopping(self) -> bool:
        return self._stopping

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[ServerEngine]:
        """The engine for what does not compute, such as its vocabulary; it is not closed meanwhile.

        Raises ApiError while there is none.
        """
        with self._wakes:
            engine = self.engine
            if engine is None:
                raise ApiError(503, "the server is " + ("stopping" if self._stopping else "loading the model"))
            self._n_borrowers += 1
        try:
            yield engine
        finally:
            with self._wakes:
                self._n_borrowers -= 1
                self._wakes.notify_all()

    def _take_back(self) -> None:
        with self._wakes:
            self.engine = None
            while self._n_borrowers:
                self._wakes.wait()

    def submit(self, job: Job) -> None:
        """Raises ApiError when the queue is full or the server stops."""
        with self._wakes:
            if self._stopping or self.engine is None:
                raise ApiError(503, "the server is " + ("stopping" if self._stopping else "loading the model"))
            if len(self._waiting) >= self.max_waiting:
                raise ApiError(503, f"{len(self._waiting)} requests are waiting already", code="queue_full")
            self._waiting.append(job)
            self._wakes.notify_all()

    def cancel(self, job: Job) -> None:
        """Nobody wants this answer any more: it is not begun, or stops as soon as llama.cpp asks."""
        with self._wakes:
            job.cancelled = True
            with contextlib.suppress(ValueError):
                self._waiting.remove(job)
                self.totals.n_cancelled += 1
            if self._current is job and self.engine is not None:
                self.engine.abort_flag.set()

    def stop(self, grace_s: float) -> None:
        """Takes no more requests; after `grace_s` those that are left are cut. Returns at once."""
        with self._wakes:
            self._stopping = True
            self._wakes.notify_all()
        if grace_s <= 0:
            self.cut()
        else:
            timer = threading.Timer(grace_s, self.cut)
            timer.daemon = True
            timer.start()

    def cut(self) -> None:
        """Ends the running answer with what it has, and those that wait without one."""
        with self._wakes:
            self._stopping = True
            for job in self._waiting:
                job.put(ApiError(503, "the server is stopping"))
            self._waiting.clear()
            if self._current is not None:
                self._current.cut = True
                if self.engine is not None and not self._current.usage.n_generated:
                    self.engine.abort_flag.set()  # a prompt; between two tokens the flag would only lose one
            self._wakes.notify_all()

    def join(self, timeout_s: float | None = None) -> bool:
        """Waits for the thread, which closes the engine. Returns whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            with self._opens() as engine:
                self.engine = engine
                self.on_ready(engine)
                try:
                    while (job := self._next()) is not None:
                        self._work(engine, job)
                finally:
                    self._take_back()
        except BaseException as error:
            self.failure = error
        finally:
            self.engine = None
            self.on_end()

    def _next(self) -> Job | None:
        with self._wakes:
            while not self._waiting:
                if self._stopping:
                    return None
                self._wakes.wait()
            self._current = self._waiting.popleft()
            return self._current

    def _work(self, engine: ServerEngine, job: Job) -> None:
        from hybrimoe.server.engine import JobCancelledError

        engine.job = job
        try:
            chunks = job.work(engine, job)
            with contextlib.closing(chunks):  # type: ignore[type-var]
                for chunk in chunks:
                    job.put(chunk)
                    if job.cancelled:
                        raise JobCancelledError
            self.totals.n_done += 1
            job.put(_END)
        except JobCancelledError:
            self.totals.n_cancelled += 1
            job.put(_END)
        except Exception as error:
            self.totals.n_failed += 1
            job.put(error)
        finally:
            engine.job = None
            with self._wakes:
                self._current = None
                engine.abort_flag.clear()
            self._count(job.usage)

    def _count(self, usage: Usage) -> None:
        totals = self.totals
        totals.n_prompt += usage.n_evaluated
        totals.n_generated += usage.n_generated
        totals.prompt_s += usage.prompt_s
        totals.generation_s += usage.generation_s
