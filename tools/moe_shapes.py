"""Tensor tables and metadata of MoE architectures, for the makers of random models.

Each architecture here is what llama.cpp's loader of that name asks for (`src/models/*.cpp` of the pinned release).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Role = Literal[
    "embedding", "matrix", "expert", "router", "norm", "bias", "router_bias", "probs_bias", "expert_bias",
    "small", "decay",
]  # fmt: skip
Value = int | float | bool | Sequence[int]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. `n_ff` is one expert's width, `n_ff_dense` that of layers without experts."""

    n_layers: int
    n_embd: int
    n_ff: int
    n_experts: int
    top_k: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff_dense: int = 0
    n_dense_lead: int = 1  # layers without experts at the start, where the architecture has such
    n_shared: int = 0
    n_groups: int = 0
    n_groups_used: int = 0
    kv_rank: int = 0
    q_rank: int = 0
    head_dim_rope: int = 0
    n_vocab: int = 512
    n_ctx: int = 2048


@dataclass(frozen=True)
class Tensor:
    """One tensor to write; `shape` in ggml's order. `fan_in` is the length of the dot products it takes part in."""

    name: str
    shape: tuple[int, ...]
    role: Role

    @property
    def fan_in(self) -> int:
        return self.shape[0]


@dataclass(frozen=True)
class Architecture:
    """A kind of model: `arch` is llama.cpp's name, `layer` yields the tensors of one layer without their prefix."""

    name: str
    arch: str
    about: str
    tiny: Shape
    layer: Callable[[Shape, int], Iterator[Tensor]]
    metadata: Callable[[Shape], dict[str, Value]]

    def tensors(self, shape: Shape) -> list[Tensor]:
        tensors = [
            Tensor("token_embd.weight", (shape.n_embd, shape.n_vocab), "embedding"),
            Tensor("output_norm.weight", (shape.n_embd,), "norm"),
            Tensor("output.weight", (shape.n_embd, shape.n_vocab), "matrix"),
        ]
        for i in range(shape.n_layers):
            tensors += [replace(t, name=f"blk.{i}.{t.name}") for t in self.layer(shape, i)]
        return tensors

    def all_metadata(self, shape: Shape) -> dict[str, Value]:
        """Keys without the architecture's prefix."""
        common: dict[str, Value] = {
            "vocab_size": shape.n_vocab,
            "context_length": shape.n_ctx,
            "embedding_length": shape.n_embd,
            "block_count": shape.n_layers,
            "feed_forward_length": shape.n_ff_dense or shape.n_ff,
            "attention.head_count": shape.n_head,
            "attention.head_count_kv": shape.n_head_kv,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 10000.0,
            "expert_count": shape.n_experts,
            "expert_used_count": shape.top_k,
        }
        return {**common, **self.metadata(shape)}


def _attention(s: Shape, *, biases: bool = False) -> Iterator[Tensor]:
    n_q, n_kv = s.n_head * s.head_dim, s.n_head_kv * s.head_dim
    yield Tensor("attn_norm.weight", (s.n_embd,), "norm")
    for name, n_in, n_out in (
        ("attn_q", s.n_embd, n_q), ("attn_k", s.n_embd, n_kv), ("attn_v", s.n_embd, n_kv),
        ("attn_output", n_q, s.n_embd),
    ):  # fmt: skip
        yield Tensor(f"{name}.weight", (n_in, n_out), "matrix")
        if biases:
            yield Tensor(f"{name}.bias", (n_out,), "bias")


def expert_tensors(s: Shape, *, merged: bool = False, gate: bool = True, biases: bool = False) -> Iterator[Tensor]:
    yield Tensor("ffn_gate_inp.weight", (s.n_embd, s.n_experts), "router")
    if biases:
        yield Tensor("ffn_gate_inp.bias", (s.n_experts,), "router_bias")
    parts = [("gate_up", s.n_embd, 2 * s.n_ff)] if merged else [("up", s.n_embd, s.n_ff)]
    if gate and not merged:
        parts.insert(0, ("gate", s.n_embd, s.n_ff))
    parts.append(("down", s.n_ff, s.n_embd))
    for part, n_in, n_out in parts:
        yield Tensor(f"ffn_{part}_exps.weight", (n_in, n_out, s.n_experts), "expert")
        if biases:
            yield Tensor(f"ffn_{part}_exps.bias", (n_out, s.n_experts), "expert_bias")


