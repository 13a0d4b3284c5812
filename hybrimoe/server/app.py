"""The application: OpenAI's paths, llama-server's, the live view and the page."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from hybrimoe.server.errors import ApiError, error_body, error_response
from hybrimoe.server.metrics import CONTENT_TYPE, Metrics
from hybrimoe.server.requests import (
    ChatRequest,
    Defaults,
    DetokenizeRequest,
    TextRequest,
    TokenizeRequest,
    check,
    parse,
    work_of,
)
from hybrimoe.server.worker import Job, Worker

if TYPE_CHECKING:
    from hybrimoe.live.snapshot import LiveSampler

__all__ = ["Service", "add_errors", "add_live", "add_page", "make_app"]

_PING_S = 10.0
_PING = b": waiting\n\n"
_LIVE_PERIOD_S = 1.0
_PAGE = {"page.js": "text/javascript", "page.css": "text/css", "icon.svg": "image/svg+xml"}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass
class Service:
    """Everything that the application's paths use."""

    worker: Worker
    sampler: LiveSampler
    defaults: Defaults
    metrics: Metrics | None = None
    on_failure: Callable[[BaseException], None] = lambda error: None
    on_answer: Callable[[Job, str, float], None] = lambda job, end, seconds: None
    created: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.defaults.names:
            known = self.defaults.names[0]
            raise ApiError(404, f"there is no such model here; this server has '{known}'", code="model_not_found")


def make_app(service: Service) -> FastAPI:
    """The application, without what `Gate` checks before it."""
    app = FastAPI(title="hybrimoe", docs_url=None, redoc_url=None, openapi_url=None)
    add_errors(app, service.on_failure)
    _add_answers(app, service)
    _add_tokens(app, service)
    _add_state(app, service)
    add_live(app, service.sampler, service.metrics, lambda: service.worker.is_stopping)
    add_page(app)
    return app


