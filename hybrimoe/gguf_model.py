"""What a GGUF model consists of, read from its header: architecture, experts, bytes, shapes, hyperparameters.

`inspect` works on every language model in GGUF, with or without experts; `GgufModel.require_moe` draws that line. Names
of metadata and tensors are those of llama.cpp (`src/llama-arch.cpp` of the pinned release).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hybrimoe.errors import ModelError
from hybrimoe.gguf_header import DOWNLOAD_HINT, ArraySummary, GgufHeader, TensorInfo, Value, read_header

__all__ = ["GgufModel", "KvShape", "MoeLayer", "TensorInfo", "inspect"]

# llama.cpp's LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS.
_MAX_LAYERS = 512
_MAX_EXPERTS = 1024
_MAX_SPLITS = 9999

_BLOCK = re.compile(r"blk\.(\d{1,6})\.(.+)")
# `_chexps` are grovemoe's second group of experts.
_EXPERT = re.compile(r"ffn_(gate_up|gate|up|down)_(?:ch)?exps\.(weight|bias|scale|input_scale)")
_OLD_EXPERT = re.compile(r"blk\.\d{1,6}\.ffn_(?:gate|up|down)\.\d{1,6}\.weight")
_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

_FILE_TYPES: Mapping[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4",
    40: "Q1_0", 41: "Q2_0",
}  # fmt: skip


@dataclass(frozen=True)
class MoeLayer:
    """One layer with routed experts. Bytes are those of ONE expert, biases and scales included; absent parts are 0.

    Either `gate_up_bytes` is set (merged tensor) or `gate_bytes` and `up_bytes`; models without a gate have only
    `up_bytes`. `predicts_ahead` marks layers of a multi-token prediction head, which ordinary decoding does not run.
    """

    index: int
    n_experts: int
    n_experts_used: int
    gate_bytes: int
    up_bytes: int
    gate_up_bytes: int
    down_bytes: int
    expert_tensors: tuple[TensorInfo, ...]
    router_tensors: tuple[TensorInfo, ...]
    shared_tensors: tuple[TensorInfo, ...]
    predicts_ahead: bool = False

    @property
    def bytes_per_expert(self) -> int:
        return self.gate_bytes + self.up_bytes + self.gate_up_bytes + self.down_bytes

    @property
    def expert_bytes(self) -> int:
        """All routed experts of the layer together."""
        return sum(t.n_bytes for t in self.expert_tensors)

    @property
    def shared_bytes(self) -> int:
        return sum(t.n_bytes for t in self.shared_tensors)

    @property
    def merged_gate_up(self) -> bool:
        return self.gate_up_bytes > 0

    @property
    def expert_types(self) -> tuple[str, ...]:
        """Quantisation types of the experts' weight matrices, each once, in the file's order."""
        return tuple(dict.fromkeys(t.type_name for t in self.expert_tensors if t.name.endswith(".weight")))


@dataclass(frozen=True)
class KvShape:
    """What the KV cache's size depends on. `n_head_kv` has one entry per layer; 0: the layer caches nothing."""

    n_head: int
    n_head_kv: tuple[int, ...]
    key_length: int
    value_length: int
    is_mla: bool
    sliding_window: int

    def bytes_for(self, n_ctx: int, k_bytes_per_elem: float = 2.0, v_bytes_per_elem: float = 2.0) -> int:
        """Bytes of a KV cache for `n_ctx` tokens in every layer (default F16).

        An upper bound where layers have a sliding window. With multi-head latent attention only the compressed key row
        is cached (llama.cpp `src/llama-kv-cache.cpp`). State of recurrent layers is not included.
        """
        per_head = self.key_length * k_bytes_per_elem
        if not self.is_mla:
            per_head += self.value_length * v_bytes_per_elem
        return int(sum(self.n_head_kv) * per_head * n_ctx)