def shared_tensors(s: Shape, n_ff: int) -> Iterator[Tensor]:
    yield Tensor("ffn_gate_shexp.weight", (s.n_embd, n_ff), "matrix")
    yield Tensor("ffn_up_shexp.weight", (s.n_embd, n_ff), "matrix")
    yield Tensor("ffn_down_shexp.weight", (n_ff, s.n_embd), "matrix")


def dense_ffn(s: Shape) -> Iterator[Tensor]:
    yield Tensor("ffn_gate.weight", (s.n_embd, s.n_ff_dense), "matrix")
    yield Tensor("ffn_up.weight", (s.n_embd, s.n_ff_dense), "matrix")
    yield Tensor("ffn_down.weight", (s.n_ff_dense, s.n_embd), "matrix")


def _ffn_norm(s: Shape) -> Tensor:
    return Tensor("ffn_norm.weight", (s.n_embd,), "norm")


def _mixtral(s: Shape, i: int) -> Iterator[Tensor]:
    yield from _attention(s)
    yield _ffn_norm(s)
    yield from expert_tensors(s)


def _no_gate(s: Shape, i: int) -> Iterator[Tensor]:
    yield from _attention(s)
    yield _ffn_norm(s)
    yield from expert_tensors(s, gate=False)


def _qwen3moe(s: Shape, i: int) -> Iterator[Tensor]:
    yield from _mixtral(s, i)
    yield Tensor("attn_q_norm.weight", (s.head_dim,), "norm")
    yield Tensor("attn_k_norm.weight", (s.head_dim,), "norm")


def _qwen2moe(s: Shape, i: int) -> Iterator[Tensor]:
    yield from _mixtral(s, i)
    for part, n in (("q", s.n_head * s.head_dim), ("k", s.n_head_kv * s.head_dim), ("v", s.n_head_kv * s.head_dim)):
        yield Tensor(f"attn_{part}.bias", (n,), "bias")
    yield Tensor("ffn_gate_inp_shexp.weight", (s.n_embd,), "bias")
    yield from shared_tensors(s, s.n_ff_dense)


def _olmoe(s: Shape, i: int) -> Iterator[Tensor]:
    yield from _mixtral(s, i)
    yield Tensor("attn_q_norm.weight", (s.n_head * s.head_dim,), "norm")
    yield Tensor("attn_k_norm.weight", (s.n_head_kv * s.head_dim,), "norm")


def _gpt_oss(s: Shape, i: int) -> Iterator[Tensor]:
    yield from _attention(s, biases=True)
    yield Tensor("attn_sinks.weight", (s.n_head,), "bias")
    yield Tensor("post_attention_norm.weight", (s.n_embd,), "norm")
    yield from expert_tensors(s, biases=True)


def _llama4(s: Shape, i: int) -> Iterator[Tensor]:
    yield from _attention(s)
    yield _ffn_norm(s)
    if i % 2:
        yield from expert_tensors(s)
        yield from shared_tensors(s, s.n_ff)
    else:
        yield from dense_ffn(s)


