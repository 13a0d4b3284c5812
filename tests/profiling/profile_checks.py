"""What the profile's tests share: running the command, and a finished profile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = ("--device", "CPU", "-ec", "4", "--guard", "off", "--admission", "always", "--no-keep-residency")


@dataclass(frozen=True)
class Made:
    """A finished profile: its JSON, and the folder with report, timeline and trace."""

    data: dict[str, Any]
    folder: Path


def run_in(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hybrimoe.cli.main", "profile", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in ("CONFIG", "STATE", "CACHE"):
        environment[f"XDG_{name}_HOME"] = str(folder / name.lower())
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, env=environment)


def make(folder: Path, model: Path, *options: str) -> Made:
    files = ["--html", "r.html", "--perfetto", "t.json", "--trace", "run.trace"]
    done = run_in(folder, model, "-p", 24, "-n", 12, "--json", *files, *options)
    assert done.returncode == 0, done.stderr
    return Made(json.loads(done.stdout), folder)
