"""JSON from files that anybody may have written."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["parse_json"]


def parse_json(text: str | bytes) -> Any:
    """The document in `text`. Raises ValueError for what is none, nests too deeply, or has text without UTF-8."""
    try:
        data = json.loads(text)
        # Escapes can name halves of characters, which nothing could write or print again.
        if (b"\\ud" if isinstance(text, bytes) else "\\ud") in text.lower():  # type: ignore[operator]
            json.dumps(data, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it holds halves of characters") from None
    return data
