"""The demo model: greedy text through the plug-in is plain llama.cpp's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sides import Reply, Side, compare

from hybrimoe.gguf_model import inspect

PROMPTS = [
    "The capital of France is",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea,",
    "List three facts about the moon:\n1.",
]
# The first tokens of every answer; all of them in the slow suite.
N_PREDICT = 32
N_PREDICT_SLOW = 128
# Where kernels differ, only the logits along one given text can be compared: greedy texts part at near-ties.
N_FORCED = 16


def check_dispatch(path: Path, reply: Reply, n_steps: int) -> None:
    """Every MoE layer ran in our dispatch at every step."""
    assert tuple(reply.layers) == inspect(path).moe_layer_indices
    assert reply.facts["n_nodes_delegated"] == 0
    assert {(c["n_blocks"], c["n_blocks_delegated"]) for c in reply.layers.values()} == {(n_steps, 0)}


@pytest.fixture(scope="module")
def greedy(plain: Side, demo_model: Path) -> Reply:
    return plain.ask("greedy", demo_model, prompts=PROMPTS, n_predict=N_PREDICT)


@pytest.mark.parametrize("n_predict", [N_PREDICT, pytest.param(N_PREDICT_SLOW, marks=pytest.mark.slow)])
def test_greedy_text_on_the_same_kernels(plain: Side, ours: Side, demo_model: Path, n_predict: int) -> None:
    expected = plain.ask("greedy", demo_model, prompts=PROMPTS, n_predict=n_predict)
    got = ours.ask("greedy", demo_model, prompts=PROMPTS, n_predict=n_predict)
    for index in range(len(PROMPTS)):
        assert got.arrays[f"{index}/tokens"].tolist() == expected.arrays[f"{index}/tokens"].tolist()
    assert compare(expected, got).is_equal
    check_dispatch(demo_model, got, len(PROMPTS) * (1 + n_predict))


def test_logits_against_the_default_of_llama_cpp(plain: Side, ours: Side, demo_model: Path, greedy: Reply) -> None:
    """llama.cpp repacks weights by default; we repack all but the experts, so the experts' kernels may differ.

    In Q4_1, the demo's type, they do not on x86-64, where llama.cpp has no repacked layout for it: bit-equal there.
    """
    continuations = [greedy.arrays[f"{index}/tokens"][:N_FORCED].tolist() for index in range(len(PROMPTS))]
    options = {"prompts": PROMPTS, "continuations": continuations, "repack": True}
    reference = plain.ask("forced", demo_model, **options)
    got = ours.ask("forced", demo_model, **options)
    difference = compare(reference, got)
    assert difference.nmse <= 1e-5, difference
    n_same = sum(
        int(np.sum(got.arrays[name].argmax(axis=1) == rows.argmax(axis=1))) for name, rows in reference.arrays.items()
    )
    assert n_same >= len(PROMPTS) * N_FORCED - 2
    check_dispatch(demo_model, got, len(PROMPTS) * N_FORCED)


@pytest.mark.slow
def test_perplexity_with_our_kernels(plain: Side, own: Side, demo_model: Path) -> None:
    """On text that the demo's routers were not fitted to: within 0.5 % of llama.cpp's with its defaults."""
    from hybrimoe.models.recipe import load_recipe

    texts = list(load_recipe().texts("heldout").values())
    values = []
    for side in (plain, own):
        reply = side.ask("log_probs", demo_model, texts=texts, repack=True)
        values.append(float(np.exp(-np.concatenate(list(reply.arrays.values())).mean())))
        print(f"{side.kind}: perplexity {values[-1]:.4f} over {sum(map(len, reply.arrays.values()))} tokens")
    assert values[0] < 30
    assert abs(values[1] / values[0] - 1) <= 0.005, values
