"""Quantising and dequantising weights with ggml's own code, so that every type llama.cpp runs can be written."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrimoe.errors import UsageError
from hybrimoe.gguf_header import GGML_TYPES, GgmlType

__all__ = ["fitting_type", "quantise", "row_bytes", "type_names", "type_of"]

_NUMBERS = {kind.name: number for number, kind in GGML_TYPES.items()}
# Types that hold weights of a model and need no importance matrix; ggml aborts the process on the others.
_WRITABLE = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
    "IQ4_XS", "IQ3_S", "IQ2_S", "TQ1_0", "TQ2_0", "MXFP4",
)  # fmt: skip


def type_names() -> tuple[str, ...]:
    """Names of the types that `quantise` writes."""
    return _WRITABLE


def type_of(name: str) -> tuple[int, GgmlType]:
    """ggml's number and layout of a type; the name in any case. Raises `UsageError` naming the known types."""
    name = name.upper()
    if name not in _WRITABLE:
        raise UsageError(f"unknown quantisation type '{name}'", "known types: " + " ".join(_WRITABLE))
    number = _NUMBERS[name]
    return number, GGML_TYPES[number]


def row_bytes(n_per_row: int, name: str) -> int:
    """Bytes of one row of `n_per_row` weights. Raises `UsageError` when the row is no whole number of blocks."""
    kind = type_of(name)[1]
    if n_per_row % kind.block_elems:
        raise UsageError(
            f"{kind.name} needs rows of a multiple of {kind.block_elems} weights, not {n_per_row}",
            "choose a type with smaller blocks, such as Q8_0 or Q4_0",
        )
    return n_per_row // kind.block_elems * kind.block_bytes


def fitting_type(n_per_row: int, name: str) -> str:
    """`name` where rows of `n_per_row` weights allow it, else Q8_0, else F32: what model converters do."""
    for candidate in (name.upper(), "Q8_0"):
        if n_per_row % type_of(candidate)[1].block_elems == 0:
            return candidate
    return "F32"


def quantise(weights: npt.NDArray[np.float32], name: str) -> npt.NDArray[np.uint8]:
    """`weights` (any shape, rows last) as ggml's blocks: a flat array of bytes. ggml's reference quantisation."""
    number, kind = type_of(name)
    weights = np.ascontiguousarray(weights, dtype=np.float32)
    n_per_row = weights.shape[-1]
    n_rows = weights.size // max(n_per_row, 1)
    if kind.name == "F32":
        return weights.reshape(-1).view(np.uint8)
    if kind.name == "F16":
        return weights.astype(np.float16).reshape(-1).view(np.uint8)
    blocks = np.empty(n_rows * row_bytes(n_per_row, name), dtype=np.uint8)
    float_p = ctypes.POINTER(ctypes.c_float)
    n_written = _quantize_chunk()(
        number, weights.ctypes.data_as(float_p), blocks.ctypes.data, 0, n_rows, n_per_row, None
    )
    if n_written != blocks.size:
        raise RuntimeError(f"ggml wrote {n_written} bytes of {kind.name}, expected {blocks.size}")
    return blocks


def _quantize_chunk() -> Any:
    from llama_cpp import _ggml

    # size_t ggml_quantize_chunk(enum ggml_type type, const float * src, void * dst, int64_t start, int64_t nrows,
    #                            int64_t n_per_row, const float * imatrix);
    function = _ggml.libggml.ggml_quantize_chunk
    float_p = ctypes.POINTER(ctypes.c_float)
    function.argtypes = [
        ctypes.c_int, float_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, float_p,
    ]  # fmt: skip
    function.restype = ctypes.c_size_t
    return function
