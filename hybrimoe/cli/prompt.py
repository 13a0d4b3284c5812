"""Where a prompt comes from: arguments, files, stdin."""

from __future__ import annotations

import sys

from hybrimoe.config import Settings
from hybrimoe.errors import UsageError, from_os_error
from hybrimoe.files import read_bytes

_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "'": "'", '"': '"', "\\": "\\"}


def unescape(text: str) -> str:
    """Resolves llama.cpp's escapes (`string_process_escapes`): line break, tab, quotes, \\\\, \\xHH; others stay."""
    parts, i = [], 0
    while i < len(text):
        following = text[i + 1] if i + 1 < len(text) else ""
        if text[i] == "\\" and following in _ESCAPES and following:
            parts.append(_ESCAPES[following])
            i += 2
        elif text[i] == "\\" and following == "x" and _is_hex(text[i + 2 : i + 4]):
            parts.append(chr(int(text[i + 2 : i + 4], 16)))
            i += 4
        else:
            parts.append(text[i])
            i += 1
    return "".join(parts)


def _is_hex(text: str) -> bool:
    return len(text) == 2 and all(c in "0123456789abcdefABCDEF" for c in text)


def decode(data: bytes, source: str) -> str:
    """UTF-8 text, without a byte order mark. Raises UsageError naming the first byte that is none."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{source} is no UTF-8 text (byte {error.start})", "convert it, for example with iconv -t UTF-8"
        ) from None


def read_text(path: str) -> str:
    """A text file's content. Raises UsageError when there is none to read."""
    try:
        data = read_bytes(path)
    except OSError as error:
        raise UsageError(from_os_error(error, f"read '{path}'").message) from error
    return decode(data, f"'{path}'")


def argument_text(text: str) -> str:
    """A command-line argument. Raises UsageError for bytes that are no UTF-8, which Python hides in surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("an argument is no UTF-8 text") from None
    return text


def system_prompt(settings: Settings) -> str:
    """The system prompt, or an empty string."""
    if settings.system_prompt is not None and settings.system_prompt_file is not None:
        raise UsageError("-sys and -sysf cannot be given together")
    if settings.system_prompt_file is not None:
        return read_text(settings.system_prompt_file).removesuffix("\n")
    text = argument_text(settings.system_prompt or "")
    return unescape(text) if settings.escape else text


def one_prompt(settings: Settings, positional: str | None) -> str:
    """The prompt of `run`: the positional, -p, -f or stdin, of which only one may be given. Raises UsageError."""
    given = [name for name, value in (("-p", settings.prompt), ("-f", settings.file)) if value is not None]
    if positional is not None:
        given.insert(0, "'-'" if positional == "-" else "an argument")
    if len(given) > 1:
        raise UsageError(f"the prompt is given twice, by {given[0]} and {given[1]}")
    if settings.prompt is not None:
        text = argument_text(settings.prompt)
        text = unescape(text) if settings.escape else text
    elif settings.file is not None:
        text = read_text(settings.file).removesuffix("\n")
    elif positional is not None and positional != "-":
        text = argument_text(positional)
    else:
        text = _stdin(asked=positional == "-")
    if not text.strip():
        raise UsageError("the prompt is empty", 'for example: hybrimoe run "Why is the sky blue?"')
    return text


def _stdin(asked: bool) -> str:
    if sys.stdin is None or (not asked and sys.stdin.isatty()):
        raise UsageError("there is no prompt", 'for example: hybrimoe run "Why is the sky blue?"')
    return decode(sys.stdin.buffer.read(), "stdin").removesuffix("\n")
