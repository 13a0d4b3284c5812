"""docs/cli.md is what the command line says of itself."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import make_cli_docs  # noqa: E402


def test_the_page_is_up_to_date() -> None:
    assert make_cli_docs.TARGET.read_text(encoding="utf-8") == make_cli_docs.document(), "run: make docs"


def test_every_command_is_on_it() -> None:
    page = make_cli_docs.document()
    for name in ("chat", "run", "plan", "probe", "profile", "bench", "serve", "top", "simulate", "doctor", "exec"):
        assert f"## `hybrimoe {name}`" in page
    for name in ("models list", "models show", "models pull", "models build"):
        assert f"## `hybrimoe {name}`" in page
    for name in ("record", "info", "convert", "import"):
        assert f"## `hybrimoe trace {name}`" in page
