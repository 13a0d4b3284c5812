"""The format's page: its example runs, and its tables name what the code has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hybrimoe.trace import blocks
from hybrimoe.trace.events import COLUMNS, EventType, Note

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "trace-format.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert example is not None
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example.group(1), names)
    assert (tmp_path / "toy.trace").is_file()


def test_every_kind_and_column_is_described() -> None:
    for kind in (*EventType, *Note):
        assert f"| {kind.value} | {kind.name} |" in PAGE
    for column in COLUMNS:
        assert f"`{column}`" in PAGE
    assert f"this page describes version {blocks.VERSION}" in PAGE
    assert f"| magic | {len(blocks.MAGIC)} |" in PAGE


def test_the_core_knows_no_event_that_the_page_lacks() -> None:
    header = (Path(__file__).resolve().parents[2] / "native" / "include" / "hybrimoe_core.h").read_text(
        encoding="utf-8"
    )
    declared = re.search(r"typedef enum hm_event_type \{(.*?)\}", header, re.DOTALL)
    assert declared is not None
    names = [n for n in re.findall(r"HM_(?:EVENT_)?(\w+)", declared.group(1)) if not n.startswith("N_")]
    assert names == [kind.name for kind in EventType]