def _deepseek2(s: Shape, i: int, *, merged: bool = False, probs_bias: bool = True) -> Iterator[Tensor]:
    # Multi-head latent attention in the absorbed form; the lite models do not compress the query.
    nope = s.head_dim - s.head_dim_rope
    yield Tensor("attn_norm.weight", (s.n_embd,), "norm")
    yield Tensor("attn_kv_a_norm.weight", (s.kv_rank,), "norm")
    if s.q_rank:
        yield Tensor("attn_q_a_norm.weight", (s.q_rank,), "norm")
        yield Tensor("attn_q_a.weight", (s.n_embd, s.q_rank), "matrix")
        yield Tensor("attn_q_b.weight", (s.q_rank, s.n_head * s.head_dim), "matrix")
    else:
        yield Tensor("attn_q.weight", (s.n_embd, s.n_head * s.head_dim), "matrix")
    yield Tensor("attn_kv_a_mqa.weight", (s.n_embd, s.kv_rank + s.head_dim_rope), "matrix")
    yield Tensor("attn_k_b.weight", (nope, s.kv_rank, s.n_head), "matrix")
    yield Tensor("attn_v_b.weight", (s.kv_rank, nope, s.n_head), "matrix")
    yield Tensor("attn_output.weight", (s.n_head * nope, s.n_embd), "matrix")
    yield _ffn_norm(s)
    if i < s.n_dense_lead:
        yield from dense_ffn(s)
        return
    yield from expert_tensors(s, merged=merged)
    if probs_bias:
        yield Tensor("exp_probs_b.bias", (s.n_experts,), "probs_bias")
    yield from shared_tensors(s, s.n_ff * s.n_shared)


def deepseek2_metadata(s: Shape, gating: int) -> dict[str, Value]:
    nope = s.head_dim - s.head_dim_rope
    values: dict[str, Value] = {
        "leading_dense_block_count": s.n_dense_lead,
        "attention.q_lora_rank": s.q_rank,
        "attention.kv_lora_rank": s.kv_rank,
        "attention.key_length": s.kv_rank + s.head_dim_rope,
        "attention.value_length": s.kv_rank,
        "attention.key_length_mla": s.head_dim,
        "attention.value_length_mla": nope,
        "attention.head_count_kv": 1,
        "rope.dimension_count": s.head_dim_rope,
        "expert_feed_forward_length": s.n_ff,
        "expert_shared_count": s.n_shared,
        "expert_weights_scale": 1.0 if gating == 1 else 2.5,
        "expert_weights_norm": gating == 2,
        "expert_gating_func": gating,  # 1 softmax, 2 sigmoid
    }
    if s.n_groups:
        values |= {"expert_group_count": s.n_groups, "expert_group_used_count": s.n_groups_used}
    return values


_NEMOTRON_PATTERN = "MAEAE"  # Mamba, attention, experts


def _nemotron_h(s: Shape, i: int) -> Iterator[Tensor]:
    kind = _NEMOTRON_PATTERN[i % len(_NEMOTRON_PATTERN)]
    if kind == "A":
        yield from _attention(s)
        return
    yield Tensor("attn_norm.weight", (s.n_embd,), "norm")
    if kind == "M":
        n_inner, n_state, n_heads = s.n_embd, 64, s.n_head
        n_conv = n_inner + 2 * n_state
        yield Tensor("ssm_in.weight", (s.n_embd, 2 * n_inner + 2 * n_state + n_heads), "matrix")
        yield Tensor("ssm_conv1d.weight", (4, n_conv), "small")
        yield Tensor("ssm_conv1d.bias", (n_conv,), "bias")
        yield Tensor("ssm_dt.bias", (n_heads,), "bias")
        yield Tensor("ssm_a", (1, n_heads), "decay")
        yield Tensor("ssm_d", (1, n_heads), "small")
        yield Tensor("ssm_norm.weight", (n_inner, 1), "norm")
        yield Tensor("ssm_out.weight", (n_inner, s.n_embd), "matrix")
        return
    yield from expert_tensors(s, gate=False)
    yield Tensor("exp_probs_b.bias", (s.n_experts,), "probs_bias")
    yield Tensor("ffn_up_shexp.weight", (s.n_embd, s.n_ff_dense), "matrix")
    yield Tensor("ffn_down_shexp.weight", (s.n_ff_dense, s.n_embd), "matrix")


