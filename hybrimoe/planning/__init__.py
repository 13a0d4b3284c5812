"""Will a model run here, where does everything go, how fast, and what would help: answered before anything is loaded.

`make_plan` reads the model's header, asks llama.cpp for the buffers it would allocate (`dry_load`), fills the memories
(`memory`) and lets the policy core schedule one token and one prompt batch on the costs of the machine (`speed`).
"""

from __future__ import annotations

from hybrimoe.planning.machines import PlanMachine
from hybrimoe.planning.memory import MemoryPlan, Needs, Setting, measure_needs, plan_memory
from hybrimoe.planning.plan import ModelPlan, make_plan
from hybrimoe.planning.speed import Speed

__all__ = [
    "MemoryPlan",
    "ModelPlan",
    "Needs",
    "PlanMachine",
    "Setting",
    "Speed",
    "make_plan",
    "measure_needs",
    "plan_memory",
]
