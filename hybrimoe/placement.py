"""Which buffer type each weight goes to: llama.cpp's `-ot`, `-cmoe` and `-ncmoe`, then the plug-in for experts."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hybrimoe.errors import UsageError

# Router weights (with the dot: `ffn_gate_inp_shexp`, the shared expert's gate, is dense) and all routed experts.
# Without a backslash, which unit files and some launchers read as an escape.
MOE_PATTERN = "ffn_(gate_inp[.]|.*_exps)"
# The plug-in's device and its buffer type, as ggml knows them.
PLUGIN_BUFFER_TYPE = "HybriMoE"
# Devices of the plug-in that take whole graphs are named after those that they wrap; the experts' weights, and nothing
# else, go to a host buffer type of theirs.
GRAPH_DEVICE_PREFIX = "HybriMoE_"
GRAPH_BUFFER_TYPE = "HybriMoE_Graph"
GRAPH_PATTERN = "ffn_.*_exps[.]weight"
# llama.cpp's LLM_FFN_EXPS_REGEX (common/common.h of the pinned release).
CPU_MOE_PATTERN = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"


class _Override(ctypes.Structure):
    """struct llama_model_tensor_buft_override"""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


@dataclass(frozen=True)
class Placement:
    """What the user asked for. The first pattern that matches a tensor's name decides, as in llama.cpp.

    `overrides` are `-ot` arguments (`PATTERN=BUFFER_TYPE`, several separated by commas).
    """

    overrides: Sequence[str] = field(default_factory=tuple)
    cpu_moe: bool = False
    n_cpu_moe: int = 0

    def rules(self, buffer_types: dict[str, int], plugin_buffer_type: int | None) -> list[tuple[str, int]]:
        """(pattern, buffer type) in order; the plug-in's pattern comes last and takes what the user left.

        With the plug-in, `cpu_moe` and `n_cpu_moe` place nothing: its CPU kernels run those experts, without slots.

        Raises UsageError for a malformed override, an unknown buffer type or a pattern that is no regular expression.
        """
        rules = [rule for text in self.overrides for rule in _parse(text, buffer_types)]
        if plugin_buffer_type is not None:
            return [*rules, (MOE_PATTERN, plugin_buffer_type)]
        cpu = buffer_types.get("CPU", 0)
        if self.cpu_moe:
            rules.append((CPU_MOE_PATTERN, cpu))
        return rules + [(rf"blk\.{layer}{CPU_MOE_PATTERN}", cpu) for layer in range(self.n_cpu_moe)]


def override_array(rules: Sequence[tuple[str, int]]) -> ctypes.Array[Any]:
    """The C array that `llama_model_params.tensor_buft_overrides` points to; keep it alive as long as the model."""
    array = (_Override * (len(rules) + 1))()
    for entry, (pattern, buffer_type) in zip(array, rules, strict=False):
        entry.pattern = pattern.encode()
        entry.buft = buffer_type
    return array


def buffer_types() -> dict[str, int]:
    """Buffer types of the ggml devices that are loaded, by name."""
    from hybrimoe.native.plugin import ggml_library

    ggml = ggml_library()
    # const char * ggml_backend_buft_name(ggml_backend_buffer_type_t buft)
    ggml.ggml_backend_buft_name.argtypes = [ctypes.c_void_p]
    ggml.ggml_backend_buft_name.restype = ctypes.c_char_p
    found: dict[str, int] = {}
    for index in range(ggml.ggml_backend_dev_count()):
        buffer_type = ggml.ggml_backend_dev_buffer_type(ggml.ggml_backend_dev_get(index))
        if buffer_type:
            found[ggml.ggml_backend_buft_name(buffer_type).decode()] = buffer_type
    return found


def _parse(text: str, buffer_types: dict[str, int]) -> list[tuple[str, int]]:
    rules = []
    for part in text.split(","):
        pattern, equals, name = part.partition("=")
        if not equals or not pattern or not name:
            raise UsageError(f"-ot '{text}' is not of the form PATTERN=BUFFER_TYPE", "for example -ot 'blk\\.0\\.=CPU'")
        if name not in buffer_types:
            raise UsageError(
                f"-ot '{text}' names an unknown buffer type '{name}'", f"known are: {', '.join(sorted(buffer_types))}"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(f"-ot '{text}' is no regular expression: {error}") from error
        rules.append((pattern, buffer_types[name]))
    return rules
