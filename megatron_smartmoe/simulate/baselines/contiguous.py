"""No balancing: Megatron's own order, expert e at home on rank e // (E / R).

Source: `num_local_experts` and `local_expert_indices` in Megatron-LM, megatron/core/transformer/moe/moe_layer.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.placement.layer_plan import LayerPlan, LayerProblem, Sees
from megatron_smartmoe.simulate.baselines.slots import fill_slots


@dataclass(frozen=True, kw_only=True)
class Contiguous:
    """Experts in order, no replicas, whatever the load."""

    name: str = "none"
    sees: Sees = "history"

    def plan(self, problem: LayerProblem) -> LayerPlan:
        """The same for every load."""
        home_RH = np.arange(problem.num_experts).reshape(problem.num_ranks, -1)
        return LayerPlan(
            slots_RS=fill_slots(home_RH.tolist(), problem.home_slots + problem.spare_slots),
            split="equal",
        )
