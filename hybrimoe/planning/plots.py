"""A picture of what `--vary` found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrimoe.planning.what_if import Variant

__all__ = ["speed_plot"]


def speed_plot(found: Sequence[Variant], model: str) -> Any:
    """Decode and prefill of each variant, ours and plain llama.cpp's, with their ranges: a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 0.5 * len(found) + 3), 7), layout="constrained")
    labels = ["\n".join(f"{key}={value}" for key, value in one.values.items()) for one in found]
    for row, (title, part) in enumerate((("decode", 1), ("prefill", 0))):
        axes = figure.add_subplot(2, 1, row + 1)
        for shift, (name, colour) in enumerate((("llama.cpp", "tab:gray"), ("hybrimoe", "tab:blue"))):
            pairs = [one.plan.stock if shift == 0 else one.plan.ours for one in found]
            points = [(i, pair[part]) for i, pair in enumerate(pairs) if pair is not None]
            if not points:
                continue
            x = [i + 0.2 * shift - 0.1 for i, _ in points]
            y = [speed.per_s for _, speed in points]
            bars = [[s.per_s - s.low for _, s in points], [s.high - s.per_s for _, s in points]]
            axes.errorbar(x, y, yerr=bars, fmt="o", capsize=3, color=colour, label=name)
        axes.set_xticks(range(len(found)), labels if row else [""] * len(found), rotation=0 if len(found) < 8 else 90)
        axes.set_ylabel(f"{title}, tokens/s (predicted)")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.3)
    figure.axes[0].legend()
    figure.axes[0].set_title(model)
    return figure
