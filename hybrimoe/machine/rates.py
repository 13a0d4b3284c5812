"""What work costs on parts that are known by their data sheets: the terms of the speed model.

Each function prices one kind of work in microseconds; docs/cost-model.md derives them, tests/machine/test_rates.py
computes a case of each by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybrimoe.machine.constants import CONSTANTS, Constants
from hybrimoe.machine.parts import Card, Cpu, Link, Ram

if TYPE_CHECKING:
    from hybrimoe.gguf_model import MoeLayer

__all__ = ["ExpertShape", "active_share", "dot_ns"]

# ggml's dot products with both operands in the cache: nanoseconds per multiplication, and per row (call, scales,
# horizontal sum). Measured on one core of a Zen 3 EPYC (AVX2, about 3.4 GHz) with llama-cpp-python 0.3.36, rows of 512
# to 7168, best of 300; other clocks and instruction sets scale it (`Cpu.speed`).
_KERNEL_NS: Mapping[str, tuple[float, float]] = {
    "Q4_0": (0.0505, 15), "Q4_1": (0.0490, 14), "Q5_0": (0.0610, 16), "Q5_1": (0.0610, 16), "Q8_0": (0.0405, 12),
    "Q2_K": (0.0275, 14), "Q3_K": (0.0390, 18), "Q4_K": (0.0300, 15), "Q5_K": (0.0465, 16), "Q6_K": (0.0375, 15),
    "IQ2_XXS": (0.0760, 17), "IQ2_XS": (0.0800, 22), "IQ2_S": (0.0715, 17), "IQ3_XXS": (0.1090, 15),
    "IQ3_S": (0.1310, 17), "IQ4_NL": (0.0540, 15), "IQ4_XS": (0.0620, 18), "MXFP4": (0.0635, 20),
    "F16": (0.0470, 18), "BF16": (0.0810, 22), "F32": (0.0500, 15),
}  # fmt: skip
_OTHER_TYPE = (0.0800, 18)
_REFERENCE_GHZ = 3.4
# Launches are priced for a core like this: Zen 3 at its clock with all cores busy, and a tenth for boost.
_REFERENCE_THREAD = 4.5 * 1.1
# Rows whose length nobody knows (a trace has bytes and multiplications only).
_USUAL_ROW = 2048
_USUAL_TYPE = "Q4_K"


def dot_ns(type_name: str, row_length: int, n_rows: float) -> float:
    """Nanoseconds of one token's products with a matrix, on the reference core with everything in its cache."""
    per_mac, per_row = _KERNEL_NS.get(type_name, _OTHER_TYPE)
    return n_rows * (row_length * per_mac + per_row)


