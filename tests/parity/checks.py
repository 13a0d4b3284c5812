"""What the plug-in's counters must say after a run."""

from __future__ import annotations

from pathlib import Path

from sides import Reply

from hybrimoe.gguf_model import inspect

# Architectures whose router runs long before the experts: llama.cpp hands it over as a graph of its own.
ROUTER_APART = frozenset({"kimi-k3", "llama4", "smallthinker"})


def check_dispatch(path: Path, reply: Reply, *, n_blocks_per_layer: int = 1) -> None:
    """Every MoE layer went through the plug-in's own dispatch in every step of a `logits` scenario, nothing else."""
    model = inspect(path).require_moe()
    steps = reply.facts["steps"]
    assert tuple(reply.layers) == model.moe_layer_indices
    assert (reply.facts["n_nodes_delegated"] > 0) == (model.architecture in ROUTER_APART)
    for info in model.moe_layers:
        counts = reply.layers[info.index]
        top_k, n_experts = info.n_experts_used, info.n_experts
        assert counts["n_blocks_delegated"] == 0
        assert counts["n_blocks"] == len(steps) * n_blocks_per_layer
        assert counts["n_steps"] == len(steps) * n_blocks_per_layer
        assert counts["n_tokens"] == sum(steps) * n_blocks_per_layer
        fewest = top_k * len(steps)
        most = n_blocks_per_layer * sum(min(n_experts, top_k * n_tokens) for n_tokens in steps)
        assert fewest <= counts["n_experts_cpu"] <= most
        assert counts["n_experts_gpu"] == 0
        assert all(counts[part] > 0 for part in ("router_us", "experts_us"))
