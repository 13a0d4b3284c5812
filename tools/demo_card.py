#!/usr/bin/env python3
"""Measures the demo model on text that its routers were not fitted to, and writes its card, models/demo/card.md.

Perplexity of the dense model and of the demo, expert balance and adjacent-token overlap of every layer, through plain
llama.cpp on the CPU. Exits with 1 when a bound of the recipe is missed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hybrimoe.errors import as_script

CARD = Path(__file__).resolve().parent.parent / "models" / "demo" / "card.md"
MAX_PERPLEXITY_RATIO = 1.05
MAX_BALANCE = 3.0
MIN_OVERLAP_OVER_CHANCE = 1.5


@dataclass(frozen=True)
class Layer:
    """Routing of one layer on the held-out text."""

    index: int
    balance: float
    overlap: float
    chance: float


@dataclass(frozen=True)
class Measurement:
    """What the card reports; perplexities by text and over all texts."""

    n_tokens: int
    dense: dict[str, float]
    demo: dict[str, float]
    layers: list[Layer]
    file_bytes: int

    def violations(self) -> list[str]:
        """Bounds that the model misses, in words."""
        found = []
        if self.demo["all"] > MAX_PERPLEXITY_RATIO * self.dense["all"]:
            found.append(f"perplexity {self.demo['all']:.2f} against {self.dense['all']:.2f} of the dense model")
        for layer in self.layers:
            if layer.balance > MAX_BALANCE:
                found.append(f"layer {layer.index}: largest over mean expert load {layer.balance:.2f}")
            if layer.overlap < MIN_OVERLAP_OVER_CHANCE * layer.chance:
                found.append(f"layer {layer.index}: overlap {layer.overlap / layer.chance:.2f} times chance")
        return found


def measure(dense_path: Path, demo_path: Path) -> Measurement:
    """Runs both models over the recipe's held-out texts, in windows of 256 tokens."""
    import numpy as np

    from hybrimoe.gguf_model import inspect
    from hybrimoe.models.activations import ModelRun
    from hybrimoe.models.demo import token_windows
    from hybrimoe.models.recipe import load_recipe
    from hybrimoe.models.routing import routing_stats

    recipe = load_recipe()
    n_window = 256
    texts = recipe.texts("heldout")
    windows = {name: token_windows(dense_path, [text], n_window, n_least=64) for name, text in texts.items()}
    model = inspect(demo_path).require_moe()

    def perplexities(run: ModelRun) -> dict[str, float]:
        by_text = {name: np.concatenate([run.log_probs(w) for w in ws]) for name, ws in windows.items() if ws}
        by_text["all"] = np.concatenate(list(by_text.values()))
        return {name: float(np.exp(-values.mean())) for name, values in by_text.items()}

    with ModelRun(dense_path, n_window=n_window) as run:
        dense = perplexities(run)
    with ModelRun(demo_path, n_window=n_window, capture="ffn_moe_logits") as run:
        demo = perplexities(run)
        captured = run.captured
    layers = []
    for moe in model.moe_layers:
        # As in fitting, without each window's first token.
        logits = [x.reshape(-1, moe.n_experts)[1:] for x in captured[moe.index]]
        neighbours = np.concatenate([np.arange(len(x)) < len(x) - 1 for x in logits])
        stats = routing_stats(np.concatenate(logits), moe.n_experts_used, neighbours)
        layers.append(Layer(moe.index, stats.balance, stats.overlap, stats.chance))
    n_tokens = sum(len(w) for ws in windows.values() for w in ws)
    return Measurement(n_tokens, dense, demo, layers, model.file_bytes)


def card(m: Measurement, demo_path: Path) -> str:
    """The card's text."""
    from hybrimoe.gguf_model import inspect
    from hybrimoe.models.recipe import load_recipe

    recipe, model = load_recipe(), inspect(demo_path)
    source = recipe.source
    overlaps = [layer.overlap / layer.chance for layer in m.layers]
    lines = [
        f"# {recipe.name}",
        "",
        "<!-- Written by tools/demo_card.py; do not edit. -->",
        "",
        f"A small mixture-of-experts model for trying out expert scheduling: {source['name']} ({source['license']})",
        f"from the PyPI package `{source['package']}` {source['package_version']}, in which every feed-forward block "
        f"has become {model.n_experts}",
        "slightly different copies of itself. It chats like that model, not better.",
        "",
        "| | |",
        "|---|---|",
        f"| experts | {model.n_experts} a layer, top-{model.n_experts_used}, {len(model.moe_layers)} layers |",
        f"| experts' quantisation | {recipe.type}, {model.moe_layers[0].bytes_per_expert / 2**20:.2f} MiB an expert |",
        f"| expert weights | the dense ones with Gaussian noise of {recipe.noise:.0%} of their deviation |",
        "| routers | k-means over feed-forward inputs of the dense model on `corpus/train-*.txt`, balanced |",
        f"| file | {m.file_bytes / 1e6:.0f} MB, made on your machine by `hybrimoe models build demo` |",
        f'| system message | "{recipe.chat["system"]}", in place of the source model\'s |',
        f"| licence | {source['license']}, as the source model |",
        "",
        "## Measured",
        "",
        f"On {m.n_tokens} tokens of `corpus/heldout-*.txt`, which no router was fitted to, in windows of at most 256",
        "tokens, with plain llama.cpp on the CPU (`tools/demo_card.py`).",
        "",
        "| text | perplexity, dense | perplexity, demo | ratio |",
        "|---|---|---|---|",
    ]
    for name, dense in m.dense.items():
        label = "**all**" if name == "all" else name.removeprefix("heldout-").removesuffix(".txt")
        lines.append(f"| {label} | {dense:.2f} | {m.demo[name]:.2f} | {m.demo[name] / dense:.3f} |")
    lines += [
        "",
        f"Largest over mean expert load in the worst layer: {max(x.balance for x in m.layers):.2f} "
        f"(bound {MAX_BALANCE:g}).",
        "Share of a token's experts that the next token uses too, over what independent draws with the same loads",
        f"would give: {min(overlaps):.2f} in the worst layer (bound {MIN_OVERLAP_OVER_CHANCE:g}), "
        f"{sum(overlaps) / len(overlaps):.2f} on average.",
        "",
        "| layer | largest / mean load | overlap | chance | overlap / chance |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {x.index} | {x.balance:.2f} | {x.overlap:.3f} | {x.chance:.3f} | {x.overlap / x.chance:.2f} |"
        for x in m.layers
    ]
    return "\n".join([*lines, ""])


@as_script
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, metavar="FILE", help="a demo model (default: the store's, built if missing)"
    )
    parser.add_argument("--out", type=Path, default=CARD, metavar="FILE", help="the card (default: %(default)s)")
    args = parser.parse_args(argv)
    from hybrimoe.models import store
    from hybrimoe.models.recipe import load_recipe
    from hybrimoe.models.source import fetch_dense_model

    demo_path = args.model or store.build_demo()
    measured = measure(fetch_dense_model(load_recipe(), lambda label, share: None), demo_path)
    args.out.write_text(card(measured, demo_path), encoding="utf-8")
    for violation in measured.violations():
        print(f"bound missed: {violation}", file=sys.stderr)
    print(args.out)
    return 1 if measured.violations() else 0


if __name__ == "__main__":
    sys.exit(main())