@dataclass(frozen=True)
class GgufModel:
    """A model as its header (of all parts) describes it. Sizes are bytes; `tensors` are in the files' order."""

    path: Path
    parts: tuple[Path, ...]
    architecture: str
    name: str
    file_type: str
    n_layers: int
    n_predict_ahead_layers: int
    n_embd: int
    n_ctx_train: int
    n_vocab: int
    n_experts: int
    n_experts_used: int
    n_expert_groups: int
    n_expert_groups_used: int
    n_shared_experts: int
    kv: KvShape
    chat_template: str | None
    tokenizer_model: str | None
    moe_layers: tuple[MoeLayer, ...]
    tensors: tuple[TensorInfo, ...]
    file_bytes: int
    metadata: Mapping[str, Value]

    @property
    def is_moe(self) -> bool:
        return bool(self.moe_layers)

    @property
    def moe_layer_indices(self) -> tuple[int, ...]:
        """Layers whose experts run in ordinary decoding (prediction heads left out)."""
        return tuple(layer.index for layer in self.moe_layers if not layer.predicts_ahead)

    @cached_property
    def total_bytes(self) -> int:
        """All weights."""
        return sum(t.n_bytes for t in self.tensors)

    @cached_property
    def expert_bytes(self) -> int:
        """All routed experts."""
        return sum(layer.expert_bytes for layer in self.moe_layers)

    @cached_property
    def shared_expert_bytes(self) -> int:
        return sum(layer.shared_bytes for layer in self.moe_layers)

    @cached_property
    def router_bytes(self) -> int:
        return sum(t.n_bytes for layer in self.moe_layers for t in layer.router_tensors)

    @property
    def dense_bytes(self) -> int:
        """Everything that is not a routed expert: attention, embeddings, norms, shared experts and routers."""
        return self.total_bytes - self.expert_bytes

    @cached_property
    def active_bytes(self) -> int:
        """Weights that one decoded token reads: dense weights and the experts used (token embedding table included)."""
        return self.dense_bytes + sum(layer.n_experts_used * layer.bytes_per_expert for layer in self.moe_layers)

    @cached_property
    def n_params(self) -> int:
        return sum(t.n_elements for t in self.tensors)

    def require_moe(self) -> GgufModel:
        """Returns the model; raises `ModelError` where there are no routed experts to schedule."""
        if self.is_moe:
            return self
        if any(_OLD_EXPERT.fullmatch(t.name) for t in self.tensors):
            raise ModelError(
                f"'{self.path.name}' stores every expert as a tensor of its own, which llama.cpp no longer loads",
                "convert the model again with a present llama.cpp",
            )
        raise ModelError(
            f"'{self.path.name}' has no experts (architecture {self.architecture}), nothing to schedule",
            "hybrimoe models list",
        )

    def to_dict(self) -> dict[str, Any]:
        """The model as JSON-able data, without the tensor table."""
        return {
            "path": str(self.path),
            "parts": [str(p) for p in self.parts],
            "architecture": self.architecture,
            "name": self.name,
            "file_type": self.file_type,
            "n_params": self.n_params,
            "n_layers": self.n_layers,
            "n_embd": self.n_embd,
            "n_ctx_train": self.n_ctx_train,
            "n_vocab": self.n_vocab,
            "is_moe": self.is_moe,
            "n_experts": self.n_experts,
            "n_experts_used": self.n_experts_used,
            "n_expert_groups": self.n_expert_groups,
            "n_expert_groups_used": self.n_expert_groups_used,
            "n_shared_experts": self.n_shared_experts,
            "moe_layer_indices": list(self.moe_layer_indices),
            "n_predict_ahead_layers": self.n_predict_ahead_layers,
            "file_bytes": self.file_bytes,
            "total_bytes": self.total_bytes,
            "expert_bytes": self.expert_bytes,
            "shared_expert_bytes": self.shared_expert_bytes,
            "router_bytes": self.router_bytes,
            "dense_bytes": self.dense_bytes,
            "active_bytes": self.active_bytes,
            "kv_bytes_per_token": self.kv.bytes_for(1),
            "tokenizer_model": self.tokenizer_model,
            "has_chat_template": self.chat_template is not None,
            "layers": [_layer_dict(layer) for layer in self.moe_layers],
        }


