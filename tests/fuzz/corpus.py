"""Sound inputs of every kind, made in code; mutation begins with them. Real ones are written by the program itself."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

CONFIG = """ctx-size = 256
threads = 1
n-predict = 4
temp = 0.7
cache-policy = "mrs"
expert-cache = "25%"
prefetch = "impact"
guard = "on"
reproducible = false
seed = 7
cache-type-k = "f16"
system-prompt = "Answer in one word."
device = "none"
"""

ROUTE_CSV = """# model=/m/toy.gguf arch=x n_layer=2 n_expert=16 n_expert_used=2
# layer=0 expert_bytes=500 dense_bytes=7
# layer=1 expert_bytes=600 dense_bytes=7
turn,phase,step,layer,slot,expert,weight,residency
0,0,0,0,0,3,0.75,0
0,0,0,0,1,4,0.25,0
0,0,1,0,0,5,0.5,0
0,0,1,0,1,6,0.5,0
0,0,1,1,0,1,1.0,0
0,0,1,1,1,2,0.0,0
1,1,0,0,0,7,0.5,0
1,1,0,0,1,8,0.5,0
1,1,0,1,0,9,0.5,0
1,1,0,1,1,15,0.5,0
"""
LAYER_CSV = "layer,expert\n0,1\n0,2\n1,3\n1,4\n0,5\n0,6\n1,7\n1,0\n"
LIST_CSV = "layer_id,expert_ids\n3,52 40\n4,1 2\n3,7 8\n4,3 4\n"
BEYOND_CSV = (
    'Layer ID,Batch Number,Token,Activated Expert IDs\n1,0,<s>,"[8, 2]"\n1,0,",","[0, 1]"\n3,0,<s>,"[5, 4]"\n'
    '3,0,",","[3, 9]"\n'
)
CHAT = {
    "format": "hybrimoe-chat",
    "version": 1,
    "model": "toy",
    "system": "Be brief.",
    "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}],
}
COSTS: dict[str, Any] = {
    "layer_class": [0, 0, 1],
    "classes": [
        {
            "expert_bytes": 1000.0,
            "cpu": {"points": [[1, 10.0], [8, 40.0]]},
            "cpu_first_us": 3.0,
            "gpu": [{"fixed_us": 2.0, "per_token_us": 0.5}],
        },
        {
            "expert_bytes": 2000.0,
            "cpu": {"fixed_us": 5.0, "per_token_us": 5.0},
            "cpu_first_us": 3.0,
            "gpu": [{"points": [[1, 2.0], [64, 40.0]]}],
        },
    ],
    "cpu_step_us": 4.0,
    "dram_bytes_per_us": 20000.0,
    "devices": [{"latency_us": 9.0, "bytes_per_us": 24000.0, "step_us": 30.0}],
}


def calibration() -> dict[str, Any]:
    """A probe's file: the shape of `hybrimoe probe`'s, with one card; the fit has every part that is read."""
    shape = {"n_embd": 64, "n_ff": 32, "gate_type": 2, "down_type": 2, "op": 2}
    good = {"median_error": 0.02, "p90_error": 0.1, "n_outliers": 1}
    curve = {"step_us": 8.0, "first_us": 30.0, "points": [[1.0, 120.0], [4.0, 140.0], [64.0, 500.0]], **good}
    cpu = {**curve, "node_us": 2.0, "dense_bytes_per_us": 11000.0}
    return {
        "format": 1,
        "key": {"cpu": "a processor", "n_cores": 2},
        "date": "2026-01-01 00:00 UTC",
        "seconds": 5.0,
        "n_threads": [1, 2],
        "shapes": [shape],
        "cards": [],
        "numa_nodes": 1,
        "fit": {
            "cpu": [{"shape": shape, "by_threads": {"1": cpu, "2": cpu}}],
            "devices": [
                {
                    "device": 3,
                    "copies": {"h2d_pinned": {"latency_us": 9.0, "bytes_per_us": 24800.0, **good}},
                    "sync_us": 12.0,
                    "dram_bytes_per_us": 38000.0,
                    "experts": [{"shape": shape, **curve}],
                }
            ],
            "read_bytes_per_us": {"2": 30000.0},
            "disk_bytes_per_us": 2000.0,
            "reasons": [],
        },
        "samples": {},
    }


def machine_changes(profile: Any) -> dict[str, Any]:
    """A file of `simulate --machine-changes`."""
    waits = {"every_layers": 2, "us": 3000}
    phases = [{"from_token": 0, "noise": 0.1}, {"from_token": 2, "cpu": 20, "waits": waits}, {"from_token": 5}]
    usual = {"noise": 0.04, "outliers": {"share": 0.1, "factor": 30}, "seed": 3, "live": True, "guard": True}
    return {"profile": profile, "believed": {"link": 10, "dram": 0.5}, "phases": phases, **usual}


def machine() -> dict[str, Any]:
    """A machine file of `--profile` and `--machine`."""
    from hybrimoe import machine

    path = Path(machine.__file__).parent / "presets" / "hybrimoe-paper.json"
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def npz(**more: Any) -> bytes:
    """A trace as an .npz file."""
    import numpy as np

    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((5, 3, 8)), axis=2)[:, :, :2].astype(np.uint8)
    arrays: dict[str, Any] = {
        "experts": ids,
        "prompt_offsets": np.array([0, 3, 5]),
        "n_expert": 8,
        "first_layer": 1,
        "expert_bytes": 100,
        "model": "toy",
        "is_decode": np.array([0, 0, 1, 0, 1], np.uint8),
        "weights": np.full(ids.shape, 0.5, np.float32),
        **more,
    }
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


def tiny_models(folder: Path) -> list[Path]:
    """Models that llama.cpp loads, of 100 to 300 kB each, with different keys and tensors."""
    from make_tiny_models import write_tiny_model
    from moe_shapes import ARCHITECTURES

    paths = []
    for name in ("mixtral", "deepseek2", "gpt-oss"):
        path = folder / f"{name}.gguf"
        if not path.exists():
            shape = replace(ARCHITECTURES[name].tiny, n_embd=64, n_ff=32, n_layers=2, n_vocab=512, n_ctx=256)
            write_tiny_model(path, name, "Q4_0" if name != "gpt-oss" else "F32", shape=shape)
        paths.append(path)
    return paths


def traces(folder: Path, model: Path) -> list[Path]:
    """Recordings of that model by the program: tokens with scores and look-ahead, and a live run's events."""
    tokens, events = folder / "tokens.trace", folder / "events.trace"
    program = [sys.executable, "-m", "hybrimoe.cli.main"]
    common = ["-n", "4", "-c", "64", "-t", "1", "--no-conversation"]
    commands = {
        tokens: ["trace", "record", str(model), "-o", str(tokens), "-p", "hello there", "-p", "and again", *common],
        events: [
            "run", str(model), "hello there", "--trace", str(events), "--device", "CPU", "--expert-cache", "4", *common,
        ],
    }  # fmt: skip
    names = {f"XDG_{name}_HOME": str(folder / name.lower()) for name in ("CONFIG", "STATE", "DATA", "CACHE")}
    environment = {**os.environ, **names, "OMP_WAIT_POLICY": "passive"}
    for path, command in commands.items():
        if not path.exists():
            subprocess.run([*program, *command], check=True, capture_output=True, timeout=300, env=environment)
    return [tokens, events]
