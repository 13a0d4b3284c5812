"""The models of public measurements, as headers without weights: shapes by their published configurations,
quantisations by what their usual files hold.

A header of `write_header` is what `hybrimoe plan` needs; llama.cpp builds its graphs from it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from moe_shapes import (
    ARCHITECTURES,
    Shape,
    Tensor,
    Value,
    deepseek2_metadata,
    dense_ffn,
    expert_tensors,
    shared_tensors,
)

from hybrimoe.gguf_header import GGML_TYPES


@dataclass(frozen=True)
class FieldModel:
    """`layer` and `metadata` as in `moe_shapes.Architecture`; `more` are sizes that `Shape` lacks."""

    arch: str
    shape: Shape
    layer: Callable[[FieldModel, int], Iterator[Tensor]]
    metadata: Callable[[FieldModel], dict[str, Value]]
    more: dict[str, int] = field(default_factory=dict)


def _of(name: str) -> tuple[Any, Any]:
    known = ARCHITECTURES[name]
    return (lambda m, i: known.layer(m.shape, i)), (lambda m: known.metadata(m.shape))


def _attention(s: Shape, *, wide_query: int = 1, biases: bool = False, merged: bool = False) -> Iterator[Tensor]:
    n_q, n_kv = s.n_head * s.head_dim * wide_query, s.n_head_kv * s.head_dim
    yield Tensor("attn_norm.weight", (s.n_embd,), "norm")
    if merged:
        yield Tensor("attn_qkv.weight", (s.n_embd, n_q + 2 * n_kv), "matrix")
    else:
        for part, n_out in (("q", n_q), ("k", n_kv), ("v", n_kv)):
            yield Tensor(f"attn_{part}.weight", (s.n_embd, n_out), "matrix")
            if biases:
                yield Tensor(f"attn_{part}.bias", (n_out,), "bias")
    yield Tensor("attn_output.weight", (s.n_head * s.head_dim, s.n_embd), "matrix")


def _head_norms(s: Shape, *, per_head: bool = True) -> Iterator[Tensor]:
    for part, n in (("q", s.n_head), ("k", s.n_head_kv)):
        yield Tensor(f"attn_{part}_norm.weight", (s.head_dim * (1 if per_head else n),), "norm")


def _probs_bias(s: Shape) -> Tensor:
    return Tensor("exp_probs_b.bias", (s.n_experts,), "probs_bias")


def _widths(m: FieldModel) -> dict[str, Value]:
    s = m.shape
    return {
        "attention.key_length": s.head_dim,
        "attention.value_length": s.head_dim,
        "rope.dimension_count": s.head_dim,
        "expert_feed_forward_length": s.n_ff,
    }


def _glm_layer(m: FieldModel, i: int) -> Iterator[Tensor]:
    s = m.shape
    yield from _attention(s, biases=True)
    if m.more.get("head_norms"):
        yield from _head_norms(s)
    yield Tensor("post_attention_norm.weight", (s.n_embd,), "norm")
    if i < s.n_dense_lead:
        yield from dense_ffn(s)
        return
    yield from expert_tensors(s)
    yield _probs_bias(s)
    yield from shared_tensors(s, s.n_ff)


def _grouped_metadata(m: FieldModel) -> dict[str, Value]:
    return {
        **_widths(m),
        "leading_dense_block_count": m.shape.n_dense_lead,
        "expert_shared_count": 1,
        "expert_shared_feed_forward_length": m.shape.n_ff,
        "expert_weights_scale": 1.0,
        "expert_weights_norm": True,
        "expert_gating_func": 2,
        "expert_group_count": 1,
        "expert_group_used_count": 1,
        "nextn_predict_layers": 0,
    }


def _hunyuan_layer(m: FieldModel, i: int) -> Iterator[Tensor]:
    s = m.shape
    yield from _attention(s)
    yield from _head_norms(s)
    yield Tensor("ffn_norm.weight", (s.n_embd,), "norm")
    yield from expert_tensors(s)
    yield from shared_tensors(s, s.n_ff)


def _bailing_layer(m: FieldModel, i: int) -> Iterator[Tensor]:
    s = m.shape
    yield from _attention(s, merged=True)
    yield from _head_norms(s)
    yield Tensor("ffn_norm.weight", (s.n_embd,), "norm")
    if i < s.n_dense_lead:
        yield from dense_ffn(s)
        return
    yield from expert_tensors(s)
    yield _probs_bias(s)
    yield from shared_tensors(s, s.n_ff)


def _minimax_layer(m: FieldModel, i: int) -> Iterator[Tensor]:
    s = m.shape
    yield from _attention(s)
    yield from _head_norms(s, per_head=False)
    yield Tensor("ffn_norm.weight", (s.n_embd,), "norm")
    yield from expert_tensors(s)
    yield _probs_bias(s)


def _delta_layer(m: FieldModel, i: int) -> Iterator[Tensor]:
    """Three of four layers are gated delta networks (Qwen3-Next and after)."""
    s, v = m.shape, m.more
    if (i + 1) % 4 == 0:
        yield from _attention(s, wide_query=2)  # half of the query gates the output
        yield from _head_norms(s)
    else:
        key, value = v["key_heads"] * v["state"], v["value_heads"] * v["state"]
        yield Tensor("attn_norm.weight", (s.n_embd,), "norm")
        yield Tensor("attn_qkv.weight", (s.n_embd, 2 * key + value), "matrix")
        yield Tensor("attn_gate.weight", (s.n_embd, value), "matrix")
        yield Tensor("ssm_conv1d.weight", (4, 2 * key + value), "small")
        yield Tensor("ssm_dt.bias", (v["value_heads"],), "bias")
        yield Tensor("ssm_a", (v["value_heads"],), "decay")
        yield Tensor("ssm_norm.weight", (v["state"],), "norm")
        yield Tensor("ssm_out.weight", (value, s.n_embd), "matrix")
        if m.arch == "qwen3next":
            yield Tensor("ssm_ba.weight", (s.n_embd, 2 * v["value_heads"]), "matrix")
        else:
            yield Tensor("ssm_beta.weight", (s.n_embd, v["value_heads"]), "matrix")
            yield Tensor("ssm_alpha.weight", (s.n_embd, v["value_heads"]), "matrix")
    yield Tensor("post_attention_norm.weight", (s.n_embd,), "norm")
    yield from expert_tensors(s)
    yield Tensor("ffn_gate_inp_shexp.weight", (s.n_embd,), "bias")
    yield from shared_tensors(s, s.n_ff)


def _delta_metadata(m: FieldModel) -> dict[str, Value]:
    s, v = m.shape, m.more
    return {
        **_widths(m),
        "rope.dimension_count": 64,
        "rope.dimension_sections": [11, 11, 10, 0],
        "expert_shared_feed_forward_length": s.n_ff,
        "ssm.conv_kernel": 4,
        "ssm.state_size": v["state"],
        "ssm.group_count": v["key_heads"],
        "ssm.time_step_rank": v["value_heads"],
        "ssm.inner_size": v["value_heads"] * v["state"],
        "full_attention_interval": 4,
    }


_QWEN3, _OSS, _LITE = _of("qwen3moe"), _of("gpt-oss"), _of("deepseek-lite")
_DEEPSEEK = (_of("deepseek2")[0], lambda m: deepseek2_metadata(m.shape, 2))
_GLM = (_glm_layer, _grouped_metadata)
_DELTA = (_delta_layer, _delta_metadata)
_HEADS_32 = {"value_heads": 32, "key_heads": 16, "state": 128}
_HEADS_64 = {"value_heads": 64, "key_heads": 16, "state": 128}

MODELS = {
    "qwen3-30b-a3b": FieldModel("qwen3moe", Shape(
        48, 2048, 768, 128, 8, 32, 4, 128, n_vocab=151936, n_ctx=262144), *_QWEN3),
    "qwen3-235b-a22b": FieldModel("qwen3moe", Shape(
        94, 4096, 1536, 128, 8, 64, 4, 128, n_vocab=151936, n_ctx=40960), *_QWEN3),
    "gpt-oss-20b": FieldModel("gpt-oss", Shape(
        24, 2880, 2880, 32, 4, 64, 8, 64, n_vocab=201088, n_ctx=131072), *_OSS),
    "gpt-oss-120b": FieldModel("gpt-oss", Shape(
        36, 2880, 2880, 128, 4, 64, 8, 64, n_vocab=201088, n_ctx=131072), *_OSS),
    "deepseek-v2-lite": FieldModel("deepseek2", Shape(
        27, 2048, 1408, 64, 6, 16, 1, 192, head_dim_rope=64, kv_rank=512, n_shared=2, n_ff_dense=10944, n_vocab=102400,
        n_ctx=163840), *_LITE),
    "deepseek-v3": FieldModel("deepseek2", Shape(
        61, 7168, 2048, 256, 8, 128, 1, 192, head_dim_rope=64, kv_rank=512, q_rank=1536, n_shared=1, n_groups=8,
        n_groups_used=4, n_ff_dense=18432, n_dense_lead=3, n_vocab=129280, n_ctx=163840), *_DEEPSEEK),
    "kimi-k2": FieldModel("deepseek2", Shape(
        61, 7168, 2048, 384, 8, 64, 1, 192, head_dim_rope=64, kv_rank=512, q_rank=1536, n_shared=1, n_ff_dense=18432,
        n_vocab=163840, n_ctx=262144), *_DEEPSEEK),
    # Its values are wider than its keys' part without positions: 256 and 192.
    "glm-4.7-flash": FieldModel("deepseek2", Shape(
        47, 2048, 1536, 64, 4, 20, 1, 256, head_dim_rope=64, kv_rank=512, q_rank=768, n_shared=1, n_ff_dense=10240,
        n_vocab=154880, n_ctx=202752), *_DEEPSEEK, {"value_dim": 256}),
    "glm-4.5-air": FieldModel("glm4moe", Shape(
        46, 4096, 1408, 128, 8, 96, 8, 128, n_ff_dense=10944, n_vocab=151552, n_ctx=131072), *_GLM),
    "glm-4.7": FieldModel("glm4moe", Shape(
        92, 5120, 1536, 160, 8, 96, 8, 128, n_ff_dense=12288, n_dense_lead=3, n_vocab=151552, n_ctx=202752), *_GLM,
        {"head_norms": 1}),
    "hunyuan-a13b": FieldModel("hunyuan-moe", Shape(
        32, 4096, 3072, 64, 8, 32, 8, 128, n_vocab=128167, n_ctx=262144), _hunyuan_layer,
        lambda m: {**_widths(m), "expert_shared_feed_forward_length": m.shape.n_ff}),
    "ling-flash-2.0": FieldModel("bailingmoe2", Shape(
        32, 4096, 1024, 256, 8, 32, 4, 128, n_ff_dense=9216, n_vocab=157184, n_ctx=131072), _bailing_layer,
        _grouped_metadata),
    "minimax-m2": FieldModel("minimax-m2", Shape(
        62, 3072, 1536, 256, 8, 48, 8, 128, n_vocab=200064, n_ctx=196608), _minimax_layer,
        lambda m: {**_widths(m), "expert_gating_func": 2}),
    "qwen3-next-80b-a3b": FieldModel("qwen3next", Shape(
        48, 2048, 512, 512, 10, 16, 2, 256, n_vocab=151936, n_ctx=262144), *_DELTA, _HEADS_32),
    "qwen3.5-35b-a3b": FieldModel("qwen35moe", Shape(
        40, 2048, 512, 256, 8, 16, 2, 256, n_vocab=248320, n_ctx=262144), *_DELTA, _HEADS_32),
    "qwen3.5-122b-a10b": FieldModel("qwen35moe", Shape(
        48, 3072, 1024, 256, 8, 32, 2, 256, n_vocab=248320, n_ctx=262144), *_DELTA, _HEADS_64),
    "qwen3.5-397b-a17b": FieldModel("qwen35moe", Shape(
        60, 4096, 1024, 512, 10, 32, 2, 256, n_vocab=248320, n_ctx=262144), *_DELTA, _HEADS_64),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Types of a file: experts' gates and ups, their downs, downs of the layers that llama.cpp gives more bits, all
    other matrices, embedding, output."""

    gate_up: str
    down: str
    more: str
    rest: str
    embedding: str
    output: str


