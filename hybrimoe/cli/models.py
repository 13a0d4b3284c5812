"""`hybrimoe models`: local models and their experts."""

from __future__ import annotations

import typer

from hybrimoe.cli.options import HELP_NAMES


def make_app() -> typer.Typer:
    return typer.Typer(
        help="Local models: list, show, build.",
        context_settings=HELP_NAMES,
        no_args_is_help=True,
        rich_markup_mode=None,
    )
