"""What a llama.cpp program says of its own flags: releases differ, and its `--help` is never wrong about itself."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hybrimoe.errors import HybrimoeError

__all__ = ["Grammar", "ask_devices", "ask_grammar", "parse_devices", "parse_help"]

# A program that looks for devices first may take seconds for it.
_PATIENCE_S = 30.0
# `-ot,   --override-tensor <pattern>=<type>,...`: flags, then after ONE space what stands for the value. More spaces
# end the flags: what follows is the explanation.
_LINE = re.compile(r" {0,4}(-{1,2}[A-Za-z][\w.-]*(?:,? +-{1,2}[A-Za-z][\w.-]*)*)( \S.*)?")
_TWO_VALUES = re.compile(r" [A-Z][A-Z_]* [A-Z][A-Z_]*(?:\s{2,}.*)?")
_DEVICE = re.compile(r"\s+(\S+): .+")


@dataclass(frozen=True)
class Grammar:
    """`n_values`: how many words follow a flag."""

    n_values: Mapping[str, int] = field(default_factory=dict)

    def knows(self, *flags: str) -> str | None:
        """The first of `flags` that the program has."""
        return next((flag for flag in flags if flag in self.n_values), None)


def parse_help(text: str) -> Grammar:
    """The flags in a help page of llama.cpp's (common/arg.cpp, or llama-bench's own)."""
    n_values: dict[str, int] = {}
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        value = match[2] or ""
        n = 0 if not value else 2 if _TWO_VALUES.fullmatch(value) else 1
        for flag in re.split(r"[,\s]+", match[1]):
            n_values.setdefault(flag, n)
    return Grammar(n_values)


def parse_devices(text: str) -> list[str]:
    """ggml's names in what `--list-devices` prints."""
    _, _, listed = text.partition("Available devices:")
    return [match[1] for line in listed.splitlines() if (match := _DEVICE.fullmatch(line))]


def ask_grammar(command: Sequence[str], environment: Mapping[str, str]) -> Grammar:
    """The flags of the program that `command` starts. Raises HybrimoeError when it does not tell."""
    text, code = _ask([*command, "--help"], environment)
    grammar = parse_help(text)
    if not grammar.n_values:
        last = text.strip().splitlines()[-1:]
        reason = last[0] if last else f"it prints nothing and ends with {code}"
        raise HybrimoeError(
            f"'{command[-1]} --help' does not list its flags: {reason}", f"does it start at all? {command[-1]} --help"
        )
    return grammar


def ask_devices(command: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """ggml's names of the accelerators that the program has. Raises HybrimoeError when it does not tell."""
    return parse_devices(_ask([*command, "--list-devices"], environment)[0])


def _ask(command: Sequence[str], environment: Mapping[str, str]) -> tuple[str, int]:
    question = f"{command[-2]} {command[-1]}"
    try:
        done = subprocess.run(
            command, env=dict(environment), stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE_S
        )
    except subprocess.TimeoutExpired:
        raise HybrimoeError(f"'{question}' has not answered for {_PATIENCE_S:.0f} s", "try it by hand") from None
    except OSError as error:
        raise HybrimoeError(f"'{question}' cannot be started: {error.strerror}", "try it by hand") from error
    return "\n".join(part.decode("utf-8", "replace") for part in (done.stderr, done.stdout)), done.returncode