RECIPES = {
    "Q4_0": Recipe("Q4_0", "Q4_0", "Q4_0", "Q4_0", "Q4_0", "Q6_K"),
    "Q4_1": Recipe("Q4_1", "Q4_1", "Q4_1", "Q4_1", "Q4_1", "Q6_K"),
    "Q4_K_S": Recipe("Q4_K", "Q4_K", "Q5_K", "Q4_K", "Q4_K", "Q6_K"),
    "Q4_K_S+": Recipe("Q4_K", "Q5_K", "Q5_K", "Q5_K", "Q4_K", "Q6_K"),
    "Q4_K_M": Recipe("Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K"),
    "Q5_K_M": Recipe("Q5_K", "Q5_K", "Q6_K", "Q5_K", "Q5_K", "Q6_K"),
    "Q6_K": Recipe("Q6_K", "Q6_K", "Q6_K", "Q6_K", "Q6_K", "Q6_K"),
    "Q8_0": Recipe("Q8_0", "Q8_0", "Q8_0", "Q8_0", "Q8_0", "Q8_0"),
    "BF16": Recipe("BF16", "BF16", "BF16", "BF16", "BF16", "BF16"),
    "IQ2_M": Recipe("IQ2_S", "IQ2_S", "IQ3_S", "Q4_K", "Q4_K", "Q6_K"),
    "IQ4_K": Recipe("Q4_K", "Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q6_K"),
    "MXFP4": Recipe("MXFP4", "MXFP4", "MXFP4", "Q8_0", "Q8_0", "Q8_0"),
    "MXFP4+F16": Recipe("MXFP4", "MXFP4", "MXFP4", "F16", "F16", "F16"),
    "MXFP4+Q6_K": Recipe("MXFP4", "MXFP4", "MXFP4", "Q6_K", "Q6_K", "Q6_K"),
    "UD-IQ2_M": Recipe("IQ2_XS", "IQ2_XS", "IQ2_S", "Q6_K", "Q4_K", "Q6_K"),
    "UD-IQ4_XS": Recipe("IQ3_S", "IQ4_XS", "IQ4_XS", "Q8_0", "Q8_0", "Q8_0"),
    "UD-Q3_K_XL": Recipe("Q3_K", "Q3_K", "Q4_K", "Q8_0", "Q8_0", "Q8_0"),
    "UD-Q4_K_XL": Recipe("Q4_K", "Q5_K", "Q5_K", "Q8_0", "Q8_0", "Q8_0"),
    "UD-Q5_K_XL": Recipe("Q5_K", "Q6_K", "Q6_K", "Q8_0", "Q8_0", "Q8_0"),
    "UD-Q6_K_XL": Recipe("Q6_K", "Q8_0", "Q8_0", "Q8_0", "Q8_0", "Q8_0"),
    "UD-Q8_K_XL-INT4": Recipe("Q4_0", "Q4_0", "Q4_0", "BF16", "BF16", "BF16"),
    "APEX-I-Compact": Recipe("Q3_K", "Q4_K", "Q4_K", "Q6_K", "Q6_K", "Q6_K"),
}
_TYPES = {kind.name: (number, kind) for number, kind in GGML_TYPES.items()}
_FULL_PRECISION = {"norm", "bias", "router", "router_bias", "probs_bias", "expert_bias", "small", "decay"}


