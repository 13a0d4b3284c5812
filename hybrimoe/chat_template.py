"""Chat templates, rendered where they can do no harm: in a child process with limits on time, memory and output.

A template comes with the model and is a program. Jinja's sandbox keeps it from Python's objects, files and modules, but
bounds neither its time nor its memory: loops nest, and `9 ** (9 ** 9)` is computed while the template is compiled. So
it is compiled and rendered in a child that is ended when it takes too long; the next conversation gets a new one. The
child has no state of this process, imports no llama.cpp and ends with it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2

__all__ = ["BoundedFormatter", "TemplateError", "TemplateProcess"]

LIMIT_S = 10.0
# Starting the child takes a fraction of a second, unless the machine is busy.
START_LIMIT_S = 60.0
MOST_CHARACTERS = 16 << 20
MEMORY_BYTES = 1 << 30


class TemplateError(jinja2.TemplateError):
    """The template refuses the conversation, is malformed, or went beyond a limit; the text says what."""


class TemplateProcess:
    """The child, started when it is first needed (or by `start`). Thread-safe.

    Args:
        limit_s: for one rendering, compilation included.
        most_characters: of a prompt.
        memory_bytes: address space of the child.
    """

    def __init__(
        self, *, limit_s: float = LIMIT_S, most_characters: int = MOST_CHARACTERS, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        self._limits = {"limit_s": limit_s, "most_characters": most_characters, "memory_bytes": memory_bytes}
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False

    def start(self) -> None:
        """Starts the child, which gets ready while this process goes on. Raises OSError."""
        with self._lock:
            self._start()

    def close(self) -> None:
        with self._lock:
            self._end()

    def check(self, template: str) -> None:
        """Compiles a template. Raises TemplateError, OSError."""
        self._ask({"template": template})

    def render(self, template: str, arguments: Mapping[str, Any]) -> str:
        """The text that a template makes of its arguments, which must be JSON-able. Raises TemplateError, OSError."""
        return str(self._ask({"template": template, "arguments": arguments}))

    def _ask(self, request: Mapping[str, Any]) -> Any:
        data = json.dumps(request).encode() + b"\n"
        with self._lock:
            process = self._start()
            try:
                if not self._is_ready:
                    self._read_line(process, START_LIMIT_S)
                    self._is_ready = True
                assert process.stdin is not None
                process.stdin.write(data)
                process.stdin.flush()
                answer = json.loads(self._read_line(process, self._limit_s))
            except (EOFError, BrokenPipeError):
                code = self._end()
                reason = "uses too much memory or time" if code in (-signal.SIGALRM, -signal.SIGKILL) else "ended"
                raise TemplateError(f"it {reason} (its process ended with {code})") from None
            except BaseException:
                self._end()  # an answer that comes late must not be taken for the next one's
                raise
        if "error" in answer:
            raise TemplateError(answer["error"])
        return answer["text"]

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            # A session of its own: Ctrl-C is for the chat, not for its template.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hybrimoe.chat_template", json.dumps(self._limits)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._is_ready = False
        return self._process

    def _end(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
        if process.poll() is None:
            process.kill()
        return process.wait()

    def _read_line(self, process: subprocess.Popen[bytes], limit_s: float) -> bytes:
        """Raises EOFError when the child ends, TemplateError when it takes too long."""
        assert process.stdout is not None
        end, parts = time.monotonic() + limit_s, []
        while True:
            left = end - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                raise TemplateError(f"it does not come to an end within {limit_s:g} s")
            part = os.read(process.stdout.fileno(), 1 << 20)
            if not part:
                raise EOFError
            parts.append(part)
            if part.endswith(b"\n"):
                return b"".join(parts)


class BoundedFormatter:
    """Stands for llama-cpp-python's formatter of templates, with the limits of `process`."""

    def __init__(
        self,
        process: TemplateProcess,
        template: str,
        eos_token: str,
        bos_token: str,
        add_generation_prompt: bool = True,
        stop_token_ids: Sequence[int] | None = None,
    ) -> None:
        self.template = template
        self._process = process
        self._fixed = {
            "eos_token": eos_token,
            "bos_token": bos_token,
            "add_generation_prompt": add_generation_prompt,
        }
        self._stops = None if stop_token_ids is None else frozenset(stop_token_ids)

    def check(self) -> None:
        self._process.check(self.template)

    def __call__(self, *, messages: Sequence[Mapping[str, Any]], **more: Any) -> Any:
        import llama_cpp
        from llama_cpp import llama_chat_format

        names = ("functions", "function_call", "tools", "tool_choice")
        arguments = {**dict.fromkeys(names), **more, **self._fixed, "messages": list(messages)}
        stops, criteria = self._stops, None
        if stops is not None:
            criteria = llama_cpp.StoppingCriteriaList([lambda tokens, _logits: int(tokens[-1]) in stops])
        return llama_chat_format.ChatFormatterResponse(
            prompt=self._process.render(self.template, arguments),
            stop=[str(self._fixed["eos_token"])],
            stopping_criteria=criteria,
            added_special=True,
        )

    def to_chat_handler(self) -> Any:
        from llama_cpp import llama_chat_format

        return llama_chat_format.chat_formatter_to_chat_completion_handler(self)


