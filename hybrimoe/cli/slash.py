"""The chat's slash commands."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybrimoe.cli.flags import SAMPLING_OPTIONS
from hybrimoe.cli.prompt import read_text
from hybrimoe.cli.report import residency_table, stats_text
from hybrimoe.cli.session import Session
from hybrimoe.config import Option
from hybrimoe.errors import UsageError
from hybrimoe.generation import RANDOM_SEED


@dataclass(frozen=True)
class Result:
    """What a command leads to. `text` is shown to the user; `attachment` goes before the next message."""

    text: str = ""
    leave: bool = False
    regenerate: bool = False
    attachment: str = ""


@dataclass(frozen=True)
class Command:
    run: Callable[[Session, str], Result]
    argument: str
    help: str


# /set's keys beside the sampling fields, whose names are those of the flags.
_SETTABLE = {option.key: option for option in SAMPLING_OPTIONS}
_FIELDS = {"typical": "typical_p"}


def execute(session: Session, line: str) -> Result:
    """Runs a line that begins with a slash. Raises UsageError for unknown commands and wrong arguments."""
    name, _, argument = line.strip().partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise UsageError(f"unknown command {name}", f"did you mean {near[0]}?" if near else "/help lists them")
    argument = argument.strip()
    if argument and not command.argument:
        raise UsageError(f"{name} takes no argument", "/help lists the commands")
    return command.run(session, argument)


def _help(_session: Session, _argument: str) -> Result:
    shown = [(f"{name} {c.argument}".strip(), c.help) for name, c in COMMANDS.items() if c.help]
    width = max(len(usage) for usage, _ in shown)
    lines = [f"{usage.ljust(width)}  {text}" for usage, text in shown]
    lines.append('""" begins and ends a message of several lines; Ctrl-C stops an answer, Ctrl-D leaves')
    return Result("\n".join(lines))


def _exit(_session: Session, _argument: str) -> Result:
    return Result(leave=True)


def _clear(session: Session, _argument: str) -> Result:
    session.clear()
    return Result("the conversation starts anew")


def _regenerate(session: Session, _argument: str) -> Result:
    if not session.messages:
        raise UsageError("there is no answer to repeat")
    return Result(regenerate=True)


def _read(_session: Session, argument: str) -> Result:
    text = read_text(_path(argument, "/read"))
    if not text.strip():
        raise UsageError(f"'{argument}' is empty")
    return Result(f"read {len(text)} characters; they go with your next message", attachment=text)


def _set(session: Session, argument: str) -> Result:
    key, _, text = argument.partition(" ")
    key, text = key.lstrip("-").replace("_", "-"), text.strip()
    if key in ("system", "system-prompt"):
        session.system = text
        return Result("system prompt set" if text else "system prompt removed")
    option = next((o for o in _SETTABLE.values() if key in o.long_names), None)
    if option is None:
        hint = f"known are: {', '.join(settable_keys())}"
        raise UsageError(f"unknown setting '{key}'" if key else "/set needs a key", hint)
    if not text:
        raise UsageError(f"/set {key} needs a value", option.help)
    value = option.value(text, f"/set {key}")
    if option.key == "n-predict":
        session.n_predict = value
    else:
        changed: Mapping[str, Any] = {_field(option): value & RANDOM_SEED if option.key == "seed" else value}
        session.sampling = replace(session.sampling, **changed)
    return Result(f"{option.key} = {text}")


def settable_keys() -> list[str]:
    """Keys that /set knows."""
    return ["system", *_SETTABLE]


def _field(option: Option) -> str:
    return _FIELDS.get(option.key, option.name)


def _show(session: Session, _argument: str) -> Result:
    info, engine = session.engine.info, session.engine
    shape = f"{info.n_layers} layers, {info.n_experts} experts, top-{info.n_experts_used}"
    lines = [
        f"model {info.name} ({info.architecture}, {info.file_type}, {shape})",
        f"file {info.path}",
        f"context {engine.n_ctx()} tokens, {engine.n_tokens} in the KV cache, {len(session.messages)} messages",
        f"experts run in {'the HybriMoE plug-in' if engine.plugin else 'llama.cpp (the plug-in is off)'}",
        f"system prompt {session.system!r}" if session.system else "no system prompt",
        f"n-predict = {session.n_predict}",
    ]
    for option in _SETTABLE.values():
        if option.key != "n-predict":
            value = getattr(session.sampling, _field(option))
            lines.append(f"{option.key} = {'random' if option.key == 'seed' and value == RANDOM_SEED else value}")
    return Result("\n".join(lines))


def _save(session: Session, argument: str) -> Result:
    path = Path(_path(argument, "/save"))
    session.save(path)
    return Result(f"saved {len(session.messages)} messages to {path}")


def _load(session: Session, argument: str) -> Result:
    path = Path(_path(argument, "/load"))
    session.load(path)
    return Result(f"loaded {len(session.messages)} messages from {path}")


def _path(argument: str, command: str) -> str:
    if not argument:
        raise UsageError(f"{command} needs a file")
    return str(Path(argument).expanduser())


def _stats(session: Session, _argument: str) -> Result:
    return Result(stats_text(session.engine))


def _experts(session: Session, _argument: str) -> Result:
    return Result(residency_table(session.engine))


COMMANDS: Mapping[str, Command] = {
    "/help": Command(_help, "", "these commands"),
    "/exit": Command(_exit, "", "leave (also /bye, /quit, Ctrl-D)"),
    "/bye": Command(_exit, "", ""),
    "/quit": Command(_exit, "", ""),
    "/clear": Command(_clear, "", "forget the conversation"),
    "/regen": Command(_regenerate, "", "another answer to the last message"),
    "/read": Command(_read, "FILE", "put a text file before the next message"),
    "/set": Command(_set, "KEY VALUE", "change a setting: system, temp, top-k, n-predict, ..."),
    "/show": Command(_show, "", "the model and the settings"),
    "/save": Command(_save, "FILE", "write the conversation to a file"),
    "/load": Command(_load, "FILE", "continue a saved conversation"),
    "/stats": Command(_stats, "", "what the experts did in the last turn"),
    "/experts": Command(_experts, "", "where each layer's experts are"),
}
