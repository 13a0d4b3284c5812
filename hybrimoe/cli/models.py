"""`hybrimoe models`: local models and their experts."""

from __future__ import annotations

import typer

from hybrimoe.cli.options import HELP_NAMES


def make_app() -> typer.Typer:
    app = typer.Typer(help="Local models: list, show, build.", context_settings=HELP_NAMES, rich_markup_mode=None)

    @app.callback(invoke_without_command=True)
    def start(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            print(context.get_help())

    return app
