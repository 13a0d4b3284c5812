"""Writes synthetic.npz: routing with the traits that cache policies live on, from integer arithmetic alone.

Per prompt each layer has a set of favourite experts (skew within a request), and a token favours the experts of the
tokens before it. Scores are integers of 65,535ths, so that the file is the same everywhere.

    python tests/core/golden/make_synthetic_trace.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

N_LAYERS, N_EXPERT, TOP_K, N_PROMPTS, TOKENS = 6, 32, 4, 8, 40


def lcg(state: int) -> tuple[int, int]:
    """One step of a 64-bit linear congruential generator (Knuth's MMIX constants); its upper 32 bits."""
    state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
    return state, state >> 32


def make() -> dict[str, np.ndarray]:
    """All arrays of the file."""
    state = 20260101
    n_tokens = N_PROMPTS * TOKENS
    experts = np.zeros((n_tokens, N_LAYERS, TOP_K), dtype=np.uint8)
    scores = np.zeros((n_tokens, N_LAYERS, N_EXPERT), dtype=np.uint16)
    for prompt in range(N_PROMPTS):
        favour = np.zeros((N_LAYERS, N_EXPERT), dtype=np.int64)
        for layer in range(N_LAYERS):
            for e in range(N_EXPERT):
                state, r = lcg(state)
                favour[layer, e] = r % 1000 + (1500 if r % 5 == 0 else 0)
        recent = np.zeros((N_LAYERS, N_EXPERT), dtype=np.int64)
        for t in range(TOKENS):
            token = prompt * TOKENS + t
            for layer in range(N_LAYERS):
                logits = favour[layer] + recent[layer]
                for e in range(N_EXPERT):
                    state, r = lcg(state)
                    logits[e] += r % 4500
                raw = logits**3
                row = (raw * 65535 // raw.sum()).astype(np.uint16)
                order = sorted(range(N_EXPERT), key=lambda e: (-int(raw[e]), e))[:TOP_K]
                experts[token, layer] = order
                scores[token, layer] = row
                recent[layer] = recent[layer] // 2
                recent[layer, order] += 700
    return {
        "experts": experts,
        "scores": scores,
        "prompt_offsets": np.arange(N_PROMPTS + 1, dtype=np.int64) * TOKENS,
        "n_expert": np.int64(N_EXPERT),
    }


if __name__ == "__main__":
    path = Path(__file__).with_name("synthetic.npz")
    np.savez_compressed(path, **make())
    print(f"{path.name}: {path.stat().st_size} bytes")
