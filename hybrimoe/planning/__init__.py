"""Will a model run here, where does everything go, how fast, and what would help: answered before anything is loaded.

`make_plan` reads the model's header, asks llama.cpp for the buffers it would allocate (`dry_load`), chooses a context
(`context`), fills the memories (`memory`) and prices one token and one prompt (`speed`): of ours, and of plain
llama.cpp in the ways in which people place it (`ways`). `what_if` varies any of it.
"""

from __future__ import annotations

from hybrimoe.planning.context import choose_context
from hybrimoe.planning.memory import MemoryPlan, Needs, Setting, measure_needs, plan_memory
from hybrimoe.planning.placement import Request
from hybrimoe.planning.plan import Asked, ModelPlan, make_plan
from hybrimoe.planning.speed import Speed

__all__ = [
    "Asked",
    "MemoryPlan",
    "ModelPlan",
    "Needs",
    "Request",
    "Setting",
    "Speed",
    "choose_context",
    "make_plan",
    "measure_needs",
    "plan_memory",
]
