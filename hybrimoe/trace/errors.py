"""What can be wrong with a trace."""

from __future__ import annotations

from hybrimoe.errors import HybrimoeError

__all__ = ["TraceError"]


class TraceError(HybrimoeError):
    """A trace that is missing, corrupt, cut short, of a later version or of another model: exit code 3, as a model."""

    exit_code = 3
