"""Built-in texts of several domains, to measure with: routing depends on what is read, and random tokens distort it.

Written for this project, under its licence.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

__all__ = ["Text", "texts"]


@dataclass(frozen=True)
class Text:
    """One text; `domain` is its file's name."""

    domain: str
    text: str


def texts() -> list[Text]:
    """All texts, always in the same order."""
    files = sorted((f for f in resources.files(__package__).iterdir() if f.name.endswith(".txt")), key=lambda f: f.name)
    return [Text(f.name.removesuffix(".txt"), f.read_text(encoding="utf-8")) for f in files]
