"""`hybrimoe serve`: an OpenAI-compatible server."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe.cli.console import note, warn
from hybrimoe.cli.loading import load_engine, model_path, sampling
from hybrimoe.config import Settings, parse_size
from hybrimoe.errors import HybrimoeError, UsageError, from_os_error
from hybrimoe.files import read_text

if TYPE_CHECKING:
    from hybrimoe.server.engine import ServerEngine
    from hybrimoe.server.worker import Job

_NEEDS = ("fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings", "prometheus_client")


def serve(settings: Settings, positionals: list[str]) -> int:
    """Serves until a signal. Returns the exit code."""
    if len(positionals) > 1:
        raise UsageError(f"unexpected argument '{positionals[1]}'", "hybrimoe serve takes one model")
    if positionals and settings.sources["model"] == "flag":
        raise UsageError(f"the model is given twice, by -m and by '{positionals[0]}'")
    check_packages()
    api_key = _api_key(settings)
    from hybrimoe.server.run import bind

    with bind(settings.host, settings.port) as bound:
        path = model_path(positionals[0] if positionals else settings.model)
        return _serve(settings, path, api_key, bound)


def check_packages() -> None:
    """Raises HybrimoeError where a package that servers need is missing."""
    for name in _NEEDS:
        try:
            importlib.import_module(name)
        except ImportError:
            raise HybrimoeError(
                f"the server needs the package {name.replace('_', '-')}", "pip install 'hybrimoe[server]'"
            ) from None


def _api_key(settings: Settings) -> str | None:
    key: str | None = settings.api_key
    if settings.api_key_file is not None:
        if settings.sources["api_key"] == "flag":
            raise UsageError("the key is given twice, by --api-key and by --api-key-file")
        try:
            key = read_text(settings.api_key_file).partition("\n")[0].strip()
        except OSError as error:
            raise from_os_error(error, f"read '{settings.api_key_file}'") from error
        except UnicodeDecodeError:
            raise UsageError(f"'{settings.api_key_file}' is no UTF-8 text") from None
    if key is not None and not key:
        raise UsageError("the API key is empty", "leave --api-key out to have none")
    return key


def _serve(settings: Settings, path: Path, api_key: str | None, bound: Any) -> int:
    from hybrimoe.gguf_model import inspect
    from hybrimoe.live.host import Host
    from hybrimoe.live.snapshot import LiveSampler
    from hybrimoe.server.app import Service
    from hybrimoe.server.gate import Limits, is_loopback
    from hybrimoe.server.metrics import Metrics
    from hybrimoe.server.requests import Defaults
    from hybrimoe.server.run import ServerOptions, serve, shown_url
    from hybrimoe.server.worker import Worker

    inspect(path).require_moe()  # what is wrong with the file is said before anything listens
    names = tuple(dict.fromkeys((settings.alias or path.stem, path.stem, path.name)))
    url = shown_url(bound)

    @contextlib.contextmanager
    def opens() -> Iterator[ServerEngine]:
        from hybrimoe.server.engine import ServerEngine

        def stop_loading() -> None:
            if worker.is_stopping:
                raise KeyboardInterrupt

        with load_engine(settings, path, ServerEngine, stop_loading) as engine:
            yield engine

    worker = Worker(opens, max_waiting=settings.max_waiting)
    host = Host(None, "serve", lambda: _activity(worker, url), model=names[0])

    def on_ready(engine: ServerEngine) -> None:
        host.engine = engine
        engine.on_event = note
        for line in engine.new_expert_events():
            note(line)
        note(f"{names[0]} answers at {url} (page at /, OpenAI's interface at /v1; Ctrl-C stops)")

    worker.on_ready = on_ready
    service = Service(
        worker,
        LiveSampler(host.read),
        # What an earlier request left in the KV cache was rounded by other kernels (docs/reproducibility.md).
        Defaults(names, sampling(settings), settings.n_predict, cache_prompt=not settings.reproducible),
        Metrics(host.read) if settings.metrics else None,
        on_failure=lambda error: _log_failure(error, settings.verbose),
        on_answer=_log_answer,
    )
    limits = Limits(parse_size(settings.max_request), settings.request_timeout)
    header_s = min(15.0, settings.request_timeout)
    options = ServerOptions(settings.host, settings.port, api_key, limits, header_s, settings.grace)
    if api_key is None and not is_loopback(settings.host):
        warn(f"everybody who can reach {settings.host} can use this server", "set LLAMA_API_KEY, or --host 127.0.0.1")
    with host:
        if settings.live:
            host.serve()
        return serve(service, options, bound, note)


def _activity(worker: Any, url: str) -> dict[str, Any]:
    totals = worker.totals
    return {
        "url": url,
        "requests": {
            "running": int(worker.is_busy),
            "waiting": worker.n_waiting,
            "done": totals.n_done,
            "failed": totals.n_failed,
            "cancelled": totals.n_cancelled,
        },
        "answers": {
            "prompt_tokens": totals.n_prompt,
            "prompt_s": totals.prompt_s,
            "generated_tokens": totals.n_generated,
            "generation_s": totals.generation_s,
        },
    }


def _log_answer(job: Job, end: str, seconds: float) -> None:
    """One line without anything of what was asked or answered."""
    usage = job.usage
    speed = f", {(usage.n_generated - 1) / usage.generation_s:.1f} t/s" if usage.generation_s > 0 else ""
    note(f"{end}: {usage.n_prompt} + {usage.n_generated} tokens in {seconds:.1f} s{speed}")


def _log_failure(error: BaseException, verbose: bool) -> None:
    """Where it happened, but not what it says: messages may quote the request."""
    import traceback

    if verbose:
        traceback.print_exception(error)
        return
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    note(f"error: {type(error).__name__}{where}", "run with -v for the traceback")
