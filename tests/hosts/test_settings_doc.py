"""docs/settings.md names the keys that the plug-in reads, all of them and no others."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

from hybrimoe.native.plugin import library_path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_every_key_is_documented() -> None:
    library = ctypes.CDLL(str(library_path()))
    error = ctypes.create_string_buffer(4096)
    assert library.hybrimoe_configure(b'{"?": 0}', error, ctypes.c_size_t(len(error))) == -1
    known = set(re.findall(r'"(\w+)"', error.value.decode().partition("known:")[2]))
    assert "expert_cache" in known
    text = (ROOT / "docs" / "settings.md").read_text()
    rows = "".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    only_for_tests = text.partition("benchmarks and tests only:")[2]
    assert set(re.findall(r"`(\w+)`", rows + only_for_tests)) == known
