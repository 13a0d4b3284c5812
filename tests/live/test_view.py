"""Snapshots as a page in the terminal, for terminals of every size."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from hybrimoe.live.view import dashboard


def snapshot(**changes: Any) -> dict[str, Any]:
    n_layers, n_experts = 48, 128
    device = {
        "name": "CUDA0", "description": "a card", "n_slots": 960, "cache_bytes": 3 << 30, "free_bytes": 1 << 30,
        "total_bytes": 12 << 30, "suspended": False, "gpu_expert_us": 90.0, "copy_expert_us": 200.0,
    }  # fmt: skip
    return {
        "version": 1, "pid": 4711, "command": "serve", "uptime_s": 3725.0, "phase": "generating",
        "requests": {"running": 1, "waiting": 2, "done": 7, "failed": 0, "cancelled": 0},
        "model": {
            "name": "Qwen3 30B A3B", "architecture": "qwen3moe", "file_type": "Q4_K_M", "n_layers": n_layers,
            "n_moe_layers": n_layers, "n_experts": n_experts, "top_k": 8,
        },
        "context": {"n_ctx": 8192, "n_tokens": 1234},
        "plugin": True,
        "totals": {
            "prompt_tokens": 900, "generated_tokens": 334, "prompt_per_s": 210.0, "generation_per_s": 24.1, "hits": 71,
            "misses": 29, "hit_rate": 0.71, "late": 1, "evictions": 12, "copies": 40, "prefetched": 9,
            "experts_cpu": 62, "experts_gpu": 38, "gpu_share": 0.38, "h2d_bytes": 9 << 26,
        },
        "rates": {
            "window_s": 2.0, "prompt_per_s": 0.0, "generation_per_s": 25.5, "hit_rate": 0.8, "gpu_share": 0.4,
            "experts_per_s": 9000.0, "link_bytes_per_s": 3e8, "evictions_per_s": 2.0,
            "busy": {"cpu": 0.61, "wait": 0.04, "gpu": 0.3, "link": 0.2},
        },
        "devices": [device],
        "guard": {"on": True, "level": "full", "n_changes": 0, "token_us": 31000.0, "floor_us": 41000.0},
        "costs": {"cpu_expert_us": 120.0},
        "events": [{"number": i, "text": f"decision {i} " + "x" * 200} for i in range(1, 9)],
        "experts": {
            "layers": list(range(n_layers)),
            "heat": [[(1 + (layer + e) % 7) / 512 for e in range(n_experts)] for layer in range(n_layers)],
            "on": [[0 if e < 20 else -1 for e in range(n_experts)] for _ in range(n_layers)],
        },
        **changes,
    }  # fmt: skip


def render(data: dict[str, Any], width: int, height: int | None, *, colour: bool = False) -> str:
    out = io.StringIO()
    console = Console(
        file=out, width=width, force_terminal=colour, color_system="truecolor" if colour else None,
        highlight=False, emoji=False, markup=False,
    )  # fmt: skip
    console.print(dashboard(data, width, height, colour=colour))
    return out.getvalue()


def test_everything_that_matters_is_on_a_page_of_80_columns() -> None:
    text = render(snapshot(), 80, 24)
    for what in ("serve 4711", "generating", "1:02:05", "25.5 t/s", "24.1 t/s", "CPU experts", "61%", "80%",
                 "960 slots", "3.0 GiB", "guard full", "286 MiB/s", "1234 of 8192",
                 "1 running, 2 waiting"):  # fmt: skip
        assert what in text, what
    assert "decision 8" in text and "layers down" in text


@pytest.mark.parametrize("width", [1, 8, 20, 40, 56, 80, 200, 500])
@pytest.mark.parametrize("height", [1, 5, 24, 60, None])
@pytest.mark.parametrize("colour", [False, True])
def test_no_terminal_is_too_small(width: int, height: int | None, colour: bool) -> None:
    text = render(snapshot(), width, height, colour=colour)
    lines = text.splitlines()
    if not colour:
        assert "\x1b[3" not in text and max(map(len, lines)) <= max(width, 8)
    if height is not None and width >= 8:
        assert len(lines) <= max(1, height - 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"rates": None},
        {"devices": [], "guard": None, "costs": None},
        {"events": []},
        {"requests": None},
        {"plugin": False, "devices": [], "guard": None, "experts": {"layers": [0], "heat": None, "on": [[]]}},
        {"experts": {"layers": [], "heat": None, "on": []}},
        {"phase": "loading", "model": {"name": "x"}},
    ],
)
def test_what_is_missing_is_left_out(changes: dict[str, Any]) -> None:
    assert render(snapshot(**changes), 80, 24)


def test_why_there_is_no_cache() -> None:
    text = render(snapshot(devices=[], guard=None, costs=None, given_up="CPU has no memory left"), 80, 24)
    assert "the expert cache was given up: CPU has no memory left" in text


def test_a_heat_map_shows_where_it_is_hot() -> None:
    experts = {"layers": [0], "heat": [[0.0, 0.9, 0.1, 0.0]], "on": [[-1] * 4]}
    line = next(line for line in render(snapshot(experts=experts), 80, None).splitlines() if line.startswith("   0 "))
    assert line[5:].rstrip() == "  ██░░".rstrip() or line[5:].startswith("  ██")


def test_snapshots_are_json() -> None:
    json.dumps(snapshot(), allow_nan=False)
