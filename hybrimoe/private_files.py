"""Folders and files that are nobody's business but the user's."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["make_private_folder", "private_opener"]


def make_private_folder(folder: Path) -> None:
    """Makes `folder` and what is missing above it, 0700 each; what exists stays as it is. Raises OSError."""
    for one in reversed([folder, *folder.parents]):
        if not one.exists():
            one.mkdir(mode=0o700, exist_ok=True)


def private_opener(path: str, flags: int) -> int:
    """For `open(..., opener=private_opener)`: a new file is 0600 from its first moment on."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