def tensors(model: FieldModel) -> Iterator[Tensor]:
    """All tensors, in a file's order."""
    s = model.shape
    yield Tensor("token_embd.weight", (s.n_embd, s.n_vocab), "embedding")
    yield Tensor("output_norm.weight", (s.n_embd,), "norm")
    yield Tensor("output.weight", (s.n_embd, s.n_vocab), "matrix")
    for i in range(s.n_layers):
        for tensor in model.layer(model, i):
            shape = tensor.shape
            if (wide := model.more.get("value_dim")) and tensor.name == "attn_v_b.weight":
                shape = (s.kv_rank, wide, s.n_head)
            elif wide and tensor.name == "attn_output.weight":
                shape = (s.n_head * wide, s.n_embd)
            yield Tensor(f"blk.{i}.{tensor.name}", shape, tensor.role)


def _metadata(model: FieldModel) -> dict[str, Value]:
    s = model.shape
    values: dict[str, Value] = {
        "vocab_size": s.n_vocab,
        "context_length": s.n_ctx,
        "embedding_length": s.n_embd,
        "block_count": s.n_layers,
        "feed_forward_length": s.n_ff_dense or s.n_ff,
        "attention.head_count": s.n_head,
        "attention.head_count_kv": s.n_head_kv,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 1e6,
        "expert_count": s.n_experts,
        "expert_used_count": s.top_k,
        **model.metadata(model),
    }
    if wide := model.more.get("value_dim"):
        values["attention.value_length_mla"] = wide
    return values


