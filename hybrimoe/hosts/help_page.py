"""What a llama.cpp program says of its own flags: releases differ, and `--help` describes the one at hand."""

from __future__ import annotations

import contextlib
import os
import re
import signal
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
# In the explanation of `--gpt-oss-20b-default` and others like it.
_DOWNLOADS = "can download weights"
_DEVICE = re.compile(r"\s+(\S+): .+")


@dataclass(frozen=True)
class Grammar:
    """`n_values`: how many words follow a flag; `downloads`: flags that stand for models of the hub."""

    n_values: Mapping[str, int] = field(default_factory=dict)
    downloads: frozenset[str] = frozenset()

    def knows(self, *flags: str) -> str | None:
        """The first of `flags` that the program has."""
        return next((flag for flag in flags if flag in self.n_values), None)


def parse_help(text: str) -> Grammar:
    """The flags in a help page of llama.cpp's (common/arg.cpp, or llama-bench's own)."""
    n_values: dict[str, int] = {}
    downloads: set[str] = set()
    names: list[str] = []
    about = ""
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            about = f"{about} {line.strip()}"
        else:
            value = match[2] or ""
            n = 0 if not value else 2 if _TWO_VALUES.fullmatch(value) else 1
            names, about = re.split(r"[,\s]+", match[1]), line
            for flag in names:
                n_values.setdefault(flag, n)
        if _DOWNLOADS in about:
            downloads.update(names)
    return Grammar(n_values, frozenset(downloads))


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
        # In a separate session, so that what a wrapper has started ends with it.
        child = subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise HybrimoeError(f"'{question}' cannot be started: {error.strerror}", "try it by hand") from error
    with child:
        try:
            out, err = child.communicate(timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise HybrimoeError(f"'{question}' has not answered for {_PATIENCE_S:.0f} s", "try it by hand") from None
        finally:
            with contextlib.suppress(OSError):
                os.killpg(child.pid, signal.SIGKILL)
    return "\n".join(part.decode("utf-8", "replace") for part in (err, out)), child.returncode