@contextlib.contextmanager
def bounded_templates(process: TemplateProcess) -> Iterator[None]:
    """While llama-cpp-python loads a model, the templates that it finds are compiled in `process`, not here."""
    from llama_cpp import llama_chat_format

    original: Any = llama_chat_format.Jinja2ChatFormatter
    thread = threading.get_ident()

    # A class, because the original refers to itself by the name that is replaced.
    class Formatter(original):  # type: ignore[misc]
        def __new__(cls, *arguments: Any, **named: Any) -> Any:
            if threading.get_ident() != thread:
                return super().__new__(cls)
            return BoundedFormatter(process, *arguments, **named)

    llama_chat_format.Jinja2ChatFormatter = Formatter
    try:
        yield
    finally:
        llama_chat_format.Jinja2ChatFormatter = original


# In the child.


def _environment() -> Any:
    """What templates may use, as in Transformers: the sandbox, loop controls, `tojson` without HTML's escapes."""
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what a model has said, for training; its content is what counts here."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def tojson(value: Any, ensure_ascii: bool = False, **named: Any) -> str:
        known = {name: named[name] for name in ("indent", "separators", "sort_keys") if name in named}
        return json.dumps(value, ensure_ascii=ensure_ascii, **known)

    def raise_exception(message: Any) -> None:
        raise jinja2.TemplateError(str(message))

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment


def _answer(request: Mapping[str, Any], environment: Any, most_characters: int) -> dict[str, str]:
    try:
        template = environment.from_string(request["template"])
        if "arguments" not in request:
            return {"text": ""}
        parts, n = [], 0
        for part in template.generate(**request["arguments"]):
            parts.append(part)
            n += len(part)
            if n > most_characters:
                return {"error": f"it writes more than {most_characters} characters"}
        text = "".join(parts)
        text.encode()
        return {"text": text}
    except MemoryError:
        return {"error": "it uses too much memory"}
    except RecursionError:
        return {"error": "it nests too deeply"}
    except Exception as error:
        return {"error": f"{error}"[:500] or type(error).__name__}


def _serve(limits: Mapping[str, Any]) -> None:
    import resource

    environment = _environment()
    environment.from_string("{{ 1 }}").render()
    memory_bytes = int(limits["memory_bytes"])
    _, most_bytes = resource.getrlimit(resource.RLIMIT_AS)
    if most_bytes != resource.RLIM_INFINITY:  # inherited, and not to be raised again
        memory_bytes = min(memory_bytes, most_bytes)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = sys.stdout.buffer
    out.write(b"{}\n")
    out.flush()
    for line in sys.stdin.buffer:
        # Ends this process in the middle of whatever it does, even if its parent is gone.
        signal.setitimer(signal.ITIMER_REAL, float(limits["limit_s"]) + 1.0)
        answer = _answer(json.loads(line), environment, int(limits["most_characters"]))
        out.write(json.dumps(answer).encode() + b"\n")
        out.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