def _nemotron_h_metadata(s: Shape) -> dict[str, Value]:
    kinds = [_NEMOTRON_PATTERN[i % len(_NEMOTRON_PATTERN)] for i in range(s.n_layers)]
    return {
        **_expert_width(s),
        "feed_forward_length": [s.n_ff if kind == "E" else 0 for kind in kinds],
        "attention.head_count_kv": [s.n_head_kv if kind == "A" else 0 for kind in kinds],
        "attention.layer_norm_epsilon": 1e-5,
        "expert_shared_feed_forward_length": s.n_ff_dense,
        "expert_shared_count": 1,
        "expert_weights_norm": True,
        "expert_weights_scale": 2.5,
        # Alternately half and all of the top-k, as llama.cpp's only architecture with a top-k per layer allows.
        "expert_used_count": [max(1, s.top_k // (2 if i % 4 == 2 else 1)) if kind == "E" else 0 for i, kind in
                              enumerate(kinds)],
        "ssm.conv_kernel": 4,
        "ssm.inner_size": s.n_embd,
        "ssm.state_size": 64,
        "ssm.time_step_rank": s.n_head,
        "ssm.group_count": 1,
    }  # fmt: skip


def _heads(s: Shape) -> dict[str, Value]:
    return {
        "attention.key_length": s.head_dim,
        "attention.value_length": s.head_dim,
        "rope.dimension_count": s.head_dim,
    }


def _expert_width(s: Shape) -> dict[str, Value]:
    return {**_heads(s), "expert_feed_forward_length": s.n_ff}


_TINY = Shape(
    n_layers=2, n_embd=256, n_ff=256, n_experts=8, top_k=2, n_head=4, n_head_kv=2, head_dim=64, n_ff_dense=512
)
_TINY_MLA = replace(
    _TINY, n_experts=16, top_k=4, n_head_kv=1, n_shared=2, n_groups=4, n_groups_used=2, kv_rank=128, q_rank=128,
    head_dim_rope=32, head_dim=96, n_layers=3,
)  # fmt: skip

ARCHITECTURES: dict[str, Architecture] = {
    a.name: a
    for a in (
        Architecture("mixtral", "llama", "softmax router, normalised weights", _TINY, _mixtral,
                     lambda s: {**_heads(s), "feed_forward_length": s.n_ff}),
        Architecture("nogate", "llama", "experts without a gate matrix (up, SiLU, down)", _TINY, _no_gate,
                     lambda s: {**_heads(s), "feed_forward_length": s.n_ff}),
        Architecture("qwen3moe", "qwen3moe", "16 small experts, top-4, query and key norms",
                     replace(_TINY, n_experts=16, top_k=4), _qwen3moe, _expert_width),
        Architecture("qwen2moe", "qwen2moe", "gated shared expert, attention biases",
                     replace(_TINY, top_k=4, n_head_kv=4), _qwen2moe,
                     lambda s: {**_expert_width(s), "expert_shared_feed_forward_length": s.n_ff_dense}),
        Architecture("olmoe", "olmoe", "router weights not normalised", replace(_TINY, top_k=3, n_head_kv=4), _olmoe,
                     lambda s: {**_heads(s), "feed_forward_length": s.n_ff}),
        Architecture("deepseek2", "deepseek2", "shared experts, expert groups, sigmoid router with selection bias",
                     _TINY_MLA, _deepseek2, lambda s: deepseek2_metadata(s, 2)),
        Architecture("deepseek2-merged", "deepseek2", "merged gate_up experts, softmax router, shared experts",
                     replace(_TINY_MLA, n_groups=0, n_groups_used=0, top_k=3),
                     lambda s, i: _deepseek2(s, i, merged=True, probs_bias=False), lambda s: deepseek2_metadata(s, 1)),
        Architecture("deepseek-lite", "deepseek2", "separate gate and up, softmax router, shared experts",
                     replace(_TINY_MLA, n_groups=0, n_groups_used=0, q_rank=0),
                     lambda s, i: _deepseek2(s, i, probs_bias=False), lambda s: deepseek2_metadata(s, 1)),
        Architecture("gpt-oss", "gpt-oss", "router and expert biases, clamped SwiGLU, attention sinks",
                     replace(_TINY, top_k=4), _gpt_oss,
                     lambda s: {**_expert_width(s), "attention.sliding_window": 128}),
        Architecture("llama4", "llama4", "every second layer MoE, sigmoid weights before the experts, shared expert",
                     replace(_TINY, n_layers=4), _llama4,
                     lambda s: {**_expert_width(s), "interleave_moe_layer_step": 2}),
        Architecture("top1", "llama", "one expert a token", replace(_TINY, top_k=1), _mixtral,
                     lambda s: {**_heads(s), "feed_forward_length": s.n_ff}),
        Architecture("nemotron-h", "nemotron_h_moe", "no gate, squared ReLU, top-2 and top-4 by layer, Mamba layer",
                     replace(_TINY, n_layers=5, top_k=4), _nemotron_h, _nemotron_h_metadata),
    )
}  # fmt: skip


_FULL_PRECISION_ROLES = {"norm", "bias", "router", "router_bias", "probs_bias", "expert_bias", "small", "decay"}


def tensor_type(tensor: Tensor, type_name: str, expert_type: str | None = None) -> str:
    """The type a converter would give this tensor in a model of `type_name`."""
    from hybrimoe.models.quantise import fitting_type

    if tensor.role in _FULL_PRECISION_ROLES or len(tensor.shape) == 1:
        return "F32"
    if tensor.role == "expert":
        return fitting_type(tensor.shape[0], expert_type or type_name)
    if type_name.upper() in ("F32", "F16", "BF16"):
        return type_name.upper()
    # Types below four bits and MXFP4 are for experts; the rest of such models is kept finer.
    return fitting_type(
        tensor.shape[0], type_name if type_name.upper().startswith(("Q4", "Q5", "Q6", "Q8")) else "Q8_0"
    )


def random_weights(tensor: Tensor, seed: int) -> npt.NDArray[np.float32]:
    """Weights in C order (slowest dimension first); depends on the seed and the tensor's name only.

    Scaled as in trained models, so that logits stay finite and differ between tokens; routers are scaled up, so that
    the choice of experts is decisive and survives small numerical differences.
    """
    import numpy as np

    rng = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
    values: npt.NDArray[np.float32] = rng.standard_normal(tuple(reversed(tensor.shape)), dtype=np.float32)
    if tensor.role == "decay":
        values = -np.abs(values) - np.float32(0.1)
    elif tensor.role == "norm":
        values = np.float32(1.0) + np.float32(0.1) * values
    elif tensor.role in ("bias", "router_bias", "expert_bias", "probs_bias"):
        values *= np.float32(0.1)
    elif tensor.role in ("matrix", "expert", "router"):
        values *= np.float32((2.0 if tensor.role == "router" else 1.0) / tensor.fan_in**0.5)
    return values


# --- vocabulary -----------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
_COMMON_PAIRS = (
    "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co me "
    "de hi ri ro ic ne ea ra ce li ch ll be ma si om ur"
)


def add_vocabulary(writer: Any, n_vocab: int) -> None:
    """A working SentencePiece-style vocabulary: three special tokens, 256 bytes, printable characters, letter pairs.

    `n_vocab` is at least 512; what is left is filled with unused entries.
    """
    import gguf

    normal, control, unknown = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.UNKNOWN
    entries = [("<unk>", 0.0, unknown), ("<s>", 0.0, control), ("</s>", 0.0, control)]
    entries += [(f"<0x{b:02X}>", 0.0, gguf.TokenType.BYTE) for b in range(256)]
    pairs = [*_COMMON_PAIRS.split(), *("\u2581" + c for c in "abcdefghijklmnopqrstuvwxyz")]
    entries += [(pair, -float(i + 1), normal) for i, pair in enumerate(pairs)]
    characters = ["\u2581", *(chr(c) for c in range(33, 127))]
    entries += [(c, -1000.0 - i, normal) for i, c in enumerate(characters)]
    if n_vocab < len(entries):
        raise ValueError(f"the vocabulary has {len(entries)} entries, {n_vocab} were asked for")
    entries += [(f"<unused{i}>", -2000.0, gguf.TokenType.UNUSED) for i in range(n_vocab - len(entries))]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _, _ in entries])
    writer.add_token_scores([score for _, score, _ in entries])
    writer.add_token_types([int(kind) for _, _, kind in entries])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)


def add_metadata(writer: Any, architecture: Architecture, shape: Shape) -> None:
    """Hyperparameters and vocabulary."""
    for suffix, value in architecture.all_metadata(shape).items():
        key = f"{architecture.arch}.{suffix}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_array(key, list(value))
    add_vocabulary(writer, shape.n_vocab)
