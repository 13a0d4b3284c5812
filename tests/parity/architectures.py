"""The MoE architectures that llama.cpp knows, as its own test program `test-llama-archs` writes them."""

from __future__ import annotations

from pathlib import Path

# fmt: off
ARCHITECTURES = [
    "afmoe", "arctic", "bailingmoe", "bailingmoe2", "bailingmoe3", "cohere2moe", "dbrx", "deepseek", "deepseek2",
    "deepseek32", "deepseek4", "dots1", "dots3note", "ernie4_5-moe", "exaone-moe", "glm-dsa", "glm4moe", "glm5-next",
    "gpt-oss", "granite", "granitemoe", "grok", "grovemoe", "hunyuan-moe", "hy_v3", "hy_v4", "kimi-k3", "kimi-linear",
    "laguna", "lfm2moe", "llada-moe", "llama", "llama4", "maple", "mellum", "mimo2", "minicpm", "minimax-01",
    "minimax-m2", "minimax-m3", "mistral3", "mistral4", "olmoe", "phimoe", "qwen2moe", "qwen35moe", "qwen3moe",
    "qwen3next", "qwen3vlmoe", "qwen4exp", "rnd1", "smallthinker",
]
# fmt: on
# llama.cpp loads experts for this architecture, but its graph has the dense FFN only.
WITHOUT_MOE_GRAPH = {"refact"}
# Two groups of experts in each layer, so two blocks.
N_BLOCKS_PER_LAYER = {"grovemoe": 2}


def model_file(folder: Path, arch: str) -> Path:
    return folder / f"{arch}-moe.gguf"