def _layer_dict(layer: MoeLayer) -> dict[str, Any]:
    return {
        "layer": layer.index,
        "n_experts": layer.n_experts,
        "n_experts_used": layer.n_experts_used,
        "bytes_per_expert": layer.bytes_per_expert,
        "gate_bytes": layer.gate_bytes,
        "up_bytes": layer.up_bytes,
        "gate_up_bytes": layer.gate_up_bytes,
        "down_bytes": layer.down_bytes,
        "shared_bytes": layer.shared_bytes,
        "expert_types": list(layer.expert_types),
        "predicts_ahead": layer.predicts_ahead,
    }


def inspect(path: Path | str, *, header_only: bool = False) -> GgufModel:
    """Reads the headers of a model's file, or of all parts when `path` is the first part of a split model.

    `header_only` accepts files whose weights are missing (a header fetched alone, for planning before a download).
    Raises `ModelError` for everything that is wrong with the file (missing, no GGUF, truncated, damaged, part missing,
    unknown quantisation type), naming file and fault; `HybrimoeError` when the system refuses to read it.
    """
    path = Path(path)
    first = read_header(path)
    headers = [first, *_other_parts(first)]
    for header in headers:
        if not header_only:
            _check_data(header)
    return _Builder(headers).build()


def _check_data(header: GgufHeader) -> None:
    for tensor in header.tensors:
        end = tensor.offset + tensor.n_bytes
        if end > header.file_bytes:
            raise ModelError(
                f"'{header.path.name}' is truncated: tensor '{tensor.name}' ends at byte {end}, "
                f"the file has {header.file_bytes}",
                DOWNLOAD_HINT,
            )


def _other_parts(first: GgufHeader) -> list[GgufHeader]:
    meta = _Meta(first)
    n_parts = meta.integer("split.count", 0)
    if n_parts <= 1:
        return []
    if n_parts > _MAX_SPLITS:
        raise meta.fail(f"is damaged: it claims to have {n_parts} parts")
    number = meta.integer("split.no", 0)
    match = _SPLIT_NAME.fullmatch(first.path.name)
    if number != 0:
        hint = "give the first part, whose name ends in '-00001-of-....gguf'"
        if match:
            hint = f"give the first part: '{first.path.with_name(f'{match[1]}-00001-of-{match[3]}.gguf')}'"
        raise ModelError(f"'{first.path.name}' is part {number + 1} of {n_parts}", hint)
    if not match or int(match[2]) != 1 or int(match[3]) != n_parts:
        raise ModelError(
            f"'{first.path.name}' is the first of {n_parts} parts, but its name does not say so",
            f"rename the parts to 'NAME-00001-of-{n_parts:05}.gguf' and so on",
        )
    others = []
    for i in range(1, n_parts):
        part = first.path.with_name(f"{match[1]}-{i + 1:05}-of-{n_parts:05}.gguf")
        if not part.exists():
            raise ModelError(f"part {i + 1} of {n_parts} is missing: '{part}'", "download all parts into one folder")
        header = read_header(part)
        if _Meta(header).integer("split.no", -1) != i:
            raise ModelError(f"'{part.name}' is not part {i + 1} of this model", DOWNLOAD_HINT)
        others.append(header)
    names = [t.name for h in (first, *others) for t in h.tensors]
    expected = meta.integer("split.tensors.count", len(names))
    if len(names) != expected or len(set(names)) != len(names):
        raise meta.fail(f"is damaged: its parts hold {len(set(names))} different tensors, expected {expected}")
    return others


class _Meta:
    """Typed access to a header's metadata; a value of the wrong type or beyond every bound is damage."""

    def __init__(self, header: GgufHeader) -> None:
        self._header = header
        self.values = header.metadata

    def fail(self, what: str, hint: str = DOWNLOAD_HINT) -> ModelError:
        return ModelError(f"'{self._header.path.name}' {what}", hint)

    def integer(self, key: str, default: int, most: int = 1 << 31) -> int:
        value = self.values.get(key, default)
        if type(value) is not int or (value != default and not 0 <= value <= most):
            raise self.fail(f"is damaged: '{key}' is {_shown(value)}, expected an integer from 0 to {most}")
        return value

    def string(self, key: str) -> str | None:
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.fail(f"is damaged: '{key}' is {_shown(value)}, expected a string")
        return value

    def per_layer(self, key: str, n_layers: int, default: int, most: int = 1 << 31) -> tuple[int, ...]:
        """A number for all layers, or an array with one for each."""
        value = self.values.get(key)
        if not isinstance(value, tuple):
            return (self.integer(key, default, most),) * n_layers
        integers = tuple(v for v in value if type(v) is int and 0 <= v <= most)
        if len(integers) != len(value) or len(value) < n_layers:
            raise self.fail(f"is damaged: '{key}' is {_shown(value)}, expected {n_layers} integers from 0 to {most}")
        return integers[:n_layers]

    def n_items(self, key: str) -> int:
        value = self.values.get(key)
        if isinstance(value, ArraySummary):
            return value.n_items
        return len(value) if isinstance(value, tuple) else 0


