"""Requests: llama-cpp-python's types with what OpenAI's clients send today, checked before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import jinja2
import llama_cpp
from llama_cpp.server.app import prepare_request_resources
from llama_cpp.server.types import CreateChatCompletionRequest, CreateCompletionRequest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hybrimoe.errors import HybrimoeError, UsageError
from hybrimoe.generation import RANDOM_SEED, Sampling
from hybrimoe.server.errors import ApiError

if TYPE_CHECKING:
    from hybrimoe.server.engine import ServerEngine
    from hybrimoe.server.worker import Job

__all__ = ["ChatRequest", "Defaults", "DetokenizeRequest", "TextRequest", "TokenizeRequest", "parse", "work_of"]

_MAX_STOPS = 16
# Request field: field of Sampling. What a request leaves out is as the server was started.
_SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "repeat_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
# Fields that the package's functions do not take.
_NOT_FOR_LLAMA = {
    "n", "best_of", "logit_bias_type", "user", "min_tokens", "stream_options", "max_completion_tokens",
    "cache_prompt",
}  # fmt: skip


class _StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(CreateChatCompletionRequest):  # type: ignore[misc]
    """`POST /v1/chat/completions`."""

    model_config = ConfigDict(strict=False)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stream_options: _StreamOptions | None = None
    cache_prompt: bool = True
    temperature: float = Field(0.8, ge=0, le=100)
    top_k: int = Field(40, ge=0, le=1 << 30)
    seed: int | None = Field(None, ge=-1, le=RANDOM_SEED)


class TextRequest(CreateCompletionRequest):  # type: ignore[misc]
    """`POST /v1/completions`."""

    model_config = ConfigDict(strict=False)
    max_tokens: int | None = Field(16, ge=1)
    stream_options: _StreamOptions | None = None
    cache_prompt: bool = True
    temperature: float = Field(0.8, ge=0, le=100)
    top_k: int = Field(40, ge=0, le=1 << 30)
    seed: int | None = Field(None, ge=-1, le=RANDOM_SEED)
    max_completion_tokens: None = None


class TokenizeRequest(BaseModel):
    """`POST /tokenize` of llama-server (`content`) and `/extras/tokenize` of llama-cpp-python (`input`)."""

    content: str = ""
    input: str = ""
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False
    model: str | None = None


class DetokenizeRequest(BaseModel):
    tokens: list[int]
    model: str | None = None


@dataclass(frozen=True)
class Defaults:
    """How the server was started. `names` are the names under which clients may ask for the model, its own first."""

    names: tuple[str, ...]
    sampling: Sampling
    n_predict: int = -1
    cache_prompt: bool = True


_Request = TypeVar("_Request", bound=BaseModel)


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def parse(kind: type[_Request], body: bytes) -> _Request:
    """The request in `body`. Raises ApiError (400) that names the first field which is wrong, without its value."""
    data = _parse_json(body)
    # Clients send null for what they leave out.
    data = {name: value for name, value in data.items() if value is not None}
    if isinstance(data.get("messages"), list):
        data["messages"] = [_message(m, i) for i, m in enumerate(data["messages"])]
    if "response_format" in data:
        data["response_format"] = _response_format(data["response_format"])
    try:
        request = kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"][:3])
        raise ApiError(
            400, f"'{where}': {first['msg']}", param=str(first["loc"][0]) if first["loc"] else None
        ) from None
    except RecursionError:
        raise ApiError(400, "the request is nested too deeply") from None
    return request


def _parse_json(body: bytes) -> dict[str, Any]:
    try:
        text = body.decode("utf-8")
        data = json.loads(text, parse_constant=_refuse_constant)
        # Escapes can name halves of characters, which have no UTF-8: no tokenizer takes them.
        if "\\ud" in text.lower():
            json.dumps(data, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise ApiError(400, "the request is no UTF-8 text", code="invalid_json") from None
    except UnicodeEncodeError:
        raise ApiError(400, "the request holds halves of characters", code="invalid_json") from None
    except (ValueError, RecursionError):
        raise ApiError(400, "the request is no JSON", code="invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, "the request must be a JSON object", code="invalid_json")
    return data


def _message(message: Any, index: int) -> Any:
    """A message with plain text: chat templates know no lists of parts."""
    if not isinstance(message, dict):
        return message
    message = {name: value for name, value in message.items() if value is not None or name == "content"}
    if message.get("role") == "developer":
        message["role"] = "system"
    parts = message.get("content")
    if isinstance(parts, list):
        texts = []
        for part in parts:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ApiError(400, f"'messages.{index}': this model reads text only", param="messages")
            texts.append(part["text"])
        message["content"] = "\n".join(texts)
    return message


def _response_format(given: Any) -> Any:
    """OpenAI's `json_schema` as the package's `json_object` with a schema."""
    if not isinstance(given, dict) or given.get("type") != "json_schema":
        return given
    holder = given.get("json_schema")
    schema = holder.get("schema") if isinstance(holder, dict) else None
    if not isinstance(schema, dict):
        raise ApiError(400, "'response_format.json_schema.schema' is missing", param="response_format")
    return {"type": "json_object", "schema": schema}


def check(request: ChatRequest | TextRequest, engine: ServerEngine) -> None:
    """What the types cannot say. Raises ApiError; nothing is ignored silently."""
    if request.n not in (None, 1) or getattr(request, "best_of", 1) not in (None, 1):
        raise ApiError(400, "this server gives one answer: 'n' and 'best_of' must be 1", param="n")
    if request.logprobs:
        raise ApiError(400, "this server gives no logprobs", param="logprobs")
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > _MAX_STOPS or any(not stop for stop in stops):
        raise ApiError(400, f"'stop' takes up to {_MAX_STOPS} texts that are not empty", param="stop")
    if request.logit_bias and request.logit_bias_type != "tokens":
        for token in request.logit_bias:
            if not token.isdecimal() or not 0 <= int(token) < engine.n_vocab():
                raise ApiError(400, "'logit_bias' names a token that the model does not have", param="logit_bias")
    if isinstance(request, TextRequest):
        if isinstance(request.prompt, list) and len(request.prompt) != 1:
            raise ApiError(400, "'prompt' must be one text", param="prompt")
    else:
        _check_chat(request)


def _check_chat(request: ChatRequest) -> None:
    if not request.messages:
        raise ApiError(400, "'messages' is empty", param="messages")
    tools = request.tools or []
    if request.tool_choice == "required":
        if len(tools) != 1:
            raise ApiError(400, "'tool_choice': with several tools name one of them", param="tool_choice")
        request.tool_choice = {"type": "function", "function": {"name": tools[0]["function"]["name"]}}
    schemas: list[Any] = []
    if isinstance(request.tool_choice, dict):
        name = request.tool_choice["function"]["name"]
        tool = next((t for t in tools if t["function"]["name"] == name), None)
        if tool is None:
            raise ApiError(400, "'tool_choice' names none of 'tools'", param="tool_choice")
        tool["function"].setdefault("parameters", {"type": "object", "properties": {}})
        schemas.append(tool["function"]["parameters"])
    if request.response_format and request.response_format.get("schema") is not None:
        schemas.append(request.response_format["schema"])
    for schema in schemas:
        try:
            # The package falls back to any JSON without a word.
            llama_cpp.llama_grammar.json_schema_to_gbnf(json.dumps(schema))
        except Exception:
            raise ApiError(400, "the JSON schema cannot be used", code="invalid_schema") from None


def work_of(
    request: ChatRequest | TextRequest, defaults: Defaults
) -> Callable[[ServerEngine, Job], Iterator[dict[str, Any]]]:
    """What the worker does for a request: gives the chunks of a streamed answer, or the one object of another."""

    def work(engine: ServerEngine, job: Job) -> Iterator[dict[str, Any]]:
        arguments = _arguments(request, defaults)
        try:
            # Grammars, biases and the least number of tokens, as the package reads them.
            prepare_request_resources(request, lambda _model: engine, defaults.names[0], arguments)
            is_given = "cache_prompt" in request.model_fields_set
            if not (request.cache_prompt if is_given else defaults.cache_prompt):
                engine.reset()
            is_chat = isinstance(request, ChatRequest)
            answer = (engine.create_chat_completion if is_chat else engine.create_completion)(**arguments)
            if not request.stream:
                yield _completed(answer, job)
                return
            for chunk in answer:
                if chunk["choices"] and chunk["choices"][0].get("finish_reason") is not None:
                    chunk = _completed(chunk, job, usage=False)
                yield chunk
            if request.stream_options and request.stream_options.include_usage:
                head = {name: chunk[name] for name in ("id", "object", "created", "model")}
                yield {**head, "choices": [], "usage": job.usage.to_openai(), "timings": job.usage.timings()}
        except (UsageError, ValueError, jinja2.TemplateError) as error:
            raise _as_api_error(error) from error

    return work


def _arguments(request: ChatRequest | TextRequest, defaults: Defaults) -> dict[str, Any]:
    arguments: dict[str, Any] = request.model_dump(exclude=_NOT_FOR_LLAMA)
    for name, field in _SAMPLING.items():
        if name not in request.model_fields_set:
            arguments[name] = getattr(defaults.sampling, field)
    seed = defaults.sampling.seed if request.seed is None else request.seed
    limits = [n for n in (request.max_tokens, request.max_completion_tokens) if n is not None]
    if isinstance(request, TextRequest) and "max_tokens" not in request.model_fields_set and defaults.n_predict >= 0:
        limits = []
    limits += [defaults.n_predict] if defaults.n_predict >= 0 else []
    arguments |= {
        "model": defaults.names[0],
        "seed": seed & RANDOM_SEED,
        "max_tokens": min(limits) if limits else -1,
    }
    if isinstance(request, TextRequest) and isinstance(request.prompt, list):
        arguments["prompt"] = request.prompt[0]
    return arguments


def _completed(answer: Mapping[str, Any], job: Job, *, usage: bool = True) -> dict[str, Any]:
    """An answer's last object, with what it took and the true reason of its end."""
    done = dict(answer)
    if job.cut:
        done["choices"] = [{**choice, "finish_reason": "length"} for choice in done["choices"]]
    if usage:
        done["usage"] = job.usage.to_openai()
    done["timings"] = job.usage.timings()
    return done


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, HybrimoeError):
        return ApiError(400, error.message)
    text = str(error)
    if "exceed context window" in text:
        return ApiError(400, text, code="context_length_exceeded", param="messages")
    if isinstance(error, jinja2.TemplateError):
        return ApiError(400, "the model's chat template refuses these messages", param="messages")
    return ApiError(400, "the request cannot be used")
