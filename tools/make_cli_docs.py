#!/usr/bin/env python3
"""docs/cli.md: every command with its flags, made from the command line itself.

usage: python tools/make_cli_docs.py [--check]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TARGET = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
_HEAD = """# Commands

Made by `make docs`; do not edit. What holds for all: results on stdout, all else on stderr; flag > environment >
config file (`config.toml`, keys = long flags) > default; exit codes in [exit-codes.md](exit-codes.md).
`hybrimoe --install-completion` installs completion for the current shell.
"""


def document() -> str:
    """The whole page."""
    import typer

    from hybrimoe.cli.app import make_app

    root: Any = typer.main.get_command(make_app())
    parts = [_HEAD]
    parts += [_section(path, command) for path, command in _commands("hybrimoe", root)]
    return "\n".join(parts)


def _commands(path: str, command: Any) -> list[tuple[str, Any]]:
    """(what is typed, command) of a command and all below it, depth first."""
    below = getattr(command, "commands", {})
    found = [(path, command)]
    for name, child in below.items():
        found += _commands(f"{path} {name}", child)
    return found


def _section(path: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    options = [p for p in options if p.name not in ("install_completion", "show_completion")]  # typer's own
    words = [path, *(["[OPTIONS]"] if options else []), *(_metavar(p) for p in arguments)]
    if getattr(command, "commands", None):
        words.append("COMMAND ...")
    lines = [f"## `{path}`", "", "```", " ".join(words), "```", ""]
    if command.help:
        lines += [_text(command.help), ""]
    for title in dict.fromkeys(getattr(p, "rich_help_panel", None) for p in options):
        mine = [p for p in options if getattr(p, "rich_help_panel", None) == title]
        lines += [f"| {title or 'flag'} | |", "|---|---|"]
        lines += [f"| {_flags(p)} | {_cell(p.help or '')} |" for p in mine]
        lines.append("")
    return "\n".join(lines)


def _metavar(parameter: Any) -> str:
    name = str(parameter.metavar or parameter.name.upper())
    needed = parameter.required or name.startswith("[")
    many = "..." if parameter.nargs == -1 and parameter.name != "positionals" else ""
    return (name if needed else f"[{name}]") + many


def _flags(parameter: Any) -> str:
    names = ", ".join(f"`{flag}`" for flag in (*parameter.opts, *parameter.secondary_opts))
    value = "" if parameter.is_flag else f" `{parameter.metavar or parameter.type.name.upper()}`"
    return _cell(names + value)


def _text(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.strip().split("\n\n"))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is out of date")
    text = document()
    if parser.parse_args().check:
        sys.exit(0 if TARGET.read_text(encoding="utf-8") == text else "docs/cli.md is out of date: make docs")
    part = TARGET.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(TARGET)


if __name__ == "__main__":
    main()
