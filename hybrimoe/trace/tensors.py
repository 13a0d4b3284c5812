"""Reading graph tensors from llama.cpp's evaluation callback: struct ggml_tensor of the pinned release."""

from __future__ import annotations

import ctypes as ct
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["GgmlTensor", "values"]

_F32, _I32 = 0, 26  # ggml_type


class GgmlTensor(ct.Structure):
    """struct ggml_tensor (ggml.h of the release that llama-cpp-python carries)."""


GgmlTensor._fields_ = [
    ("type", ct.c_int),
    ("buffer", ct.c_void_p),
    ("ne", ct.c_int64 * 4),
    ("nb", ct.c_size_t * 4),
    ("op", ct.c_int),
    ("op_params", ct.c_int32 * 16),
    ("flags", ct.c_int32),
    ("src", ct.POINTER(GgmlTensor) * 10),
    ("view_src", ct.c_void_p),
    ("view_offs", ct.c_size_t),
    ("data", ct.c_void_p),
    ("name", ct.c_char * 64),
    ("extra", ct.c_void_p),
    ("padding", ct.c_char * 8),
]


@cache
def _get() -> Any:
    """ggml_backend_tensor_get of the libraries that llama_cpp has loaded."""
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    found = sorted(folder.glob("*ggml-base*"))
    library = ct.CDLL(str(found[0])) if found else ct.CDLL(None)
    function = library.ggml_backend_tensor_get
    function.restype = None
    function.argtypes = (ct.POINTER(GgmlTensor), ct.c_void_p, ct.c_size_t, ct.c_size_t)
    return function


def values(tensor: Any, width: int) -> npt.NDArray[Any] | None:
    """Rows [n_rows, width] of a tensor of 32-bit numbers on any device; None if it is of another type or shape.

    Args:
        tensor: pointer to a GgmlTensor; its rows may be longer than they are (a view of the first columns).
        width: numbers per row: the first dimension, or the product of the first two if that is 1.
    """
    import numpy as np

    t = tensor.contents
    ne, nb = list(t.ne), list(t.nb)
    if ne[0] == 1 and width > 1:
        ne, nb = [*ne[1:], 1], [*nb[1:], nb[3]]
    if t.type not in (_F32, _I32) or ne[0] != width or nb[0] != 4:
        return None
    n_rows = ne[1] * ne[2] * ne[3]
    if ne[2] * ne[3] > 1 and nb[2] != ne[1] * nb[1]:
        return None
    if n_rows == 0:
        return np.zeros((0, width), np.float32)
    n_bytes = (n_rows - 1) * nb[1] + width * 4
    raw = np.zeros(n_rows * nb[1] if n_rows * nb[1] >= n_bytes else n_bytes, np.uint8)
    _get()(tensor, raw.ctypes.data, 0, n_bytes)
    rows = raw[: n_rows * nb[1]].reshape(n_rows, nb[1])[:, : width * 4]
    return np.ascontiguousarray(rows).view(np.float32 if t.type == _F32 else np.int32)
