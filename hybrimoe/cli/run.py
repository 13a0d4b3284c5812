"""`hybrimoe run`: one answer."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

from hybrimoe.cli.console import note
from hybrimoe.cli.loading import (
    flush,
    model_path,
    open_engine,
    sampling,
    show_events,
    split_positionals,
    warn_unless_verified,
)
from hybrimoe.cli.prompt import one_prompt, system_prompt
from hybrimoe.cli.report import expert_table, footer, prediction_table
from hybrimoe.config import Settings
from hybrimoe.errors import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from hybrimoe.engine import Engine
    from hybrimoe.generation import Answer


def run(settings: Settings, positionals: list[str]) -> int:
    """Answers one prompt on stdout. Returns the exit code."""
    model, positional = split_positionals(settings, positionals)
    prompt = one_prompt(settings, positional)
    system = system_prompt(settings)
    with open_engine(settings, model_path(model), "run") as engine:
        verified = engine.verification is not None
        if settings.conversation:
            messages = [{"role": "system", "content": system}] if system else []
            tokens = engine.chat_prompt([*messages, {"role": "user", "content": prompt}])
        else:
            tokens = engine.text_prompt(prompt)
        answer = engine.answer(tokens, sampling(settings), settings.n_predict)
        code = _stream(answer, quiet=settings.json)
        if not verified:
            warn_unless_verified(engine)
        show_events(engine)
        if settings.json:
            print(json.dumps(_report(engine, answer, prompt), ensure_ascii=False))
        elif settings.show_timings and answer.tokens:
            note(footer(engine, answer))
        if settings.expert_stats:
            note(expert_table(engine) + "\n" + prediction_table(engine))
    return code


def _stream(answer: Answer, quiet: bool) -> int:
    """Prints the answer as it arrives. Returns the exit code."""
    pieces = iter(answer)
    code = 0
    try:
        with contextlib.closing(pieces):  # type: ignore[type-var]
            for piece in pieces:
                if not quiet:
                    flush(piece)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    if not quiet and answer.text and not answer.text.endswith("\n"):
        flush("\n")
    if answer.finish_reason == "context":
        note(f"note: the answer was cut: the context of {answer.engine.n_ctx()} tokens is full")
    return code


def _report(engine: Engine, answer: Answer, prompt: str) -> dict[str, Any]:
    verification = engine.verification
    return {
        "model": {"path": str(engine.info.path), "name": engine.info.name, "architecture": engine.info.architecture},
        "prompt": prompt,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "usage": {
            "prompt_tokens": len(answer.prompt),
            "completion_tokens": len(answer.tokens),
            "total_tokens": len(answer.prompt) + len(answer.tokens),
        },
        "timings": answer.timings.to_dict(),
        "plugin": {
            "active": engine.plugin is not None,
            "verified": None if verification is None else verification.ok,
            "message": None if verification is None else verification.message(),
        },
        "experts": engine.stats(),
    }