def _shown(value: Value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Builder:
    """Puts the headers of all parts together."""

    def __init__(self, headers: Sequence[GgufHeader]) -> None:
        self.headers = headers
        self.meta = _Meta(headers[0])
        self.tensors = tuple(t for h in headers for t in h.tensors)
        architecture = self.meta.string("general.architecture")
        if not architecture:
            raise self.meta.fail("is no model: it does not name an architecture", "give the path of a model in GGUF")
        self.architecture = architecture

    def key(self, suffix: str) -> str:
        return f"{self.architecture}.{suffix}"

    def build(self) -> GgufModel:
        meta, first = self.meta, self.headers[0]
        blocks = self._by_block()
        n_layers = meta.integer(self.key("block_count"), max(blocks, default=-1) + 1, _MAX_LAYERS)
        if max(blocks, default=-1) >= max(n_layers, 1):
            raise meta.fail(f"is damaged: it has tensors of layer {max(blocks)}, but {n_layers} layers")
        n_ahead = min(meta.integer(self.key("nextn_predict_layers"), 0), n_layers)
        n_experts = meta.integer(self.key("expert_count"), 0, _MAX_EXPERTS)
        n_used = meta.per_layer(self.key("expert_used_count"), n_layers, 0, _MAX_EXPERTS)
        layers = tuple(
            layer
            for index in sorted(blocks)
            if (layer := self._moe_layer(index, blocks[index], n_used[index], index >= n_layers - n_ahead))
        )
        n_embd = meta.integer(self.key("embedding_length"), 0)
        n_shared = 0
        if any(layer.shared_tensors for layer in layers):
            # Architectures with exactly one shared expert (qwen2moe, llama4) do not say so in the metadata.
            n_shared = meta.integer(self.key("expert_shared_count"), 0, _MAX_EXPERTS) or 1
        self._check_routing(n_experts, n_used)
        file_type = meta.integer("general.file_type", -1)
        return GgufModel(
            path=first.path,
            parts=tuple(h.path for h in self.headers),
            architecture=self.architecture,
            name=meta.string("general.name") or first.path.stem,
            file_type=_FILE_TYPES.get(file_type, "unknown"),
            n_layers=n_layers,
            n_predict_ahead_layers=n_ahead,
            n_embd=n_embd,
            n_ctx_train=meta.integer(self.key("context_length"), 0),
            n_vocab=meta.n_items("tokenizer.ggml.tokens") or meta.integer(self.key("vocab_size"), 0),
            n_experts=n_experts or max((layer.n_experts for layer in layers), default=0),
            n_experts_used=max(n_used, default=0),
            n_expert_groups=meta.integer(self.key("expert_group_count"), 0, _MAX_EXPERTS),
            n_expert_groups_used=meta.integer(self.key("expert_group_used_count"), 0, _MAX_EXPERTS),
            n_shared_experts=n_shared,
            kv=self._kv(n_layers, n_ahead, n_embd),
            chat_template=meta.string("tokenizer.chat_template"),
            tokenizer_model=meta.string("tokenizer.ggml.model"),
            moe_layers=layers,
            tensors=self.tensors,
            file_bytes=sum(h.file_bytes for h in self.headers),
            metadata=meta.values,
        )

    def _check_routing(self, n_experts: int, n_used: Sequence[int]) -> None:
        # llama.cpp aborts the process on these (src/llama-model.cpp, load_hparams).
        n_groups = self.meta.integer(self.key("expert_group_count"), 0, _MAX_EXPERTS)
        n_groups_used = self.meta.integer(self.key("expert_group_used_count"), 0, _MAX_EXPERTS)
        if max(n_used, default=0) > n_experts or (n_experts > 0 and max(n_used, default=0) == 0):
            raise self.meta.fail(f"is damaged: it uses {max(n_used, default=0)} of {n_experts} experts")
        if n_groups and n_groups >= n_experts:
            raise self.meta.fail(f"is damaged: it has {n_experts} experts in {n_groups} groups")
        if n_groups > 1 and (n_experts % n_groups or not 0 < n_groups_used < n_groups):
            raise self.meta.fail(f"is damaged: it uses {n_groups_used} of {n_groups} groups of {n_experts} experts")

    def _by_block(self) -> dict[int, list[tuple[str, TensorInfo]]]:
        blocks: dict[int, list[tuple[str, TensorInfo]]] = {}
        for tensor in self.tensors:
            if match := _BLOCK.fullmatch(tensor.name):
                blocks.setdefault(int(match[1]), []).append((match[2], tensor))
        return blocks

    def _moe_layer(
        self, index: int, block: list[tuple[str, TensorInfo]], n_used: int, predicts_ahead: bool
    ) -> MoeLayer | None:
        part_bytes = dict.fromkeys(("gate", "up", "gate_up", "down"), 0)
        experts, router, shared = [], [], []
        n_experts = 0
        weights: set[str] = set()
        for name, tensor in block:
            if match := _EXPERT.fullmatch(name):
                n = tensor.shape[-1] if tensor.shape else 0
                if match[2] == "weight" and (len(tensor.shape) != 3 or n == 0):
                    raise self.meta.fail(f"is damaged: expert tensor '{tensor.name}' has the shape {tensor.shape}")
                if n == 0 or tensor.n_bytes % n:
                    raise self.meta.fail(f"is damaged: '{tensor.name}' of shape {tensor.shape} is no expert tensor")
                n_experts = max(n_experts, n)
                part_bytes[match[1]] += tensor.n_bytes // n
                weights |= {match[1]} if match[2] == "weight" else set()
                experts.append(tensor)
            elif name.startswith(("ffn_gate_inp.", "exp_probs_b")):
                router.append(tensor)
            elif "_shexp" in name:
                shared.append(tensor)
        if not any(t.name.endswith(".weight") for t in experts):
            return None
        if "down" not in weights or not weights & {"up", "gate_up"}:
            raise self.meta.fail(f"is damaged: layer {index} lacks matrices of its experts")
        if not 1 <= n_used <= n_experts:
            raise self.meta.fail(
                f"is damaged: layer {index} has {n_experts} experts, '{self.key('expert_used_count')}' is {n_used}"
            )
        return MoeLayer(
            index=index,
            n_experts=n_experts,
            n_experts_used=n_used,
            gate_bytes=part_bytes["gate"],
            up_bytes=part_bytes["up"],
            gate_up_bytes=part_bytes["gate_up"],
            down_bytes=part_bytes["down"],
            expert_tensors=tuple(experts),
            router_tensors=tuple(router),
            shared_tensors=tuple(shared),
            predicts_ahead=predicts_ahead,
        )

    def _kv(self, n_layers: int, n_ahead: int, n_embd: int) -> KvShape:
        meta = self.meta
        n_head = meta.per_layer(self.key("attention.head_count"), n_layers, 0)
        if self.key("attention.head_count_kv") in meta.values:
            n_head_kv = meta.per_layer(self.key("attention.head_count_kv"), n_layers, 0)
        else:
            n_head_kv = n_head
        most_heads = max(n_head, default=0)
        head_length = n_embd // most_heads if most_heads else 0
        window = meta.values.get(self.key("attention.sliding_window"), 0)
        return KvShape(
            n_head=most_heads,
            n_head_kv=n_head_kv[: n_layers - n_ahead],
            key_length=meta.integer(self.key("attention.key_length"), head_length),
            value_length=meta.integer(self.key("attention.value_length"), head_length),
            is_mla=meta.integer(self.key("attention.key_length_mla"), 0) > 0,
            sliding_window=window if type(window) is int else 0,
        )