def _type_of(tensor: Tensor, recipe: Recipe, n_layers: int) -> str:
    if tensor.role in _FULL_PRECISION or len(tensor.shape) == 1:
        return "F32"
    if tensor.role == "embedding":
        kind = recipe.embedding
    elif tensor.name == "output.weight":
        kind = recipe.output
    elif tensor.role == "expert" and "_down_" in tensor.name:
        # llama.cpp's use_more_bits (src/llama-quant.cpp): the first and last eighth, and every third layer between.
        i = int(tensor.name.split(".")[1])
        more = i < n_layers // 8 or i >= 7 * n_layers // 8 or (i - n_layers // 8) % 3 == 2
        kind = recipe.more if more else recipe.down
    else:
        kind = recipe.gate_up if tensor.role == "expert" else recipe.rest
    return _fitting(tensor.shape[0], kind)


def _fitting(n_per_row: int, kind: str) -> str:
    """The type, or what llama.cpp takes in its place where rows are no whole number of blocks (src/llama-quant.cpp)."""
    if n_per_row % _TYPES[kind][1].block_elems == 0:
        return kind
    other = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}.get(kind, "IQ4_NL")
    return other if n_per_row % _TYPES[other][1].block_elems == 0 else "F16"


def write_header(path: Path, model_name: str, quant: str) -> int:
    """Writes the header of a model; returns the bytes of its weights. Raises KeyError for unknown names."""
    import gguf
    import numpy as np

    model, recipe = MODELS[model_name], RECIPES[quant]
    writer: Any = gguf.GGUFWriter(None, model.arch)
    writer.add_name(model_name)
    for suffix, value in _metadata(model).items():
        key = f"{model.arch}.{suffix}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_array(key, list(value))
    writer.add_tokenizer_model("no_vocab")
    total = 0
    for tensor in tensors(model):
        raw = gguf.GGMLQuantizationType(_TYPES[_type_of(tensor, recipe, model.shape.n_layers)][0])
        block, size = gguf.GGML_QUANT_SIZES[raw]
        n_bytes = int(np.prod(tensor.shape, dtype=np.int64)) // block * size
        total += n_bytes
        writer.add_tensor_info(tensor.name, tuple(reversed(tensor.shape)), np.dtype(np.float32), n_bytes, raw_dtype=raw)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return total