def add_errors(app: FastAPI, on_failure: Callable[[BaseException], None]) -> None:
    """Errors in OpenAI's form."""

    @app.exception_handler(ApiError)
    async def api_error(_request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def http_error(_request: Request, error: HTTPException) -> Response:
        return error_response(ApiError(error.status_code, str(error.detail).lower()))

    @app.exception_handler(Exception)
    async def any_error(_request: Request, error: Exception) -> Response:
        on_failure(error)
        return error_response(ApiError(500, "the server failed; its log says more"))


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(service, request, parse(ChatRequest, await request.body()))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(service, request, parse(TextRequest, await request.body()))


async def _answer(service: Service, request: Request, asked: ChatRequest | TextRequest) -> Response:
    service.check_model(asked.model)

    def check_all() -> None:
        with service.worker.borrowed() as engine:
            check(asked, engine)

    await run_in_threadpool(check_all)
    job = Job(work_of(asked, service.defaults), asyncio.get_running_loop())
    service.worker.submit(job)
    log = _Log(service, job)
    try:
        first = await _unless_disconnected(request, job, _PING_S if asked.stream else None)
    except BaseException as error:
        service.worker.cancel(job)
        log.end(error)
        if isinstance(error, (ApiError, _ClientGoneError)):
            return error_response(error) if isinstance(error, ApiError) else Response(status_code=499)
        raise
    if not asked.stream:
        log.end(None)
        return JSONResponse(first)
    return StreamingResponse(
        _events(service, job, first, log),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


class _ClientGoneError(Exception):
    """The client closed the connection."""


class _Log:
    """Says once how an answer ended."""

    def __init__(self, service: Service, job: Job) -> None:
        self._service, self._job, self._start = service, job, time.monotonic()
        self._ended = False

    def end(self, error: BaseException | None) -> None:
        if self._ended:
            return
        self._ended = True
        end = "cut" if self._job.cut else "done"
        if error is not None:
            gone = isinstance(error, (_ClientGoneError, asyncio.CancelledError, GeneratorExit))
            end = "client left" if gone else f"{error.status}" if isinstance(error, ApiError) else "failed"
        self._service.on_answer(self._job, end, time.monotonic() - self._start)


async def _unless_disconnected(request: Request, job: Job, patience_s: float | None) -> Any:
    """The job's first result; None when it is not there after `patience_s`. Raises _ClientGoneError."""
    result = asyncio.ensure_future(job.next())
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({result, gone}, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            try:
                return result.result()
            except StopAsyncIteration:
                raise _ClientGoneError from None
        if gone.done():
            raise _ClientGoneError
        return None
    finally:
        for task in (result, gone):
            task.cancel()
            with contextlib.suppress(BaseException):
                await task


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(service: Service, job: Job, first: Any, log: _Log) -> AsyncIterator[bytes]:
    """The answer as server-sent events. When it is left early, the job ends."""
    failure: BaseException | None = asyncio.CancelledError()
    try:
        if first is not None:
            yield _event(first)
        while True:
            # `next` must not be cancelled while it waits, it might lose a chunk; `wait` leaves it alone.
            upcoming = asyncio.ensure_future(job.next())
            try:
                while not (await asyncio.wait({upcoming}, timeout=_PING_S))[0]:
                    yield _PING
                chunk = upcoming.result()
            except StopAsyncIteration:
                break
            finally:
                upcoming.cancel()
            yield _event(chunk)
        failure = None
        yield b"data: [DONE]\n\n"
    except (asyncio.CancelledError, GeneratorExit):
        raise
    except Exception as error:
        failure = error
        if not isinstance(error, ApiError):
            service.on_failure(error)
            error = ApiError(500, "the server failed; its log says more")
        yield _event(error_body(error))
    finally:
        service.worker.cancel(job)
        log.end(failure)


def _event(data: Any) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _add_tokens(app: FastAPI, service: Service) -> None:
    async def tokens_of(request: Request, *, with_pieces: bool = True) -> list[Any]:
        asked = parse(TokenizeRequest, await request.body())
        service.check_model(asked.model)
        text = (asked.content or asked.input).encode()

        def tokenized() -> list[Any]:
            with service.worker.borrowed() as engine:
                tokens = list(engine.tokenize(text, add_bos=asked.add_special, special=asked.parse_special))
                if not (asked.with_pieces and with_pieces):
                    return tokens
                return [{"id": token, "piece": _piece(engine.token_bytes(token, special=True))} for token in tokens]

        return await run_in_threadpool(tokenized)

    @app.post("/tokenize")
    @app.post("/extras/tokenize")
    async def tokenize(request: Request) -> Any:
        return {"tokens": await tokens_of(request)}

    @app.post("/extras/tokenize/count")
    async def count(request: Request) -> Any:
        return {"count": len(await tokens_of(request, with_pieces=False))}

    @app.post("/detokenize")
    @app.post("/extras/detokenize")
    async def detokenize(request: Request) -> Any:
        asked = parse(DetokenizeRequest, await request.body())
        service.check_model(asked.model)

        def text_of() -> str:
            with service.worker.borrowed() as engine:
                if any(not 0 <= token < engine.n_vocab() for token in asked.tokens):
                    raise ApiError(400, "'tokens' holds a token that the model does not have", param="tokens")
                data = b"".join(engine.token_bytes(token, special=True) for token in asked.tokens)
                return data.decode(errors="replace")

        text = await run_in_threadpool(text_of)
        return {"content": text, "text": text}


def _piece(data: bytes) -> Any:
    """Text, or the bytes of what is only a part of a character, as llama-server gives them."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    @app.get("/v1/health")
    async def health() -> Any:
        with service.worker.borrowed():
            return {"status": "ok"}

    @app.get("/v1/models")
    @app.get("/models")
    async def models() -> Any:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        service.check_model(name)
        return _model(service)


def _model(service: Service) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "id": service.defaults.names[0],
        "object": "model",
        "created": service.created,
        "owned_by": "hybrimoe",
    }
    with contextlib.suppress(ApiError), service.worker.borrowed() as engine:
        info = engine.info
        entry["meta"] = {
            "n_vocab": engine.n_vocab(),
            "n_ctx": engine.n_ctx(),
            "n_ctx_train": info.n_ctx_train,
            "n_embd": info.n_embd,
            "n_params": info.n_params,
            "size": info.total_bytes,
            "n_experts": info.n_experts,
            "n_experts_used": info.n_experts_used,
        }
    return entry


def add_live(
    app: FastAPI, sampler: LiveSampler, metrics: Metrics | None, is_stopping: Callable[[], bool] = lambda: False
) -> None:
    """Snapshots at /live, one a second at /live/stream, figures for Prometheus at /metrics."""

    @app.get("/live")
    async def live() -> Any:
        return JSONResponse(await run_in_threadpool(sampler.snapshot), headers={"Cache-Control": "no-store"})

    @app.get("/live/stream")
    async def live_stream() -> Response:
        async def events() -> AsyncIterator[bytes]:
            while not is_stopping():
                yield _event(await run_in_threadpool(sampler.snapshot))
                await asyncio.sleep(_LIVE_PERIOD_S)

        return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    if metrics is not None:

        @app.get("/metrics")
        async def figures() -> Response:
            return Response(await run_in_threadpool(metrics.text), media_type=CONTENT_TYPE)


def add_page(app: FastAPI) -> None:
    """The page for people and its files."""
    folder = resources.files("hybrimoe.server") / "static"
    page = (folder / "index.html").read_bytes()
    # Names from requests are only looked up here: they never reach the file system.
    files = {name: ((folder / name).read_bytes(), kind) for name, kind in _PAGE.items()}

    @app.get("/")
    async def index() -> Response:
        return Response(page, media_type="text/html", headers=_PAGE_HEADERS)

    @app.get("/static/{name}")
    async def static(name: str) -> Response:
        if name not in files:
            raise ApiError(404, "there is no such file")
        content, kind = files[name]
        return Response(content, media_type=kind, headers=_PAGE_HEADERS)

    @app.get("/favicon.ico")
    async def icon() -> Response:
        return Response(files["icon.svg"][0], media_type="image/svg+xml", headers=_PAGE_HEADERS)
