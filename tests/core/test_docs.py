"""The generated page is up to date, and its example runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hybrimoe.native.core import Kind, policies

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_policy_page_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "make_policy_tables.py"), "--check"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr


def test_the_pages_example_runs_every_policy() -> None:
    page = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert example is not None
    names: dict[str, Any] = {}
    exec(example.group(1), names)
    assert set(names["made"]) == {p.name for p in policies(Kind.SCHEDULER)}
    assert set(names["hits"]) == {p.name for p in policies(Kind.EVICTION)}
    assert set(names["slots"]) == {p.name for p in policies(Kind.ALLOCATION)}
    assert len(names["runs"]) == len(policies(Kind.PREFETCH))
    assert all(us > 0 for us in names["runs"])


def test_the_guide_names_files_that_exist() -> None:
    guide = (ROOT / "docs" / "adding-a-policy.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:native|tests|tools)/[\w/.-]+)`", guide):
        assert path.endswith("mru.cpp") or (ROOT / path).exists(), path