@dataclass(frozen=True)
class ExpertShape:
    """One expert: bytes, multiplications per token, and `dot_ns` of its matrices."""

    n_bytes: float
    n_macs: float
    cpu_ns: float

    @classmethod
    def of_layer(cls, layer: MoeLayer) -> ExpertShape:
        weights = [t for t in layer.expert_tensors if t.name.endswith(".weight")]
        ns = sum(dot_ns(t.type_name, t.shape[0], t.n_elements / t.shape[0] / layer.n_experts) for t in weights)
        return cls(float(layer.bytes_per_expert), float(sum(t.n_elements // layer.n_experts for t in weights)), ns)

    @classmethod
    def of_bytes(cls, n_bytes: float, n_macs: float | None = None) -> ExpertShape:
        """Where no more is known: 4.5 bits a weight, rows of a usual length."""
        macs = 8 * n_bytes / 4.5 if n_macs is None else n_macs
        return cls(n_bytes, macs, dot_ns(_USUAL_TYPE, _USUAL_ROW, macs / _USUAL_ROW))


def active_share(n_tokens: float, n_used: int, n_experts: int, k: Constants = CONSTANTS) -> float:
    """Share of a layer's experts that a text of `n_tokens` asks for.

    Experts' popularity is gamma-distributed: with x = n_tokens * n_used / n_experts uses of an expert on average,
    1 - (1 + x/s)^-s of them are used at least once.
    """
    x, s = n_tokens * n_used / n_experts, k.popularity_shape
    return float(min(1.0, max(1.0 - (1.0 + x / s) ** -s, min(1.0, n_used / n_experts))))


# --- main memory and CPU ---


def dram_bytes_per_us(cpu: Cpu, ram: Ram, k: Constants = CONSTANTS) -> float:
    """What all cores read from main memory: a share of the peak, no more than the chiplets' fabric carries, and of two
    sockets little more than one."""
    if ram.measured_bytes_per_s is not None:
        return ram.measured_bytes_per_s / 1e6
    rate = ram.peak_bytes_per_s * (k.dram_share if ram.n_channels <= 2 else k.server_dram_share)
    if cpu.fabric_bytes_per_s is not None:
        rate = min(rate, cpu.fabric_bytes_per_s)
    if cpu.n_sockets > 1:
        rate *= (1 + k.second_socket * (cpu.n_sockets - 1)) / cpu.n_sockets
    return rate / 1e6


def cpu_expert_us(shape: ExpertShape, n_tokens: float, cpu: Cpu, ram: Ram, k: Constants = CONSTANTS) -> float:
    """One expert with `n_tokens` tokens on all cores; of a CPU whose arithmetic was measured, the larger bound."""
    if cpu.measured_macs_per_us is None:
        return cpu_us(shape.n_bytes, shape.cpu_ns, n_tokens, cpu, ram, k)
    return max(shape.n_bytes / dram_bytes_per_us(cpu, ram, k), n_tokens * shape.n_macs / cpu.measured_macs_per_us)


def cpu_us(n_bytes: float, ns: float, n_tokens: float, cpu: Cpu, ram: Ram, k: Constants = CONSTANTS) -> float:
    """Products of weights that are read once from main memory with `n_tokens` tokens.

    The first token's arithmetic waits for memory (`streaming_share`), further ones find the weights in the cache. The
    knee between both bounds is smooth.
    """
    memory = n_bytes / dram_bytes_per_us(cpu, ram, k)
    one = ns / 1e3 * _REFERENCE_GHZ / cpu.speed
    arithmetic = one * (1 / k.streaming_share + n_tokens - 1)
    return float((memory**k.knee + arithmetic**k.knee) ** (1 / k.knee))


def cpu_nodes_us(n_nodes: float, cpu: Cpu, k: Constants = CONSTANTS) -> float:
    """Graph nodes on the CPU: each ends with a barrier of all threads."""
    return n_nodes * (k.cpu_node_us + k.barrier_us * cpu.n_threads)


def handover_us(cpu: Cpu, k: Constants = CONSTANTS) -> float:
    """One layer's experts to the CPU and back."""
    return k.handover_us * _REFERENCE_THREAD / cpu.thread_speed


# --- cards ---


def card_bytes_per_us(card: Card, k: Constants = CONSTANTS) -> float:
    """What matrix-vector products read on a card."""
    return (card.measured_bytes_per_s or card.bandwidth_bytes_per_s * k.card_bandwidth_share) / 1e6


def card_nodes_us(n_nodes: float, card: Card, cpu: Cpu, *, split: bool, k: Constants = CONSTANTS) -> float:
    """Graph nodes of one token on a card. `split`: some layers run on the CPU, so no CUDA graph holds the token."""
    launch = k.launch_us * _REFERENCE_THREAD / cpu.thread_speed
    return n_nodes * (k.node_us + (launch if split or not card.design.replays_graphs else 0.0))


def card_products_us(n_macs: float, n_tokens: float, card: Card, k: Constants = CONSTANTS) -> float:
    """Arithmetic of large products: `n_macs` per token, `n_tokens` tokens for the same weights."""
    return (n_tokens + k.half_tokens) * n_macs / (card.int8_macs_per_us * k.matrix_share)


def card_dense_products_us(n_macs: float, n_tokens: float, card: Card, k: Constants = CONSTANTS) -> float:
    """Of products whose batch is large enough to fill the card."""
    return n_tokens * n_macs / (card.int8_macs_per_us * k.matrix_share)


def card_expert_us(shape: ExpertShape, n_tokens: float, card: Card, k: Constants = CONSTANTS) -> float:
    """One expert with `n_tokens` tokens: weights once, then arithmetic; few tokens repeat matrix-vector products."""
    read = shape.n_bytes / card_bytes_per_us(card, k)
    if card.measured_macs_per_us is not None:
        return max(read, n_tokens * shape.n_macs / card.measured_macs_per_us)
    return read + min((n_tokens - 1) * read, card_products_us(shape.n_macs, n_tokens, card, k))


def card_attention_us(n_macs: float, card: Card, k: Constants = CONSTANTS) -> float:
    """Attention of a prompt: `n_macs` multiplications of queries with keys and of weights with values."""
    return n_macs / (card.fp16_macs_per_us * k.attention_share)


def card_activations_us(n_nodes: float, n_tokens: float, n_embd: int, card: Card, k: Constants = CONSTANTS) -> float:
    """What a prompt's nodes read and write besides weights."""
    return n_nodes * k.activation_moves * n_tokens * n_embd * 4 / card_bytes_per_us(card, k)


# --- link ---


def link_bytes_per_us(link: Link, cpu: Cpu, ram: Ram, *, pinned: bool, k: Constants = CONSTANTS) -> float:
    """Copies to a card. From pageable memory every byte crosses main memory three times, which may be the bound."""
    if pinned or link.measured_bytes_per_s is not None:
        return link.bytes_per_s / 1e6
    return min(link.bytes_per_s / 1e6, dram_bytes_per_us(cpu, ram, k) / k.pageable_passes)


def shape_tokens() -> Sequence[int]:
    """Tokens at which curves are given; the core draws straight lines between and beyond."""
    return (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def curve(times: Iterable[float]) -> tuple[tuple[float, float], ...]:
    return tuple(zip(map(float, shape_tokens()), times, strict=True))
